"""Host id ranges: each live sandbox has one of its own, which nobody else on the host uses.

For root they come from 0x70000000-0x7fffffff, which systemd's list of id ranges leaves free, less what
/etc/subuid and /etc/subgid hand out; for a user from what those files give to him. A range is a file that names the
sandbox's directory; the file is made under a lock and removed when nothing of the sandbox is left.
Source: https://systemd.io/UIDS-GIDS/
"""

from __future__ import annotations

import fcntl
import os

from ringfence.errors import SandboxError
from ringfence.linux import paths

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

_FIRST = 0x70000000
_BEYOND = 0x80000000
_MOST_BYTES = 1 << 20


def allocate(size: int, directory: str, *, rootless: bool = False) -> int:
    """Return the first host id of a free range of `size` ids, recorded for the sandbox in `directory`.

    Raises SandboxError when all are in use.
    """
    home = _home(rootless=rootless)
    lock = _lock(home)
    try:
        taken = set(os.listdir(home))
        bases = _of_user(size) if rootless else _of_root(size)
        if bases:
            # Not always the first: ids are not used again as soon as they are free.
            start = int.from_bytes(os.urandom(4), "little") % len(bases)
            for place in range(len(bases)):
                base = bases[(start + place) % len(bases)]
                if str(base) not in taken:
                    _claim(f"{home}/{base}", directory)
                    return base
    finally:
        os.close(lock)
    if not bases:
        raise SandboxError(
            f"there are no {size} ids in a row for a sandbox in both /etc/subuid and /etc/subgid",
            hint="usermod --add-subuids 100000-165535 --add-subgids 100000-165535 USER",
        )
    raise SandboxError(
        f"all {len(bases)} id ranges are in use", hint="stop sandboxes, or run 'ringfence gc' after a crash"
    )


def release(
    base: int, directory: str, *, rootless: bool = False, last: Callable[[], object] | None = None
) -> None:
    """Give the range back if it is recorded for the sandbox in `directory`.

    `last` is called if no sandbox of any run directory has a range then, while none can get one.
    """
    if base <= 0:
        return
    home = _home(rootless=rootless)
    lock = _lock(home)
    try:
        if _owner(f"{home}/{base}") == directory:
            os.unlink(f"{home}/{base}")
        if last is not None and not any(name.isdigit() for name in os.listdir(home)):
            last()
    finally:
        os.close(lock)


def abandoned(*, rootless: bool = False) -> Iterator[int]:
    """Give back and yield the ranges of sandboxes whose directory is gone."""
    home = _home(rootless=rootless)
    lock = _lock(home)
    try:
        for name in os.listdir(home):
            if name.isdigit() and not os.path.isdir(_owner(f"{home}/{name}")):
                os.unlink(f"{home}/{name}")
                yield int(name)
    finally:
        os.close(lock)


def _home(*, rootless: bool) -> str:
    # One place for all of root's run directories: ids are the host's, not the directory's.
    run = paths.run_dir() if rootless else paths.ROOT_RUN
    path = f"{run}/ranges"
    try:
        for directory in (run, path):  # one by one: makedirs gives those above whatever the umask leaves
            try:
                os.mkdir(directory, 0o711)
                os.chmod(directory, 0o711)  # noqa: S103 - sandboxes' users pass through it
            except FileExistsError:
                continue
        found = os.lstat(path)
    except OSError as error:
        raise SandboxError(f"cannot make {path}: {error.strerror}", hint="see 'ringfence doctor'") from error
    if found.st_uid != os.geteuid() or found.st_mode & 0o022:
        raise SandboxError(f"{path} can be changed by others", hint="remove it")
    return path


def _lock(home: str) -> int:
    fd = os.open(f"{home}/.lock", os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
    fcntl.flock(fd, fcntl.LOCK_EX)
    return fd


def _claim(path: str, directory: str) -> None:
    fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
    try:
        os.write(fd, os.fsencode(directory))
    finally:
        os.close(fd)


def owners(*, rootless: bool = False) -> list[str]:
    """Return the directories of all sandboxes that have a range, whichever run directory they are in."""
    home = _home(rootless=rootless)
    return [_owner(f"{home}/{name}") for name in os.listdir(home) if name.isdigit()]


def _owner(path: str) -> str:
    try:
        fd = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
    except OSError:
        return ""
    try:
        return os.fsdecode(os.read(fd, 4096))
    finally:
        os.close(fd)


def _of_root(size: int) -> Sequence[int]:
    given = [*_subordinate("/etc/subuid"), *_subordinate("/etc/subgid")]
    clash = [(start, end) for _, start, end in given if end > _FIRST and start < _BEYOND]
    slots = range(_FIRST, _BEYOND - size + 1, size)
    if not clash:
        return slots
    return [base for base in slots if all(base + size <= start or base >= end for start, end in clash)]


def _of_user(size: int) -> Sequence[int]:
    """The slots that lie in a range of the user in both files."""
    import pwd

    try:
        names = {str(os.geteuid()), pwd.getpwuid(os.geteuid()).pw_name}
    except KeyError:
        names = {str(os.geteuid())}
    uids, gids = (
        [(start, end) for owner, start, end in _subordinate(path) if owner in names]
        for path in ("/etc/subuid", "/etc/subgid")
    )
    found: list[int] = []
    for uid_start, uid_end in uids:
        for gid_start, gid_end in gids:
            start, end = max(uid_start, gid_start), min(uid_end, gid_end)
            found += range(start, end - size + 1, size)
    return sorted(set(found))


def _subordinate(path: str) -> list[tuple[str, int, int]]:
    """Return (owner, first id, id after the last) of each good line of subuid(5)."""
    try:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except OSError:
        return []
    try:
        text = os.read(fd, _MOST_BYTES).decode("utf-8", "replace")
    finally:
        os.close(fd)
    found = []
    for line in text.splitlines():
        owner, _, rest = line.strip().partition(":")
        start, _, count = rest.partition(":")
        if start.isdigit() and count.isdigit():
            found.append((owner, int(start), int(start) + int(count)))
    return found
