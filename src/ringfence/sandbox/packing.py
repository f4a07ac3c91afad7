"""Archives between the host and a sandbox: how one is read, written, and made of files of the host's.

Their form is that of agent/pack.h: "." is what is copied, "./NAME" is below it. Nothing is believed of one that comes
out of a sandbox; `judged` is what everything passes through.
"""

from __future__ import annotations

import errno
import os
import stat
import tarfile

from ringfence.errors import ImageError, SandboxError
from ringfence.image import tarstream
from ringfence.image.archive import clean
from ringfence.image.limits import Limits
from ringfence.image.tarstream import entries, shown

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from typing import Protocol

    from ringfence.image.tarstream import Entry

    class Target(Protocol):
        """What takes judged entries: files of the host's, or another archive."""

        def add(self, path: bytes, entry: Entry, stream: Stream) -> None:
            """Take one; its content is `entry.stored` bytes of `stream`."""

        def finish(self) -> None:
            """Nothing more comes."""


MOST_ENTRIES = 1_000_000
_MOST_HEADER_BYTES = 1 << 16
_MOST_LINK = 4095
_MOST_PATH = 4000  # what agent/pack.c takes, with some room
_MOST_DEPTH = 250
_PIECE = 1 << 18
_LOOK = os.O_RDONLY | os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC
_TAKEN = {tarstream.FILE, tarstream.DIRECTORY, tarstream.SYMLINK}


class Stream:
    """Bytes from a source that returns b"" at its end, counted, and no more than a bound of them."""

    __slots__ = ("_held", "_most", "_source", "ended", "position")

    def __init__(self, source: Callable[[int], bytes], most_bytes: int | None) -> None:
        """Read from `source`; more than `most_bytes` are an error."""
        self._source = source
        self._most = most_bytes
        self._held = memoryview(b"")
        self.position = 0
        self.ended = False

    def take(self, size: int) -> memoryview:
        """Return the next bytes, `size` at the most; none at the end. Raises SandboxError beyond the bound."""
        if not self._held:
            self._held = memoryview(self._source(_PIECE))
            self.ended = not self._held
        piece, self._held = self._held[:size], self._held[size:]
        self.position += len(piece)
        if self._most is not None and self.position > self._most:
            raise SandboxError(
                f"more than {self._most} bytes come out of the sandbox", hint="allow more with --max-size"
            )
        return piece

    def read(self, size: int) -> bytes:
        """Return the next `size` bytes, fewer at the end. Raises SandboxError beyond the bound."""
        parts = []
        while size and (piece := self.take(size)):
            parts.append(bytes(piece))
            size -= len(piece)
        return b"".join(parts)

    def skip(self, size: int) -> None:
        """Let `size` bytes pass. Raises ImageError at the end, SandboxError beyond the bound."""
        while size:
            passed = len(self.take(size))
            if not passed:
                raise ImageError("the archive ends in the middle of an entry")
            size -= passed


def judged(
    stream: Stream, *, rooted: bool, left_out: Callable[[bytes, str], None]
) -> Iterator[tuple[bytes, Entry]]:
    """Yield what may be copied of an archive, with its clean path; b"" is what is copied itself.

    With `rooted` it comes out of a sandbox: "." is its first entry and only there, links to other files are not
    taken, and of symlinks only those that cannot lead out of it. Otherwise it is the caller's own, goes into a sandbox,
    and has no entry for "." itself. Other kinds than files, directories and links are told to `left_out`.
    Raises SandboxError, ImageError.
    """
    bounds = Limits(entries=MOST_ENTRIES + 1, header_bytes=_MOST_HEADER_BYTES)
    for count, entry in enumerate(entries(stream, bounds), 1):
        path = clean(entry.name)
        if count > MOST_ENTRIES:
            raise SandboxError(f"more than {MOST_ENTRIES} files are copied", hint="copy them in parts")
        if rooted and (count == 1) != (not path):
            raise ImageError(f"entry {shown(entry.name)} is not where it belongs")
        if entry.sparse is not None:
            raise ImageError(
                f"entry {shown(entry.name)} is a file with holes", hint="write it without --sparse"
            )
        reason = _objection(path, entry, rooted=rooted)
        if reason and rooted and not path:
            raise SandboxError(
                f"what is to be copied {reason}",
                hint="-L follows it" if entry.kind == tarstream.SYMLINK else "copy a file or a directory",
            )
        if reason:
            left_out(path, reason)
        elif rooted or path:
            yield path, entry


def _objection(path: bytes, entry: Entry, *, rooted: bool) -> str:
    if entry.kind == tarstream.HARD_LINK and not rooted:
        return ""
    if entry.kind not in _TAKEN:
        return "is no file, directory or symlink"
    if rooted and entry.kind == tarstream.SYMLINK and (not path or leads_out(entry.link, path.count(b"/"))):
        return f"is a symlink to {shown(entry.link)}, which leads out"
    return ""


def leads_out(link: bytes, depth: int) -> bool:
    """Say whether a symlink `depth` directories below what is copied could lead out of it.

    ".." counts only at the beginning, where it climbs from a real directory: behind a name it could climb from
    wherever another symlink leads to.
    """
    parts = [part for part in link.split(b"/") if part not in (b"", b".")]
    climbs = next((place for place, part in enumerate(parts) if part != b".."), len(parts))
    too_long = len(link) > _MOST_LINK or not link
    return too_long or link.startswith(b"/") or climbs > depth or b".." in parts[climbs:]


