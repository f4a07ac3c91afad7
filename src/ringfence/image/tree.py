"""Writes a fresh directory tree and works out its digest on the way.

Only for trees that nobody else can write to while they grow. Every name is new and lies in a directory that
this writer made itself, so no symlink can lead a write elsewhere: what is not so is refused.
"""

import hashlib
import os

from ringfence.errors import ImageError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import IO

_CHUNK = 1 << 20


class TreeWriter:
    """A tree below the new directory `root`; paths are relative ("usr/bin"), owners in the image are root.

    The digest covers, for each entry in order of its path: path, type, mode, owner, and size and content of a
    file or the target of a symlink, but no times and inodes: the same content has the same digest everywhere.
    """

    def __init__(self, root: str) -> None:
        """Create the directory `root`, which must not exist; raises OSError."""
        os.mkdir(root, 0o755)
        self._root = root
        self._directories: dict[str, int] = {"": 0o755}
        self._contents: dict[str, tuple[int, str]] = {}  # of files: size and SHA-256
        self._lines: dict[str, bytes] = {"": _line("", "d", 0o755, 0, "")}
        self.size_bytes = 0

    def directory(self, path: str, mode: int) -> None:
        """Make a directory, with those above it; one that is there already only gets the new mode."""
        if path not in self._directories:
            parent = os.path.dirname(path)
            if parent not in self._directories:
                self.directory(parent, 0o755)
            os.mkdir(self._new(path), 0o700)
        self._directories[path] = mode
        self._lines[path] = _line(path, "d", mode, 0, "")

    def file(self, path: str, mode: int, content: "IO[bytes]") -> None:
        """Write a regular file from what `content` still holds."""
        target = os.open(
            self._new(path), os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600
        )
        digest, size = hashlib.sha256(), 0
        with open(target, "wb", buffering=0) as out:
            while chunk := content.read(_CHUNK):
                out.write(chunk)
                digest.update(chunk)
                size += len(chunk)
            os.fchmod(target, mode)
        self.size_bytes += size
        self._contents[path] = (size, digest.hexdigest())
        self._lines[path] = _line(path, "f", mode, size, digest.hexdigest())

    def symlink(self, path: str, target: str) -> None:
        """Make a symlink; its target is only text here."""
        os.symlink(target, self._new(path))
        self._lines[path] = _line(path, "l", 0o777, len(os.fsencode(target)), target)

    def hard_link(self, path: str, target: str) -> None:
        """Give the file `target` of this tree a second name."""
        if target not in self._contents:
            raise ImageError(f"hard link {path!r} to {target!r}, which is no file of the image")
        full = os.path.join(self._root, target)
        os.link(full, self._new(path), follow_symlinks=False)
        self._contents[path] = self._contents[target]
        mode = os.lstat(full).st_mode & 0o7777
        self._lines[path] = _line(path, "f", mode, *self._contents[target])

    def finish(self) -> str:
        """Give the directories their modes and return the digest, "sha256:" and 64 digits."""
        for path, mode in sorted(self._directories.items(), reverse=True):
            os.chmod(os.path.join(self._root, path), mode)
        ordered = sorted(self._lines.items(), key=lambda item: os.fsencode(item[0]))
        return "sha256:" + hashlib.sha256(b"".join(line for _, line in ordered)).hexdigest()

    def _new(self, path: str) -> str:
        """Return the full path for the new entry `path`; refuse one that is taken or not in our tree."""
        if path in self._lines:
            raise ImageError(f"{path!r} is in the image twice")
        if any(part in ("", ".", "..") for part in path.split("/")) or "\0" in path:
            raise ImageError(f"{path!r} is no path inside an image")
        if os.path.dirname(path) not in self._directories:
            raise ImageError(f"{path!r} of the image lies in no directory of it")
        return os.path.join(self._root, path)


def _line(path: str, kind: str, mode: int, size: int, content: str) -> bytes:
    # NUL cannot stand in a path or a target, so no two trees give the same lines.
    return os.fsencode("\0".join((path, kind, f"{mode:o}", "0:0", str(size), content)) + "\0\n")
