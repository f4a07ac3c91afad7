"""Copy a directory into a disk image, with its owner as the job's user and everybody else as nobody.

Run as a program in a mount namespace of its own: ``copying IMAGE SOURCE UID GID``. It mounts SOURCE once more with
its owners mapped, as the linux tier shows it to a job, and becomes mkfs.erofs(1), which writes down what it sees.
"""

from __future__ import annotations

import os
import sys

from ringfence.linux import libc
from ringfence.linux.userns import make_userns
from ringfence.runtime.spawn import agent_path
from ringfence.runtime.stage import open_plain

_MKFS = "mkfs.erofs"


def _main(made: str, source: str, uid: int, gid: int) -> None:
    fd = open_plain(source)
    found = os.fstat(fd)
    tree = libc.clone_tree(fd, "")
    attributes = libc.MOUNT_ATTR_NOSUID | libc.MOUNT_ATTR_NODEV | libc.MOUNT_ATTR_RDONLY
    if os.geteuid() == 0:
        userns = make_userns(agent_path(), [(found.st_uid, uid, 1)], [(found.st_gid, gid, 1)])
        libc.set_mount_attributes(tree, attributes | libc.MOUNT_ATTR_IDMAP, userns)
    else:
        libc.set_mount_attributes(tree, attributes)
    # Over the directory that the image is made in: nothing else of this namespace is needed any more.
    home = os.path.dirname(made)
    image = os.open(made, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW, 0o600)
    libc.mount("tmpfs", home, "tmpfs", libc.MS_NOSUID | libc.MS_NODEV, "size=64k,mode=700")
    os.mkdir(f"{home}/tree")
    target = os.open(f"{home}/tree", os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    libc.attach_tree(tree, target)
    os.set_inheritable(image, True)
    os.execvp(_MKFS, [_MKFS, "--quiet", f"/proc/self/fd/{image}", f"{home}/tree"])


if __name__ == "__main__":
    from ringfence.errors import RingfenceError

    try:
        _main(sys.argv[1], sys.argv[2], int(sys.argv[3]), int(sys.argv[4]))
    except RingfenceError as error:
        raise SystemExit(error.message) from error
    except OSError as error:
        raise SystemExit(f"{error.filename or sys.argv[2]}: {error.strerror}") from error
