"""Makes files of the host's from what comes out of a sandbox, and never outside of the place that the caller named.

Every directory on an entry's way is opened by the kernel under RESOLVE_BENEATH and RESOLVE_NO_SYMLINKS. A file or
symlink is made under another name and renamed, so that nobody sees half of it, and nothing is written through what had
the name.
Everything belongs to the caller; no set-uid, set-gid or sticky bit is kept.
"""

from __future__ import annotations

import errno
import os
import stat
from contextlib import suppress

from ringfence.errors import ImageError, SandboxError
from ringfence.image import tarstream
from ringfence.image.directories import Directories
from ringfence.image.tarstream import shown

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

    from ringfence.image.tarstream import Entry
    from ringfence.sandbox.packing import Stream

_DIRECTORY = os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC
_NEW_FILE = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
_WHY = {
    errno.ENOENT: "its directory is not there",
    errno.ENOTDIR: "its path goes through a file",
    errno.ELOOP: "its path goes through a symlink",
    errno.EXDEV: "its path leads out",
}


def destination(path: str, name: bytes) -> Tree:
    """Return where to copy to, as docker has it; the caller closes it.

    In a directory what is copied is called `name`; with an empty `name` its content goes into the directory itself.
    What is no directory gets another content, what is not there is made; with a slash at its end it has to be, or
    become, a directory. Raises SandboxError.
    """
    try:
        found = os.stat(path).st_mode
    except FileNotFoundError:
        found = 0
    except OSError as error:
        raise SandboxError(f"cannot copy to {path!r}: {error.strerror}") from error
    if found and not stat.S_ISREG(found) and not stat.S_ISDIR(found):
        raise SandboxError(
            f"{path!r} is neither a file nor a directory", hint="'-' writes an archive to standard output"
        )
    only_directory = path.endswith("/")
    if stat.S_ISDIR(found):
        return Tree(_opened(path), name)
    home, _, last = path.rstrip("/").rpartition("/")
    if last in ("", ".", ".."):
        raise SandboxError(f"there is no directory {path!r}")
    return Tree(
        _opened(home or ("/" if path.startswith("/") else ".")),
        os.fsencode(last),
        only_directory=only_directory,
    )


def _opened(path: str) -> int:
    try:
        return os.open(path, _DIRECTORY)
    except OSError as error:
        raise SandboxError(f"cannot copy into the directory {path!r}: {error.strerror}") from error


