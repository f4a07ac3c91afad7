"""The directories of a tree under construction, opened step by step and kept open for a while."""

import errno
import os
import stat

from ringfence.errors import ImageError
from ringfence.image.tarstream import shown
from ringfence.linux.libc import (
    RESOLVE_BENEATH,
    RESOLVE_NO_MAGICLINKS,
    RESOLVE_NO_SYMLINKS,
    openat2,
)

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Protocol

    class Made(Protocol):
        """What is told of each directory made here; `whiteout`: it took the place of one."""

        def __call__(self, path: bytes, *, whiteout: bool) -> None: ...


_MOST_OPEN = 128
_RULES = RESOLVE_BENEATH | RESOLVE_NO_SYMLINKS | RESOLVE_NO_MAGICLINKS
_NOT_THERE = (errno.ENOENT, errno.ENOTDIR, errno.ELOOP)


class Directories:
    """Descriptors of directories below `root`, by their path; they stay ours, callers do not close them.

    One returned is good until the third next call.
    """

    def __init__(self, root: int, made: "Made") -> None:
        """Work below the descriptor `root`, which is the caller's to close."""
        self._root = root
        self._made = made
        self._kept: dict[bytes, int] = {}  # the most recently used last

    def open(self, path: bytes) -> int:
        """Return the directory at `path`; raises OSError if there is none, or a symlink on the way."""
        if not path:
            return self._root
        fd = self._kept.pop(path, -1)
        if fd < 0:
            fd = openat2(self._root, os.fsdecode(path), os.O_RDONLY | os.O_DIRECTORY, _RULES)
            if len(self._kept) >= _MOST_OPEN:
                os.close(self._kept.pop(next(iter(self._kept))))
        self._kept[path] = fd
        return fd

    def at(self, path: bytes, *, make: bool = True, replace: bool = False) -> int:
        """Return the directory at `path`, made with those above it if need be.

        With `replace` anything else of that name goes. Raises ImageError when something on the way is no
        directory, OSError when there is none and `make` is false.
        """
        try:
            return self.open(path)
        except OSError as error:
            if not make or error.errno not in _NOT_THERE:
                raise
        home, _, name = path.rpartition(b"/")
        parent = self.at(home)
        whiteout = self._clear(parent, path, name, replace=replace)
        os.mkdir(name, 0o700, dir_fd=parent)
        fd = self.open(path)
        self._made(path, whiteout=whiteout)
        return fd

    def _clear(self, parent: int, path: bytes, name: bytes, *, replace: bool) -> bool:
        """Free the name, which no directory has; return whether a whiteout had it."""
        try:
            found = os.lstat(name, dir_fd=parent)
        except FileNotFoundError:
            return False
        whiteout = stat.S_ISCHR(found.st_mode)  # the only character devices in the tree
        if not replace and not whiteout:
            what = "symlink" if stat.S_ISLNK(found.st_mode) else "file"
            raise ImageError(f"its path goes through the {what} {shown(path)}")
        os.unlink(name, dir_fd=parent)
        return whiteout

    def forget(self, path: bytes) -> None:
        """Close the directory at `path` and those below it: another entry takes its place."""
        for kept in [kept for kept in self._kept if kept == path or kept.startswith(path + b"/")]:
            os.close(self._kept.pop(kept))

    def close(self) -> None:
        """Close them all."""
        while self._kept:
            os.close(self._kept.popitem()[1])


def remove_tree(parent: int, name: bytes) -> None:
    """Remove the directory `name` in `parent`, without following symlinks. Raises OSError."""
    fd = os.open(name, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=parent)
    try:
        with os.scandir(fd) as found:
            for item in found:
                if item.is_dir(follow_symlinks=False):
                    remove_tree(fd, os.fsencode(item.name))
                else:
                    os.unlink(item.name, dir_fd=fd)
    finally:
        os.close(fd)
    os.rmdir(name, dir_fd=parent)
