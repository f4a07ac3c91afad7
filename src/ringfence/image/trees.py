"""Whole directory trees of ours: removed, and measured, without following a symlink."""

import os
import re
import shutil

from ringfence.errors import ImageError


def remove_tree(path: str) -> None:
    """Remove a file, a symlink or a whole directory, if it is there; raises OSError.

    Raises ImageError when anything is mounted in it: that belongs to somebody else, and would be emptied.
    """
    is_tree = os.path.isdir(path) and not os.path.islink(path)
    mounted = mount_points(os.path.realpath(path)) if is_tree else []
    if mounted:
        raise ImageError(f"cannot remove {path}: {mounted[0]} is mounted", hint="unmount it, then try again")
    if is_tree:
        if os.geteuid() != 0:
            _make_writable(path)
        shutil.rmtree(path)
    elif os.path.lexists(path):
        os.unlink(path)


def _make_writable(path: str) -> None:
    """Let the owner, who is not root, remove what lies in directories of an image that nobody may write to."""
    os.chmod(path, 0o700)
    for directory, names, _ in os.walk(path):
        for name in names:
            below = os.path.join(directory, name)
            if not os.path.islink(below):
                os.chmod(below, 0o700)


def mount_points(directory: str) -> list[str]:
    """Return the mount points at and below the real path `directory` in this process's mount namespace."""
    with open("/proc/self/mountinfo", "rb") as table:
        # The kernel writes space, tab, newline and backslash as octal escapes: proc_pid_mountinfo(5).
        found = [re.sub(rb"\\([0-7]{3})", _unescape, line.split(b" ")[4]) for line in table]
    inside = os.fsencode(directory.rstrip("/")) + b"/"
    return [os.fsdecode(path) for path in found if (path + b"/").startswith(inside)]


def _unescape(match: "re.Match[bytes]") -> bytes:
    return bytes([int(match[1], 8)])


def size_bytes(path: str) -> int:
    """Return the bytes that a file or a tree takes on the disk; what vanishes meanwhile counts nothing."""
    total = os.lstat(path).st_blocks * 512
    for directory, names, files in os.walk(path):
        for name in (*names, *files):
            try:
                found = os.lstat(os.path.join(directory, name))
            except FileNotFoundError:
                continue
            total += (
                found.st_blocks * 512 // max(found.st_nlink, 1) if name in files else found.st_blocks * 512
            )
    return total
