"""Control files and directories of one hierarchy, always reached step by step from its mount point."""

from __future__ import annotations

import os

from ringfence.cgroup.layout import components

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterator

# The largest control file read here is cgroup.procs; 1 MiB is 150,000 process ids.
_MOST_BYTES = 1 << 20
_DIRECTORY = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC


def open_directory(mount: str, path: str) -> int:
    """Return a descriptor of group `path` below `mount`, following no link; "" is `mount`. Raises OSError."""
    current = os.open(mount, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        for part in components(path) if path else ():
            current, parent = os.open(part, _DIRECTORY, dir_fd=current), current
            os.close(parent)
    except OSError:
        os.close(current)
        raise
    return current


def parent_of(path: str) -> str:
    """Return the group above `path`, "" for the root of the hierarchy."""
    return path.rpartition("/")[0]


def make_directory(mount: str, path: str) -> bool:
    """Make the last directory of `path`, whose parents exist; False when it was there. Raises OSError."""
    parent = open_directory(mount, parent_of(path))
    try:
        os.mkdir(components(path)[-1], 0o755, dir_fd=parent)
    except FileExistsError:
        return False
    finally:
        os.close(parent)
    return True


def read_at(directory: int, name: str) -> str | None:
    """Return the text of control file `name`, or None when it is not there or cannot be read."""
    try:
        fd = os.open(name, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=directory)
    except OSError:
        return None
    try:
        text = b""
        while len(text) < _MOST_BYTES and (piece := os.read(fd, 65536)):
            text += piece
    except OSError:  # ENODEV: the group was removed while its file was open
        return None
    finally:
        os.close(fd)
    return text.decode("ascii", "replace")


def write_at(directory: int, name: str, text: str) -> None:
    """Write `text` to control file `name` in one call, as the kernel wants it; raises OSError."""
    fd = os.open(name, os.O_WRONLY | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=directory)
    try:
        os.write(fd, text.encode())
    finally:
        os.close(fd)


def read(mount: str, path: str, name: str) -> str | None:
    """Return the text of ``mount/path/name``, or None when it is not there."""
    try:
        directory = open_directory(mount, path)
    except OSError:
        return None
    try:
        return read_at(directory, name)
    finally:
        os.close(directory)


def subgroups(directory: int) -> list[str]:
    """Return the names of the groups directly below an open group."""
    # kernfs counts subdirectories in st_nlink, so the usual group without children costs no listing.
    if os.fstat(directory).st_nlink == 2:
        return []
    with os.scandir(directory) as entries:
        return sorted(entry.name for entry in entries if entry.is_dir(follow_symlinks=False))


def walk(mount: str, path: str) -> Iterator[tuple[str, int]]:
    """Yield (path, open descriptor) of group `path` and of all groups below it, children first.

    Groups that vanish on the way are passed over; each descriptor is closed after its turn.
    """
    try:
        directory = open_directory(mount, path)
    except OSError:
        return
    try:
        for name in subgroups(directory):
            yield from walk(mount, f"{path}/{name}")
        yield path, directory
    finally:
        os.close(directory)


def remove_tree(mount: str, path: str) -> None:
    """Remove group `path` and the groups below it; absent is fine. Raises OSError (EBUSY while in use)."""
    try:
        for below in [below for below, _ in walk(mount, path)]:
            parent = open_directory(mount, parent_of(below))
            try:
                os.rmdir(components(below)[-1], dir_fd=parent)
            finally:
                os.close(parent)
    except FileNotFoundError:
        return
