"""What goes into the image `base`: a bootstrapped Debian as a tar stream, cut down to what a job can use."""

import os
import tarfile
from io import BytesIO

from ringfence.errors import ImageError
from ringfence.image.skeleton import MOUNT_POINTS, account_files, name_files
from ringfence.image.tree import TreeWriter

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import IO

# Content that no job reads, or that names the build host: its apt sources may even hold credentials.
_LEFT_OUT = (
    "boot",
    "dev",
    "etc/apt",
    "etc/group-",
    "etc/gshadow",
    "etc/gshadow-",
    "etc/machine-id",
    "etc/passwd-",
    "etc/.pwd.lock",
    "etc/shadow",
    "etc/shadow-",
    "proc",
    "root",
    "run",
    "sys",
    "tmp",
    "usr/share/bash-completion",
    "usr/share/doc",
    "usr/share/info",
    "usr/share/lintian",
    "usr/share/locale",
    "usr/share/man",
    "var/cache",
    "var/lib/apt",
    "var/log",
    "var/tmp",
)
_EMPTY = (*MOUNT_POINTS, "boot", "root", "var/cache", "var/log", "var/tmp")


def write_base(stream: "IO[bytes]", root: str) -> tuple[str, int]:
    """Unpack the tar `stream` into the new directory `root`; return digest and size in bytes of the tree.

    Owners become root and nothing stays writable for others; set-uid and set-gid bits, extended attributes
    and devices go. Raises ImageError for a stream that is no such archive, OSError when the disk is full.
    """
    tree = TreeWriter(root)
    own = account_files() | name_files() | {"etc/machine-id": b""}
    try:
        with tarfile.open(fileobj=stream, mode="r|") as archive:
            for member in archive:
                path = "/".join(part for part in member.name.split("/") if part not in ("", "."))
                if path and path not in own and not _left_out(path):
                    _write(tree, archive, member, path)
    except tarfile.TarError as error:
        raise ImageError(f"the bootstrapped archive is broken: {error}") from error
    for path in _EMPTY:
        tree.directory(path, 0o755)
    for path, content in own.items():
        tree.directory(os.path.dirname(path), 0o755)
        tree.file(path, 0o644, BytesIO(content))
    return tree.finish(), tree.size_bytes


def _left_out(path: str) -> bool:
    return any(path == name or path.startswith(f"{name}/") for name in _LEFT_OUT)


def _write(tree: TreeWriter, archive: tarfile.TarFile, member: tarfile.TarInfo, path: str) -> None:
    mode = member.mode & 0o755
    if member.isdir():
        tree.directory(path, mode)
    elif member.issym():
        tree.symlink(path, member.linkname)
    elif member.islnk():
        tree.hard_link(path, member.linkname.removeprefix("./"))
    elif member.isreg() and (content := archive.extractfile(member)) is not None:
        tree.file(path, mode, content)
    elif not (member.ischr() or member.isblk() or member.isfifo()):
        raise ImageError(f"{path!r} of the bootstrapped archive is of an unknown type {member.type!r}")
