"""Writes a layer's archive into a directory, in the form that overlayfs takes, and never outside of it.

Every directory on an entry's way is opened by the kernel under RESOLVE_BENEATH and RESOLVE_NO_SYMLINKS, and what
is made has a name that was free: nothing that the archive made before, be it symlink or hard link, leads a write
elsewhere. Directories get their owner, mode and time at the very end, from a file on the side, so that memory
does not grow with the archive.

What overlayfs wants: a whiteout ".wh.NAME" is a character device 0:0 called NAME, and ".wh..wh..opq" an
attribute of its directory. Both only hide what is in layers below, so NAME itself in the same layer stays.
Source: OCI image-spec, layer.md; Documentation/filesystems/overlayfs.rst in Linux.
"""

import errno
import os
import stat
import struct

from ringfence.errors import ImageError
from ringfence.image import tarstream
from ringfence.image.directories import Directories, remove_tree
from ringfence.image.tarstream import Entry, shown

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import IO

    from ringfence.image.blobs import BlobStream

_MOST_PATH = 4095  # PATH_MAX counts a NUL
_MOST_NAME = 255
_MOST_DEPTH = 256
_MOST_ID = 65535  # a sandbox has 65536 ids
_WHITEOUT = b".wh."
_WHITEOUT_META = b".wh..wh."
_OPAQUE = b".wh..wh..opq"
_NEW_FILE = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
_DIRECTORY_RECORD = struct.Struct(
    "=HIIIq"
)  # length of the path, mode, uid, gid, mtime in ns; the path follows
_WRITABLE_BY_ALL = 0o002
_WRITABLE_BY_GROUP = 0o020


