"""The built images below the state directory: listed, described, removed, changed only under one lock.

images/lock                                  held by whoever builds or removes
images/NAME/sha256-.../rootfs/               a build; its directory is its digest
images/NAME/sha256-.../manifest.json
images/NAME/current -> sha256-...            the build in use
images/NAME/.building-PID/                   a build under way, or what a killed one left
"""

import fcntl
import os
import re
import shutil
from contextlib import contextmanager

import msgspec

from ringfence.errors import ImageError
from ringfence.image.find import CURRENT, current_build, images_dir

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

BUILDING = ".building-"
NAMES = ("base",)


class Manifest(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What a build is made of; `created` is UTC as in RFC 3339, `packages` maps names to versions."""

    name: str
    digest: str
    suite: str
    architecture: str
    created: str
    size_bytes: int
    packages: dict[str, str]


@contextmanager
def locked(state: str, waiting: "Callable[[], None]") -> "Iterator[int]":
    """Hold the lock of the images in `state`; call `waiting` once if another process has it.

    Yields its descriptor: a child that inherits it keeps the lock until it is gone too. Raises ImageError.
    """
    directory = images_dir(state)
    try:
        make_directory(directory)
        descriptor = os.open(
            os.path.join(directory, "lock"), os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600
        )
    except OSError as error:
        raise ImageError(f"cannot write to {directory}: {error.strerror}", hint="run as its owner") from error
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            waiting()
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield descriptor
    finally:
        os.close(descriptor)


def make_directory(path: str) -> None:
    """Make a directory that the users of sandboxes can read whatever the umask is; raises OSError."""
    os.makedirs(path, exist_ok=True)
    os.chmod(path, 0o755)  # noqa: S103 - an image is public on its host, like the packages it is made of


def manifest(state: str, name: str) -> Manifest | None:
    """Return the manifest of the build of `name` in use, None if there is none. Raises ImageError."""
    build = current_build(state, name)
    if not build:
        return None
    path = os.path.join(images_dir(state), name, build, "manifest.json")
    try:
        with open(path, "rb") as file:
            return msgspec.json.decode(file.read(), type=Manifest)
    except (OSError, msgspec.MsgspecError) as error:
        raise ImageError(
            f"cannot read {path}: {error}", hint="run: ringfence image bootstrap base --force"
        ) from error


def publish(home: str, building: str, digest: str) -> None:
    """Make the finished `building` the build in use of the image directory `home`, in one step."""
    build = digest.replace(":", "-", 1)
    final = os.path.join(home, build)
    if not os.path.isdir(final):
        os.sync()  # or a power cut could keep the name and lose the content
        os.rename(building, final)
    fresh = f"{building}.{CURRENT}"
    os.symlink(build, fresh)
    os.rename(fresh, os.path.join(home, CURRENT))


def sweep(state: str, name: str) -> None:
    """Remove what killed builds of the image `name` left, and builds neither current nor seen by any process.

    The caller holds the lock. Raises OSError.
    """
    home = os.path.join(images_dir(state), name)
    kept = (CURRENT, current_build(state, name))
    for entry in os.listdir(home):
        if entry in kept or (not entry.startswith(BUILDING) and in_use(name, entry)):
            continue
        remove_tree(os.path.join(home, entry))


def remove(state: str, name: str) -> bool:
    """Remove the image `name` from `state`; return whether there was one.

    The caller holds the lock. Raises ImageError while a sandbox uses it, or without the right to remove it.
    """
    home = os.path.join(images_dir(state), name)
    if not os.path.isdir(home):
        return False
    if in_use(name):
        raise ImageError(
            f"image {name!r} is in use by a sandbox", hint="stop it first; 'ringfence ps' lists them"
        )
    existed = bool(current_build(state, name))
    try:
        if existed:
            os.unlink(os.path.join(home, CURRENT))  # first, so that no run finds half an image
        remove_tree(home)
    except OSError as error:
        raise ImageError(f"cannot remove {home}: {error.strerror}", hint="run as its owner") from error
    return existed


def remove_tree(path: str) -> None:
    """Remove a file, a symlink or a whole directory, if it is there; raises OSError.

    Raises ImageError when anything is mounted in it: that belongs to somebody else, and would be emptied.
    """
    mounted = mount_points(os.path.realpath(path)) if os.path.isdir(path) and not os.path.islink(path) else []
    if mounted:
        raise ImageError(f"cannot remove {path}: {mounted[0]} is mounted", hint="unmount it, then try again")
    if os.path.islink(path) or os.path.isfile(path):
        os.unlink(path)
    elif os.path.lexists(path):
        shutil.rmtree(path)


def mount_points(directory: str) -> list[str]:
    """Return the mount points at and below the real path `directory` in this process's mount namespace."""
    with open("/proc/self/mountinfo", "rb") as table:
        # The kernel writes space, tab, newline and backslash as octal escapes: proc_pid_mountinfo(5).
        found = [re.sub(rb"\\([0-7]{3})", _unescape, line.split(b" ")[4]) for line in table]
    inside = os.fsencode(directory.rstrip("/")) + b"/"
    return [os.fsdecode(path) for path in found if (path + b"/").startswith(inside)]


def _unescape(match: "re.Match[bytes]") -> bytes:
    return bytes([int(match[1], 8)])


def in_use(name: str, build: str = "") -> bool:
    """Say whether some process has `build` of the image `name` mounted, by default any build of it.

    The kernel's mount tables name a path within its file system, so an image of that name in another state
    directory counts too: better to keep what could go than to pull files from under a sandbox.
    """
    needle = os.fsencode(os.path.join("/images", name, build, ""))
    for process in filter(str.isdigit, os.listdir("/proc")):
        try:
            with open(f"/proc/{process}/mountinfo", "rb") as table:
                if needle in table.read():
                    return True
        except OSError:  # gone meanwhile, or another user's
            continue
    return False
