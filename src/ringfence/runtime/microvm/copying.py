"""Copy a directory into a disk image, with its owner as the job's user and everybody else as nobody.

Run as a program in a mount namespace of its own: ``copying IMAGE SOURCE UID GID``, or ``copying IMAGE SOURCE`` for a
root directory, whose owners stay what they are. It mounts SOURCE once more with its owners mapped, as the linux tier
shows it to a job, and becomes mkfs.erofs(1), which writes down what it sees. What the job may not read is not in the
image either: something empty of the same mode and owner stands there for it.
"""

from __future__ import annotations

import contextlib
import os
import stat
import sys

from ringfence.errors import MountError
from ringfence.linux import libc
from ringfence.linux.userns import make_userns
from ringfence.runtime.spawn import agent_path
from ringfence.runtime.stage import open_plain

_MKFS = "mkfs.erofs"
# There on every host, and of no use to mkfs.erofs; in this mount namespace nothing else is below it then.
_PLACE = "/sys"
_TREE, _STAND_INS = f"{_PLACE}/tree", f"{_PLACE}/instead"
_READ = "-all,+dac_read_search"
# Each is a mount of its own: proc_sys_fs(5), mount-max, is 100,000 for all of a namespace.
_MOST_STAND_INS = 10_000


def _main(made: str, source: str, uid: int = -1, gid: int = -1) -> None:
    fd = open_plain(source)
    found = os.fstat(fd)
    tree = libc.clone_tree(fd, "")
    attributes = libc.MOUNT_ATTR_NOSUID | libc.MOUNT_ATTR_NODEV | libc.MOUNT_ATTR_RDONLY
    mapped = os.geteuid() == 0 and uid >= 0
    if mapped:
        userns = make_userns(agent_path(), [(found.st_uid, uid, 1)], [(found.st_gid, gid, 1)])
        libc.set_mount_attributes(tree, attributes | libc.MOUNT_ATTR_IDMAP, userns)
    else:
        libc.set_mount_attributes(tree, attributes)
    image = os.open(made, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW, 0o600)
    # Every owner and mode of what cannot be read takes one of its inodes.
    libc.mount("tmpfs", _PLACE, "tmpfs", libc.MS_NOSUID | libc.MS_NODEV, "size=4m,nr_inodes=8192,mode=755")
    os.mkdir(_TREE)
    target = os.open(_TREE, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    libc.attach_tree(tree, target)
    if mapped:
        os.fchown(image, uid, gid)  # it is opened once more, by name of the descriptor
        os.setgroups([])
        os.setegid(gid)
        os.seteuid(uid)
        closed = _closed(_TREE)
        os.seteuid(0)
        for path, found in closed:
            _cover(path, found)
    os.set_inheritable(image, True)
    command = [_MKFS, "--quiet", f"/proc/self/fd/{image}", _TREE]
    if mapped:
        command = [*_reduced(uid, gid), *command]
    os.execvp(command[0], command)


def _reduced(uid: int, gid: int) -> list[str]:
    """Return what a command is put after so that it can read as the job, and what stands for things it cannot read.

    The one capability does not reach files whose owners are not mapped. It also keeps the host's user of that number,
    who has it not, from looking into the process: ptrace(2).
    """
    sets = [f"--{name}={_READ}" for name in ("inh-caps", "ambient-caps", "bounding-set")]
    return ["setpriv", f"--reuid={uid}", f"--regid={gid}", "--clear-groups", "--no-new-privs", *sets]


def _closed(directory: str) -> list[tuple[str, os.stat_result]]:
    """Return every file and directory below that the caller may not read. Raises MountError for too many."""
    found: list[tuple[str, os.stat_result]] = []
    waiting = [directory]
    while waiting:
        with os.scandir(waiting.pop()) as entries:
            for entry in entries:
                at = entry.stat(follow_symlinks=False)
                if stat.S_ISDIR(at.st_mode):
                    if os.access(entry.path, os.R_OK | os.X_OK, effective_ids=True):
                        waiting.append(entry.path)
                        continue
                elif not stat.S_ISREG(at.st_mode) or os.access(entry.path, os.R_OK, effective_ids=True):
                    continue
                found.append((entry.path, at))
                if len(found) > _MOST_STAND_INS:
                    raise MountError(f"more than {_MOST_STAND_INS} files in it cannot be read")
    return found


def _cover(path: str, found: os.stat_result) -> None:
    """Put something empty with the same mode and owner over what must not be read."""
    kind, mode = stat.S_IFMT(found.st_mode), stat.S_IMODE(found.st_mode) & 0o777
    instead = f"{_STAND_INS}-{kind:o}-{mode:o}-{found.st_uid}-{found.st_gid}"
    if not os.path.exists(instead):
        if stat.S_ISDIR(found.st_mode):
            os.mkdir(instead)
        else:
            os.close(os.open(instead, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600))
        os.chown(instead, found.st_uid, found.st_gid)
        os.chmod(instead, mode)
    with contextlib.ExitStack() as closing:
        opened = [os.open(name, os.O_PATH | os.O_NOFOLLOW | os.O_CLOEXEC) for name in (path, instead)]
        opened.append(libc.clone_tree(opened[1], ""))
        for descriptor in opened:
            closing.callback(os.close, descriptor)
        libc.attach_tree(opened[2], opened[0])


if __name__ == "__main__":
    from ringfence.errors import RingfenceError

    try:
        _main(sys.argv[1], sys.argv[2], *map(int, sys.argv[3:]))
    except RingfenceError as error:
        raise SystemExit(error.message) from error
    except OSError as error:
        raise SystemExit(f"{error.filename or sys.argv[2]}: {error.strerror}") from error
