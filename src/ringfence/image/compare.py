"""Says in which entries two directory trees differ: names, kinds, modes, owners, times, attributes, content."""

import os
import stat

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterator

_CHUNK = 1 << 20
_DIRECTORY = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
_KINDS = {
    stat.S_IFDIR: "a directory",
    stat.S_IFREG: "a file",
    stat.S_IFLNK: "a symlink",
    stat.S_IFCHR: "a whiteout",
    stat.S_IFIFO: "a FIFO",
}


def differences(found: str, wanted: str) -> "Iterator[str]":
    """Yield one line for each entry of the tree `found` that is not as in the tree `wanted`; raises OSError.

    Symlinks are not followed, and a changed directory is compared to its depths.
    """
    here = os.open(found, _DIRECTORY)
    try:
        there = os.open(wanted, _DIRECTORY)
        try:
            yield from _entry("/", os.fstat(here), os.fstat(there))
            yield from _directory("", here, there)
        finally:
            os.close(there)
    finally:
        os.close(here)


def _directory(path: str, here: int, there: int) -> "Iterator[str]":
    if _attributes(here) != _attributes(there):
        yield f"{path or '/'}: other extended attributes"
    names, wanted = set(os.listdir(here)), set(os.listdir(there))
    for name in sorted(names | wanted, key=os.fsencode):
        full = f"{path}/{name}"
        if name not in names:
            yield f"{full}: missing"
        elif name not in wanted:
            yield f"{full}: not part of the layer"
        else:
            yield from _both(full, name, here, there)


def _both(path: str, name: str, here: int, there: int) -> "Iterator[str]":
    one = os.stat(name, dir_fd=here, follow_symlinks=False)
    other = os.stat(name, dir_fd=there, follow_symlinks=False)
    different = False
    for line in _entry(path, one, other):
        different = True
        yield line
    if stat.S_IFMT(one.st_mode) != stat.S_IFMT(other.st_mode):
        return
    if stat.S_ISDIR(one.st_mode):
        mine, theirs = os.open(name, _DIRECTORY, dir_fd=here), os.open(name, _DIRECTORY, dir_fd=there)
        try:
            yield from _directory(path, mine, theirs)
        finally:
            os.close(mine)
            os.close(theirs)
    elif stat.S_ISLNK(one.st_mode):
        if os.readlink(name, dir_fd=here) != os.readlink(name, dir_fd=there):
            yield f"{path}: another target"
    elif stat.S_ISREG(one.st_mode) and not different:
        yield from _file(path, name, here, there)


def _entry(path: str, one: os.stat_result, other: os.stat_result) -> "Iterator[str]":
    kinds = stat.S_IFMT(one.st_mode), stat.S_IFMT(other.st_mode)
    if kinds[0] != kinds[1]:
        yield f"{path}: {_KINDS.get(kinds[0], 'a device or socket')} instead of {_KINDS.get(kinds[1], 'another kind')}"
        return
    if one.st_mode != other.st_mode:
        yield f"{path}: mode {stat.S_IMODE(one.st_mode):04o} instead of {stat.S_IMODE(other.st_mode):04o}"
    if (one.st_uid, one.st_gid) != (other.st_uid, other.st_gid):
        yield f"{path}: owner {one.st_uid}:{one.st_gid} instead of {other.st_uid}:{other.st_gid}"
    if stat.S_ISREG(one.st_mode) and one.st_size != other.st_size:
        yield f"{path}: {one.st_size} bytes instead of {other.st_size}"
    elif one.st_mtime_ns != other.st_mtime_ns and not stat.S_ISCHR(
        one.st_mode
    ):  # nobody sees a whiteout's time
        yield f"{path}: another modification time"
    if not stat.S_ISDIR(one.st_mode) and one.st_nlink != other.st_nlink:
        yield f"{path}: {one.st_nlink} hard links instead of {other.st_nlink}"


def _file(path: str, name: str, here: int, there: int) -> "Iterator[str]":
    flags = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
    with (
        open(os.open(name, flags, dir_fd=here), "rb", buffering=0) as mine,
        open(os.open(name, flags, dir_fd=there), "rb", buffering=0) as theirs,
    ):
        if _attributes(mine.fileno()) != _attributes(theirs.fileno()):
            yield f"{path}: other extended attributes"
        while True:
            block, wanted = mine.read(_CHUNK), theirs.read(_CHUNK)
            if block != wanted:
                yield f"{path}: another content"
                return
            if not block:
                return


def _attributes(descriptor: int) -> dict[str, bytes]:
    try:
        return {name: os.getxattr(descriptor, name) for name in os.listxattr(descriptor)}
    except OSError:  # a file system without any
        return {}
