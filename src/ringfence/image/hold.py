"""A sandbox's claim on its image: a read lock on the image's record, as long as anything of the sandbox lives.

The descriptor goes to the agent as its lock does, and the kernel drops the claim with the last of them, whatever
killed it: a claim needs no directory of ours, and a user who runs root's image can make one too. That user can make
no other lock: unlike flock(2), an open file description lock that excludes others takes the right to write, so
nobody who may only read a record can keep its owner from starting. Source: fcntl_locking(2).
On the way of every run: imports only `os`, `fcntl` and `_struct`.
"""

import fcntl
import os
from _struct import Struct

# struct flock of fcntl(2) for the whole file: type, whence, start, length, pid.
_FLOCK = Struct("@hhqqi4x")


def hold(record_path: str) -> int:
    """Return a close-on-exec descriptor that keeps an image; -1 when the image is not there (any more)."""
    try:
        descriptor = os.open(record_path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW)
    except OSError:
        return -1
    fcntl.fcntl(descriptor, fcntl.F_OFD_SETLKW, _FLOCK.pack(fcntl.F_RDLCK, os.SEEK_SET, 0, 0, 0))
    if os.fstat(descriptor).st_nlink == 0:  # removed between the two lines above
        os.close(descriptor)
        return -1
    return descriptor


def take_away(record_path: str) -> int:
    """Return a descriptor that keeps every start from using an image; -1 while a sandbox of it lives.

    Raises OSError when the record is not there.
    """
    descriptor = os.open(record_path, os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW)
    try:
        fcntl.fcntl(descriptor, fcntl.F_OFD_SETLK, _FLOCK.pack(fcntl.F_WRLCK, os.SEEK_SET, 0, 0, 0))
    except BlockingIOError:
        os.close(descriptor)
        return -1
    return descriptor
