"""A directory tree as a tar that depends on nothing but the tree: the same files, the same bytes."""

import os
import stat
import tarfile

from ringfence.errors import ImageError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import IO

_KINDS = {stat.S_IFREG: tarfile.REGTYPE, stat.S_IFDIR: tarfile.DIRTYPE, stat.S_IFLNK: tarfile.SYMTYPE}
_KINDS[stat.S_IFIFO] = tarfile.FIFOTYPE
_MAX_ID = 65535  # the ids of a sandbox
_XATTR = "SCHILY.xattr."


def write_tree(root: str, out: "IO[bytes]", *, say: "Callable[[str], None]" = lambda _: None) -> int:
    """Write all below the directory `root`, in the order of the names, as a pax archive; return the count of entries.

    Owners, modes, times in seconds and hard links are kept, and of files user.* attributes and capabilities; devices
    and sockets are left out, and what is mounted in it is an empty directory. Symlinks are never followed: another
    user who changes the tree meanwhile can make this fail, but not make it read elsewhere.
    Raises ImageError, OSError.
    """
    count = 0
    with tarfile.open(fileobj=out, mode="w|", format=tarfile.PAX_FORMAT, bufsize=1 << 20) as tar:
        writer = _Writer(tar, os.stat(root).st_dev)
        for directory, names, files, descriptor in os.fwalk(root, follow_symlinks=False):
            below = os.path.relpath(directory, root)
            inside = "" if below == "." else f"{below}/"
            if not inside:
                writer.add("./", ".", descriptor)
            names.sort(key=os.fsencode)
            for name in sorted((*names, *files), key=os.fsencode):
                writer.add(inside + name, name, descriptor)
                count += 1
                if count % 20000 == 0:
                    say(f"{count} entries")
            names[:] = [name for name in names if _device(name, descriptor) == writer.device]
    return count


def _device(name: str, directory: int) -> int:
    try:
        return os.stat(name, dir_fd=directory, follow_symlinks=False).st_dev
    except FileNotFoundError:
        return -1


class _Writer:
    def __init__(self, tar: tarfile.TarFile, device: int) -> None:
        self.tar = tar
        self.device = device
        self._links: dict[tuple[int, int], str] = {}

    def add(self, path: str, name: str, directory: int) -> None:
        """Add the entry `name` of the open `directory` as `path`."""
        found = os.stat(name, dir_fd=directory, follow_symlinks=False)
        kind = _KINDS.get(stat.S_IFMT(found.st_mode))
        if kind is None:
            return
        info = tarfile.TarInfo(path)
        info.type, info.mode, info.mtime = kind, stat.S_IMODE(found.st_mode), int(found.st_mtime)
        info.uid, info.gid = _owner(found)
        if max(info.uid, info.gid) > _MAX_ID:
            raise ImageError(
                f"{path!r} belongs to {info.uid}:{info.gid}, and an image has ids up to {_MAX_ID}",
                hint="change its owner, or import a tar that was made inside the container",
            )
        key = (found.st_dev, found.st_ino)
        if kind == tarfile.SYMTYPE:
            info.linkname = os.readlink(name, dir_fd=directory)
        elif kind != tarfile.DIRTYPE and found.st_nlink > 1 and key in self._links:
            info.type, info.linkname = tarfile.LNKTYPE, self._links[key]
        elif kind == tarfile.REGTYPE:
            self._links[key] = path
            self._file(info, name, directory, key)
            return
        elif kind == tarfile.FIFOTYPE:
            self._links[key] = path
        self.tar.addfile(info)
        self.tar.getmembers().clear()  # tarfile keeps them all

    def _file(self, info: tarfile.TarInfo, name: str, directory: int, key: tuple[int, int]) -> None:
        descriptor = os.open(
            name, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC, dir_fd=directory
        )
        with open(descriptor, "rb", buffering=0) as file:
            now = os.fstat(descriptor)
            if (now.st_dev, now.st_ino) != key or not stat.S_ISREG(now.st_mode):
                raise ImageError(f"{info.name!r} was replaced while it was read", hint="import it again")
            info.size = now.st_size
            info.pax_headers = {_XATTR + name: value for name, value in _attributes(descriptor)}
            try:
                self.tar.addfile(info, file)
            except OSError as error:
                if error.errno is not None:
                    raise
                raise ImageError(f"{info.name!r} shrank while it was read", hint="import it again") from error
        self.tar.getmembers().clear()


def _owner(found: os.stat_result) -> tuple[int, int]:
    """Return the owner in the image: what a user has himself stands for root, as it does in his sandboxes."""
    uid, gid = os.geteuid(), os.getegid()
    if uid == 0:
        return found.st_uid, found.st_gid
    return (0 if found.st_uid == uid else found.st_uid), (0 if found.st_gid == gid else found.st_gid)


def _attributes(descriptor: int) -> list[tuple[str, str]]:
    """Return the attributes that a layer may hold, as text in which each byte of a value is one surrogate."""
    try:
        names = sorted(os.listxattr(descriptor))
    except OSError:  # a file system without any
        return []
    kept = [name for name in names if name.startswith("user.") or name == "security.capability"]
    return [(name, os.getxattr(descriptor, name).decode("utf-8", "surrogateescape")) for name in kept]
