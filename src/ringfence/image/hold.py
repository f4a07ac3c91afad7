"""A sandbox's claim on its image: a shared flock on the image's record, as long as anything of the sandbox lives.

The descriptor goes to the agent as its lock does, and the kernel drops the claim with the last of them, whatever
killed it: a claim needs no directory of ours, and a user who runs root's image can make one too.
On the way of every run: imports only `os` and `fcntl`.
"""

import fcntl
import os


def hold(record_path: str) -> int:
    """Return a close-on-exec descriptor that keeps an image; -1 when the image is not there (any more)."""
    try:
        descriptor = os.open(record_path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW)
    except OSError:
        return -1
    fcntl.flock(descriptor, fcntl.LOCK_SH)
    if os.fstat(descriptor).st_nlink == 0:  # removed between the two lines above
        os.close(descriptor)
        return -1
    return descriptor


def take_away(record_path: str) -> int:
    """Return a descriptor that keeps every start from using an image; -1 while a sandbox of it lives.

    Raises OSError when the record is not there.
    """
    descriptor = os.open(record_path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(descriptor)
        return -1
    return descriptor