class Extractor:
    """Writes entries below the directory `root`, a descriptor of a new and empty one that nobody else can reach.

    `later` is a new file for what is done at the end; `most_bytes` bounds the size of all files together and
    `most_entries` what is made, with the directories that the archive takes for granted. Unless `owners`, which
    takes root, all belongs to the caller and file capabilities are left out.

    entries     how many files, directories and whiteouts were made
    size_bytes  of all files
    root_only   whether nobody but root could change anything of it or gain anything by running it
    """

    def __init__(
        self, root: int, later: "IO[bytes]", *, most_bytes: int, most_entries: int, owners: bool
    ) -> None:
        """Prepare; `finish` must follow the last entry."""
        self.entries = 0
        self.size_bytes = 0
        self.root_only = True
        self._most_bytes = most_bytes
        self._most_entries = most_entries
        self._later = later
        self._owners = owners
        self._own = (os.geteuid(), os.getegid())
        self._directories = Directories(root, self._made)
        self._opaque = "trusted.overlay.opaque" if owners else "user.overlay.opaque"
        self._note(b"", 0o755, 0, 0, 0)

    def extract(self, entry: Entry, stream: "BlobStream") -> None:
        """Write one entry, with its content from `stream`. Raises ImageError, which names the entry."""
        try:
            self._extract(entry, stream)
        except ImageError as error:
            raise ImageError(f"entry {shown(entry.name)}: {error.message}", hint=error.hint) from None
        except OSError as error:
            if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EIO, errno.EMFILE):
                raise
            raise ImageError(f"entry {shown(entry.name)}: {error.strerror}") from error

    def finish(self) -> None:
        """Give every directory its owner, mode and time, and close what is open. Raises OSError."""
        self._later.flush()
        self._later.seek(0)
        while head := self._later.read(_DIRECTORY_RECORD.size):
            length, mode, uid, gid, mtime_ns = _DIRECTORY_RECORD.unpack(head)
            try:
                fd = self._directories.open(self._later.read(length))
            except OSError as error:
                if error.errno in (errno.ENOENT, errno.ENOTDIR, errno.ELOOP):
                    continue  # a later entry took its place
                raise
            if self._owners:
                os.fchown(fd, uid, gid)
            else:
                mode |= 0o700  # root in a sandbox would get into it; its owner here has to as well
            os.fchmod(fd, mode)
            os.utime(fd, ns=(mtime_ns, mtime_ns))
        self.close()

    def close(self) -> None:
        """Close what is open; again is no error."""
        self._directories.close()

    def _extract(self, entry: Entry, stream: "BlobStream") -> None:
        path = clean(entry.name)
        if _WHITEOUT in path and self._hide(path):
            self._count()
            return
        if not path:
            if entry.kind != tarstream.DIRECTORY:
                raise ImageError("the root must be a directory")
            self._describe(entry, path, self._directories.at(b""))
            return
        if entry.kind in (tarstream.CHARACTER, tarstream.BLOCK_DEVICE):
            # Every sandbox has a /dev of its own over this one; anywhere else a node has no good reason.
            if path.startswith(b"dev/"):
                return
            raise ImageError("it is a device node", hint="build the image without device nodes outside /dev")
        self._check_owner(entry)
        home, _, name = path.rpartition(b"/")
        parent = self._directories.at(home)
        if entry.kind == tarstream.DIRECTORY:
            self._describe(entry, path, self._directories.at(path, replace=True))
            return
        self._count()
        if entry.kind == tarstream.FILE:
            self._file(entry, parent, path, name, stream)
        elif entry.kind == tarstream.SYMLINK:
            self._symlink(entry, parent, path, name)
        elif entry.kind == tarstream.HARD_LINK:
            self._hard_link(entry, parent, path, name)
        else:
            self._free(parent, path, name)
            os.mkfifo(name, 0o600, dir_fd=parent)
            self._node(entry, parent, name)

    def _check_owner(self, entry: Entry) -> None:
        if entry.uid > _MOST_ID or entry.gid > _MOST_ID:
            raise ImageError(
                f"its owner {entry.uid}:{entry.gid} is none of the {_MOST_ID + 1} ids of a sandbox",
                hint="build the image with owners from 0 to 65535",
            )
        if entry.uid or (
            entry.kind != tarstream.SYMLINK
            and (entry.mode & _WRITABLE_BY_ALL or (entry.gid and entry.mode & _WRITABLE_BY_GROUP))
        ):
            self.root_only = False

    def _file(self, entry: Entry, parent: int, path: bytes, name: bytes, stream: "BlobStream") -> None:
        self.size_bytes += entry.size
        if self.size_bytes > self._most_bytes:
            raise ImageError(f"with it the files of the layer pass {self._most_bytes} bytes")
        # No set-uid and set-gid bits: the store must not hold a shell of root's, and a sandbox ignores them.
        mode = entry.mode & 0o1777
        try:
            fd = os.open(name, _NEW_FILE, 0o600, dir_fd=parent)
        except FileExistsError:
            self._free(parent, path, name)
            fd = os.open(name, _NEW_FILE, 0o600, dir_fd=parent)
        try:
            if entry.sparse is not None:
                os.ftruncate(fd, entry.size)
                for offset, length in entry.sparse.pairs:
                    os.lseek(fd, offset, os.SEEK_SET)
                    _copy(stream, fd, length)
            else:
                _copy(stream, fd, entry.stored)
            if self._owners and (entry.uid, entry.gid) != self._own:
                os.fchown(fd, entry.uid, entry.gid)
            if entry.xattrs:
                self._attributes(entry, fd)
            os.fchmod(fd, mode)
            os.utime(fd, ns=(entry.mtime_ns, entry.mtime_ns))
        finally:
            os.close(fd)

    def _symlink(self, entry: Entry, parent: int, path: bytes, name: bytes) -> None:
        if not 0 < len(entry.link) <= _MOST_PATH:
            raise ImageError("it is a symlink to nowhere or to a path that is too long")
        self._free(parent, path, name)
        os.symlink(entry.link, name, dir_fd=parent)
        self._node(entry, parent, name)

    def _node(self, entry: Entry, parent: int, name: bytes) -> None:
        """Set owner, mode and time of a new symlink or FIFO."""
        if self._owners:
            os.chown(name, entry.uid, entry.gid, dir_fd=parent, follow_symlinks=False)
        if entry.kind == tarstream.FIFO:
            os.chmod(name, entry.mode & 0o1777, dir_fd=parent)
        os.utime(name, ns=(entry.mtime_ns, entry.mtime_ns), dir_fd=parent, follow_symlinks=False)

    def _hard_link(self, entry: Entry, parent: int, path: bytes, name: bytes) -> None:
        try:
            target = clean(entry.link)
            home, _, target_name = target.rpartition(b"/")
            target_parent = self._directories.at(home, make=False)
            found = os.lstat(target_name or b".", dir_fd=target_parent)
        except (OSError, ImageError):
            raise ImageError(
                f"it is a hard link to {shown(entry.link)}, which the layer does not have"
            ) from None
        if stat.S_ISDIR(found.st_mode) or stat.S_ISCHR(found.st_mode):
            raise ImageError(f"it is a hard link to {shown(entry.link)}, which is no file")
        if target == path:
            return
        if target.startswith(path + b"/"):
            raise ImageError(f"it is a hard link to {shown(entry.link)}, which it replaces")
        self._free(parent, path, name)
        os.link(target_name, name, src_dir_fd=target_parent, dst_dir_fd=parent, follow_symlinks=False)

    def _hide(self, path: bytes) -> bool:
        """Carry out the whiteout that `path` is; False if it is none."""
        *above, last = path.split(b"/")
        if any(part.startswith(_WHITEOUT_META) for part in above):
            return True  # what AUFS kept for itself, in old images
        if any(part.startswith(_WHITEOUT) for part in above):
            raise ImageError("it lies in a whiteout")
        if not last.startswith(_WHITEOUT):
            return False
        home = b"/".join(above)
        if last == _OPAQUE:
            if not home:
                raise ImageError("it hides all layers below at their root, which is not supported")
            os.setxattr(self._directories.at(home), self._opaque, b"y")
        elif not last.startswith(_WHITEOUT_META):
            self._white_out(home, last[len(_WHITEOUT) :])
        return True

    def _white_out(self, home: bytes, name: bytes) -> None:
        if name in (b"", b".", b".."):
            raise ImageError("it is a whiteout of nothing that has a name")
        parent = self._directories.at(home)
        try:
            os.mknod(name, stat.S_IFCHR, os.makedev(0, 0), dir_fd=parent)
        except FileExistsError:
            if stat.S_ISDIR(os.lstat(name, dir_fd=parent).st_mode):
                os.setxattr(self._directories.at(home + b"/" + name if home else name), self._opaque, b"y")

    def _free(self, parent: int, path: bytes, name: bytes) -> None:
        """Remove what has the name, if anything."""
        try:
            found = os.lstat(name, dir_fd=parent)
        except FileNotFoundError:
            return
        if stat.S_ISDIR(found.st_mode):
            self._directories.forget(path)
            remove_tree(parent, name)
        else:
            os.unlink(name, dir_fd=parent)

    def _made(self, path: bytes, *, whiteout: bool) -> None:
        """Note a directory that no entry describes, or none yet: root's, and as old as can be."""
        self._count()
        if whiteout:
            os.setxattr(self._directories.at(path), self._opaque, b"y")
        self._note(path, 0o755, 0, 0, 0)

    def _count(self) -> None:
        self.entries += 1
        if self.entries > self._most_entries:
            raise ImageError(f"with it the layer has more than {self._most_entries} files and directories")

    def _describe(self, entry: Entry, path: bytes, fd: int) -> None:
        self._check_owner(entry)
        if entry.xattrs:
            self._attributes(entry, fd)
        self._note(path, entry.mode, entry.uid, entry.gid, entry.mtime_ns)

    def _note(self, path: bytes, mode: int, uid: int, gid: int, mtime_ns: int) -> None:
        self._later.write(_DIRECTORY_RECORD.pack(len(path), mode, uid, gid, mtime_ns) + path)

    def _attributes(self, entry: Entry, fd: int) -> None:
        """Set the extended attributes that a layer may bring; no others, above all none that overlayfs reads."""
        for name, value in entry.xattrs.items():
            if name == b"security.capability":
                if not self._owners or entry.kind != tarstream.FILE:
                    continue
                self.root_only = False
            elif not name.startswith(b"user.") or name.startswith(b"user.overlay."):
                continue
            if b"\0" in name:
                raise ImageError("the name of an extended attribute has a NUL byte")
            try:
                os.setxattr(fd, name, value)
            except OSError as error:
                if error.errno == errno.ENOTSUP:  # as on a tmpfs; all that is lost is a note or a right
                    continue
                raise ImageError(f"cannot set its attribute {shown(name)}: {error.strerror}") from error


def clean(name: bytes) -> bytes:
    """Return the path that an archive means by `name`: relative, without empty parts and "."; b"" is the root.

    Raises ImageError for "..", and for what is too long or too deep.
    """
    parts = [part for part in name.split(b"/") if part not in (b"", b".")]
    if not name or b".." in parts:
        raise ImageError("its path leaves the image or is empty")
    path = b"/".join(parts)
    if len(path) > _MOST_PATH or len(parts) > _MOST_DEPTH or (len(path) > _MOST_NAME and _long(parts)):
        raise ImageError(
            f"its path is longer than {_MOST_PATH} bytes, {_MOST_NAME} a name, or {_MOST_DEPTH} deep"
        )
    return path


def _long(parts: list[bytes]) -> bool:
    return max(map(len, parts)) > _MOST_NAME


def _copy(stream: "BlobStream", fd: int, size: int) -> None:
    while size:
        piece = stream.take(size)
        if not piece:
            raise ImageError("the archive ends in the middle of it")
        size -= len(piece)
        while piece:
            piece = piece[os.write(fd, piece) :]
