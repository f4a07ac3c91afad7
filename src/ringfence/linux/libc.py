"""System calls that Python does not offer, one thin wrapper each; nothing else here imports ctypes.

Every function raises OSError with the name of the call or the path it was about.
"""

import ctypes
import os

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import NoReturn

_libc = ctypes.CDLL(None, use_errno=True)
_libc.mount.argtypes = (
    ctypes.c_char_p,
    ctypes.c_char_p,
    ctypes.c_char_p,
    ctypes.c_ulong,
    ctypes.c_char_p,
)
_libc.umount2.argtypes = (ctypes.c_char_p, ctypes.c_int)
_libc.unshare.argtypes = (ctypes.c_int,)
_libc.setns.argtypes = (ctypes.c_int, ctypes.c_int)
_libc.syscall.restype = ctypes.c_long

# linux/mount.h
MS_RDONLY = 1
MS_NOSUID = 2
MS_NODEV = 4
MS_NOEXEC = 8
MS_REC = 16384
MS_PRIVATE = 1 << 18
MNT_DETACH = 2
OPEN_TREE_CLONE = 1
MOVE_MOUNT_F_EMPTY_PATH = 0x04
MOVE_MOUNT_T_EMPTY_PATH = 0x40
MOUNT_ATTR_RDONLY = 0x1
MOUNT_ATTR_NOSUID = 0x2
MOUNT_ATTR_NODEV = 0x4
MOUNT_ATTR_NOEXEC = 0x8
MOUNT_ATTR_IDMAP = 0x100000
# linux/sched.h
CLONE_NEWNS = 0x20000
CLONE_NEWUTS = 0x4000000
CLONE_NEWIPC = 0x8000000
CLONE_NEWUSER = 0x10000000
CLONE_NEWNET = 0x40000000
# linux/openat2.h
RESOLVE_NO_MAGICLINKS = 0x02
RESOLVE_NO_SYMLINKS = 0x04
RESOLVE_BENEATH = 0x08
RESOLVE_IN_ROOT = 0x10

_AT_EMPTY_PATH = 0x1000
# The same numbers on every architecture: asm-generic/unistd.h since Linux 5.1.
_SYS_OPEN_TREE = 428
_SYS_MOVE_MOUNT = 429
_SYS_OPENAT2 = 437
_SYS_MOUNT_SETATTR = 442


class _MountAttr(ctypes.Structure):
    """struct mount_attr of mount_setattr(2)."""

    _fields_ = (
        ("attr_set", ctypes.c_uint64),
        ("attr_clr", ctypes.c_uint64),
        ("propagation", ctypes.c_uint64),
        ("userns_fd", ctypes.c_uint64),
    )


class _OpenHow(ctypes.Structure):
    """struct open_how of openat2(2)."""

    _fields_ = (("flags", ctypes.c_uint64), ("mode", ctypes.c_uint64), ("resolve", ctypes.c_uint64))


def _raise(what: str) -> "NoReturn":
    number = ctypes.get_errno()
    raise OSError(number, os.strerror(number), what)


def _check(result: int, what: str) -> int:
    if result < 0:
        _raise(what)
    return result


def mount(source: str, target: str, kind: str, flags: int, data: str = "") -> None:
    """Mount a file system of type `kind` at `target`; see mount(2)."""
    _check(
        _libc.mount(
            os.fsencode(source), os.fsencode(target), kind.encode(), flags, os.fsencode(data) or None
        ),
        target,
    )


def make_private(target: str) -> None:
    """Stop mounts below `target` from propagating in or out: mount_namespaces(7), SHARED SUBTREES."""
    _check(_libc.mount(None, os.fsencode(target), None, MS_REC | MS_PRIVATE, None), target)


def detach(target: str) -> None:
    """Unmount `target` lazily (MNT_DETACH)."""
    _check(_libc.umount2(os.fsencode(target), MNT_DETACH), target)


def unshare(flags: int) -> None:
    """Move the calling *thread* into new namespaces; see unshare(2)."""
    _check(_libc.unshare(flags), "unshare")


def setns(fd: int, flags: int) -> None:
    """Move the calling *thread* into the namespaces `flags` of pidfd or namespace descriptor `fd`."""
    _check(_libc.setns(fd, flags), "setns")


def clone_tree(fd: int, path: str) -> int:
    """Return a descriptor of a detached copy of the mount at `path` below directory `fd`, without submounts.

    An empty `path` means what `fd` itself refers to. See open_tree(2).
    """
    flags = OPEN_TREE_CLONE | os.O_CLOEXEC | (0 if path else _AT_EMPTY_PATH)
    return _check(
        _libc.syscall(_SYS_OPEN_TREE, fd, ctypes.c_char_p(os.fsencode(path)), flags), path or "open_tree"
    )


def set_mount_attributes(tree: int, attributes: int, userns: int = -1) -> None:
    """Set MOUNT_ATTR_* on the detached mount `tree`; with MOUNT_ATTR_IDMAP through the map of `userns`."""
    attr = _MountAttr(attributes, 0, 0, userns if attributes & MOUNT_ATTR_IDMAP else 0)
    _check(
        _libc.syscall(
            _SYS_MOUNT_SETATTR,
            tree,
            ctypes.c_char_p(b""),
            _AT_EMPTY_PATH,
            ctypes.byref(attr),
            ctypes.sizeof(attr),
        ),
        "mount_setattr",
    )


def attach_tree(tree: int, target: int) -> None:
    """Attach the detached mount `tree` on what the O_PATH descriptor `target` refers to; see move_mount(2)."""
    empty = ctypes.c_char_p(b"")
    flags = MOVE_MOUNT_F_EMPTY_PATH | MOVE_MOUNT_T_EMPTY_PATH
    _check(_libc.syscall(_SYS_MOVE_MOUNT, tree, empty, target, empty, flags), "move_mount")


def openat2(directory: int, path: str, flags: int, resolve: int) -> int:
    """Open `path` below `directory` under RESOLVE_* rules; see openat2(2)."""
    how = _OpenHow(flags | os.O_CLOEXEC, 0, resolve)
    return _check(
        _libc.syscall(
            _SYS_OPENAT2,
            directory,
            ctypes.c_char_p(os.fsencode(path)),
            ctypes.byref(how),
            ctypes.sizeof(how),
        ),
        path,
    )
