"""Who the USER of an image is: names are looked up in the image's own passwd and group, never in the host's."""

import errno
import os
import stat

from ringfence.errors import ImageError
from ringfence.linux import libc

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Sequence

_MOST_BYTES = 1 << 20
_LAST_ID = 65535  # a sandbox has 65,536 ids


def image_user(layers: "Sequence[str]", user: str) -> tuple[int, int] | None:
    """Return (uid, gid) of what the image config calls `user` ("app", "app:web", "1001:0"), None for "" or root.

    `layers` are the root directories of its layers, lowest first. A group 0 is not taken either: the user's own id
    stands in for it. Raises ImageError for a name that the image does not know.
    """
    name, _, group = user.partition(":")
    if not name:
        return None
    accounts = _lines(layers, "etc/passwd")
    uid = _number(name, user)
    own = next((fields for fields in accounts if _is(fields, name, uid)), None)
    if uid is None:
        if own is None:
            raise ImageError(
                f"the image's user {user!r} is not in its /etc/passwd", hint="choose one: --user UID:GID"
            )
        uid = _number(own[2], user)
    gid = _gid(layers, group, user) if group else (_number(own[3], user) if own is not None else None)
    if uid is None or uid == 0:
        return None
    return uid, gid or uid


def _gid(layers: "Sequence[str]", group: str, user: str) -> int | None:
    gid = _number(group, user)
    if gid is not None:
        return gid
    found = next((fields for fields in _lines(layers, "etc/group") if fields[0] == group), None)
    if found is None:
        raise ImageError(
            f"the group of the image's user {user!r} is not in its /etc/group", hint="choose: --user UID:GID"
        )
    return _number(found[2], user)


def _is(fields: list[str], name: str, uid: int | None) -> bool:
    return fields[0] == name if uid is None else fields[2] == str(uid)


def _number(text: str, user: str) -> int | None:
    if not text.isascii() or not text.isdigit():
        return None
    if len(text) > 10 or int(text) > _LAST_ID:
        raise ImageError(
            f"the image's user {user!r} is beyond the 65536 ids of a sandbox", hint="--user UID:GID"
        )
    return int(text)


def _lines(layers: "Sequence[str]", path: str) -> list[list[str]]:
    """Return the fields of each whole line of `path`, from the topmost layer that has it."""
    for layer in reversed(layers):
        data = _read(layer, path)
        if data is not None:
            lines = (line.split(":") for line in data.decode("utf-8", "replace").splitlines())
            return [fields for fields in lines if len(fields) >= 4]
    return []


def _read(layer: str, path: str) -> bytes | None:
    """Read a small regular file of a layer, without leaving the layer or following a link in it."""
    root = os.open(layer, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        resolve = libc.RESOLVE_IN_ROOT | libc.RESOLVE_NO_SYMLINKS | libc.RESOLVE_NO_MAGICLINKS
        descriptor = libc.openat2(root, path, os.O_RDONLY | os.O_NONBLOCK, resolve)
    except OSError as error:
        # ENXIO: a whiteout, which is a device that nothing drives. The file is deleted, whatever lies below.
        return b"" if error.errno == errno.ENXIO else None
    finally:
        os.close(root)
    try:
        if not stat.S_ISREG(os.fstat(descriptor).st_mode):
            return b""
        return os.read(descriptor, _MOST_BYTES)
    finally:
        os.close(descriptor)