class Archive:
    """Writes an archive in which what is copied is called `top`."""

    def __init__(self, write: Callable[[bytes | memoryview], None], top: bytes) -> None:
        """Write with `write`, which writes all that it is given."""
        self._write = write
        self._top = top

    def add(self, path: bytes, entry: Entry, stream: Stream) -> None:
        """Write an entry with its content. Raises ImageError when that is cut off."""
        link = self._named(clean(entry.link)) if entry.kind == tarstream.HARD_LINK else entry.link
        self.head(path, entry.kind, entry.mode, entry.mtime_ns, size=entry.size, link=link)
        left = entry.stored
        while left:
            piece = stream.take(left)
            if not piece:
                raise ImageError(f"entry {shown(entry.name)}: the archive ends in the middle of it")
            self.content(piece)
            left -= len(piece)
        self.pad(entry.size)

    def head(
        self, path: bytes, kind: bytes, mode: int, mtime_ns: int, *, size: int = 0, link: bytes = b""
    ) -> None:
        """Write what comes before the content of an entry."""
        info = tarfile.TarInfo(os.fsdecode(self._named(path)))
        info.type, info.mode, info.size = kind, mode & 0o777, size
        info.mtime, info.linkname = max(0, mtime_ns // 1_000_000_000), os.fsdecode(link)
        self._write(info.tobuf(tarfile.PAX_FORMAT, "utf-8", "surrogateescape"))

    def content(self, piece: bytes | memoryview) -> None:
        """Write some of an entry's content."""
        self._write(piece)

    def pad(self, size: int) -> None:
        """Fill the last block of a content of `size` bytes."""
        self._write(bytes(-size % tarstream.BLOCK))

    def finish(self) -> None:
        """Write the end."""
        self._write(bytes(2 * tarstream.BLOCK))

    def _named(self, path: bytes) -> bytes:
        return self._top + b"/" + path if path else self._top


def pack(path: str, archive: Archive, *, follow: bool, left_out: Callable[[bytes, str], None]) -> None:
    """Write `path` and all below it; no symlink but, with `follow`, `path` itself is followed.

    What cannot be read, or is no file, directory or symlink, is told to `left_out`. Raises SandboxError.
    """
    try:
        found = os.stat(path, follow_symlinks=follow)
    except OSError as error:
        raise SandboxError(f"cannot read {path!r}: {error.strerror}") from error
    packer = _Packer(archive, left_out)
    packer.one(b"", os.fsencode(path), None, found, 0 if follow else os.O_NOFOLLOW)
    archive.finish()


class _Packer:
    def __init__(self, archive: Archive, left_out: Callable[[bytes, str], None]) -> None:
        self._archive = archive
        self._left_out = left_out

    def one(
        self, path: bytes, name: bytes, parent: int | None, found: os.stat_result, no_follow: int
    ) -> None:
        kind = stat.S_IFMT(found.st_mode)
        if len(path) > _MOST_PATH or path.count(b"/") > _MOST_DEPTH:
            self._left_out(path, "is too deep")
            return
        try:
            if kind == stat.S_IFREG:
                self._file(path, name, parent, no_follow)
            elif kind == stat.S_IFDIR:
                self._directory(path, name, parent, no_follow)
            elif kind == stat.S_IFLNK:
                target = os.readlink(name, dir_fd=parent)
                self._archive.head(path, tarstream.SYMLINK, 0o777, found.st_mtime_ns, link=target)
            else:
                self._left_out(path, "is no file, directory or symlink")
        except OSError as error:
            if error.errno not in (errno.EACCES, errno.EPERM, errno.ENOENT, errno.ELOOP, errno.ENOTDIR):
                raise
            self._left_out(path, error.strerror or "cannot be read")

    def _file(self, path: bytes, name: bytes, parent: int | None, no_follow: int) -> None:
        fd = os.open(name, _LOOK | no_follow, dir_fd=parent)
        try:
            found = os.fstat(fd)
            if not stat.S_ISREG(found.st_mode):
                self._left_out(path, "was replaced meanwhile")
                return
            size = left = found.st_size
            self._archive.head(path, tarstream.FILE, found.st_mode, found.st_mtime_ns, size=size)
            while left:
                piece = os.read(fd, min(left, _PIECE))
                if not piece:
                    raise SandboxError(f"{shown(name)} shrank while it was read", hint="copy it again")
                self._archive.content(piece)
                left -= len(piece)
            self._archive.pad(size)
        finally:
            os.close(fd)

    def _directory(self, path: bytes, name: bytes, parent: int | None, no_follow: int) -> None:
        fd = os.open(name, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC | no_follow, dir_fd=parent)
        try:
            found = os.fstat(fd)
            self._archive.head(path, tarstream.DIRECTORY, found.st_mode, found.st_mtime_ns)
            for below in sorted(map(os.fsencode, os.listdir(fd))):
                below_path = path + b"/" + below if path else below
                try:
                    status = os.lstat(below, dir_fd=fd)
                except FileNotFoundError:
                    continue
                self.one(below_path, below, fd, status, os.O_NOFOLLOW)
        finally:
            os.close(fd)
