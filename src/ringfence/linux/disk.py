"""Asking the kernel to put a file system's data on its disk."""

import ctypes
import os

_libc = ctypes.CDLL(None, use_errno=True)
_libc.syncfs.argtypes = (ctypes.c_int,)


def sync_file_system(fd: int) -> None:
    """Write out all of the file system that holds `fd`, like sync(1) but no other; see syncfs(2).

    Raises OSError, also for data that could not be written since `fd` was opened.
    """
    if _libc.syncfs(fd) < 0:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number), "syncfs")