class Tree:
    """What is copied, on the host: `name` in the directory `parent`, or with an empty name the directory itself."""

    def __init__(self, parent: int, name: bytes, *, only_directory: bool = False) -> None:
        """Own the descriptor `parent`; nothing is made yet."""
        self._parent = parent
        self._name = name
        self._only_directory = only_directory
        self._top: Directories | None = None
        self._top_fd = -1
        self._left_later: list[tuple[bytes, int, int]] = []  # directories: path, mode, mtime_ns

    def add(self, path: bytes, entry: Entry, stream: Stream) -> None:
        """Make one judged entry. Raises ImageError, SandboxError."""
        try:
            self._leave(path)
            if not path:
                self._make_top(entry, stream)
            elif self._top is None:
                raise ImageError(f"entry {shown(entry.name)} is below what is no directory")
            else:
                home, _, name = path.rpartition(b"/")
                self._make(self._top.open(home), name, path, entry, stream)
        except OSError as error:
            reason = _WHY.get(error.errno or 0, error.strerror or "")
            raise SandboxError(f"cannot make {shown(path or self._name)}: {reason}") from error

    def finish(self) -> None:
        """Give the last directories their modes and times. Raises SandboxError."""
        try:
            while self._left_later:
                self._leave_one()
        except OSError as error:
            raise SandboxError(f"cannot finish a directory: {error.strerror}") from error

    def close(self) -> None:
        """Close what is open. What was made stays."""
        if self._top is not None:
            self._top.close()
        for fd in (self._parent, self._top_fd):
            if fd >= 0:
                os.close(fd)
        self._parent = self._top_fd = -1
        self._top = None

    def _make_top(self, entry: Entry, stream: Stream) -> None:
        if entry.kind != tarstream.DIRECTORY:
            if self._only_directory or not self._name:
                raise SandboxError(
                    f"{shown(self._name or entry.name)} is to be a directory, and what is copied is none"
                )
            self._make(self._parent, self._name, b"", entry, stream)
            return
        if not self._name:
            self._top_fd = os.open(".", _DIRECTORY, dir_fd=self._parent)
        else:
            self._make(self._parent, self._name, b"", entry, stream)
            self._top_fd = os.open(self._name, _DIRECTORY | os.O_NOFOLLOW, dir_fd=self._parent)
        self._top = Directories(self._top_fd, _never)

    def _make(self, parent: int, name: bytes, path: bytes, entry: Entry, stream: Stream) -> None:
        if entry.kind != tarstream.DIRECTORY:
            _check_replaceable(parent, name, path or name)
            _replace(parent, name, lambda temporary: _make_one(parent, temporary, entry, stream))
            return
        try:
            os.mkdir(name, 0o700, dir_fd=parent)
        except FileExistsError:
            if not stat.S_ISDIR(os.lstat(name, dir_fd=parent).st_mode):
                raise SandboxError(f"{shown(path or name)} is in the way: it is no directory") from None
        else:
            self._left_later.append((path, entry.mode & 0o777, entry.mtime_ns))

    def _leave(self, path: bytes) -> None:
        """Be done with the directories that `path` is not in: an archive that comes back to one may not be able to."""
        while self._left_later:
            last = self._left_later[-1][0]
            if not last or path == last or path.startswith(last + b"/"):
                return
            self._leave_one()

    def _leave_one(self) -> None:
        path, mode, mtime_ns = self._left_later.pop()
        if self._top is not None:
            fd = self._top.open(path)
            os.fchmod(fd, mode)
            os.utime(fd, ns=(mtime_ns, mtime_ns))


def _never(path: bytes, *, whiteout: bool) -> None:
    raise AssertionError((path, whiteout))  # directories are made by us, never on the way


def _check_replaceable(parent: int, name: bytes, path: bytes) -> None:
    try:
        found = os.lstat(name, dir_fd=parent).st_mode
    except FileNotFoundError:
        return
    if not stat.S_ISREG(found) and not stat.S_ISLNK(found):
        what = "a directory" if stat.S_ISDIR(found) else "no file"
        raise SandboxError(f"{shown(path)} is in the way: it is {what}")


def _replace(parent: int, name: bytes, make: Callable[[bytes], None]) -> None:
    temporary = b".ringfence-" + os.urandom(8).hex().encode()
    try:
        make(temporary)
        os.rename(temporary, name, src_dir_fd=parent, dst_dir_fd=parent)
    except BaseException:
        with suppress(OSError):
            os.unlink(temporary, dir_fd=parent)
        raise


def _make_one(parent: int, name: bytes, entry: Entry, stream: Stream) -> None:
    times = (entry.mtime_ns, entry.mtime_ns)
    if entry.kind == tarstream.SYMLINK:
        os.symlink(entry.link, name, dir_fd=parent)
        os.utime(name, ns=times, dir_fd=parent, follow_symlinks=False)
        return
    fd = os.open(name, _NEW_FILE, 0o600, dir_fd=parent)
    try:
        left = entry.stored
        while left:
            piece = stream.take(left)
            if not piece:
                raise ImageError(f"entry {shown(entry.name)}: the archive ends in the middle of it")
            left -= len(piece)
            while piece:
                piece = piece[os.write(fd, piece) :]
        os.fchmod(fd, entry.mode & 0o777)
        os.utime(fd, ns=times)
    finally:
        os.close(fd)
