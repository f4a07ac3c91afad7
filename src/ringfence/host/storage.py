"""The file system and the disk below a directory: for block I/O limits and for idmapped mounts."""

import os

import msgspec

from ringfence.host.facts import BlockDevice
from ringfence.host.kernelfiles import text

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Sequence

_IN_MEMORY = frozenset({"tmpfs", "ramfs", "devtmpfs", "proc", "sysfs"})
# The kernel from which a file system can be mounted with mapped ids: mount_setattr(2), NOTES. An overlay cannot be,
# only its layers can.
_IDMAPPED_SINCE = {
    "ext4": (5, 12),
    "vfat": (5, 12),
    "xfs": (5, 12),
    "btrfs": (5, 15),
    "ntfs3": (5, 15),
    "f2fs": (5, 18),
    "erofs": (5, 19),
    "squashfs": (6, 2),
    "tmpfs": (6, 3),
}


class Filesystem(msgspec.Struct, frozen=True):
    """The mount a path lies on: type, "major:minor" of its files, and the source as mountinfo says it."""

    kind: str = ""
    device: str = ""
    source: str = ""


def filesystem_of(path: str) -> Filesystem:
    """Return the file system that `path` lies on; empty when `path` is "" or unknown."""
    return filesystem_in(text("/proc/self/mountinfo", 1 << 20), path) if path else Filesystem()


def filesystem_in(mountinfo: str, path: str) -> Filesystem:
    """Return the file system of absolute `path` by the text of mountinfo: longest mount point, last line."""
    best, length = Filesystem(), -1
    for line in mountinfo.splitlines():
        before, _, after = line.partition(" - ")
        fields, words = before.split(), after.split()
        if len(fields) < 6 or len(words) < 2:
            continue
        point = fields[4].rstrip("/")
        if (path == point or path.startswith(point + "/")) and len(point) >= length:
            best, length = Filesystem(kind=words[0], device=fields[2], source=words[1]), len(point)
    return best


def idmapped(kernel: tuple[int, int], kind: str) -> bool:
    """Whether `kernel` can map ids in mounts of a file system of this kind."""
    return kind in _IDMAPPED_SINCE and kernel >= _IDMAPPED_SINCE[kind]


def block_device(filesystem: Filesystem) -> BlockDevice | None:
    """Return the whole disk below `filesystem`, or None: memory, network, or unknown.

    I/O limits are set on disks, not on partitions.
    Source: https://docs.kernel.org/admin-guide/cgroup-v2.html#io-interface-files
    """
    number = filesystem.device
    if number.startswith("0:"):  # btrfs and others have anonymous device numbers: ask their source
        number = _number_of(filesystem.source)
    where = os.path.realpath(f"/sys/dev/block/{number}") if number else ""
    if not where.startswith("/sys/devices/") or not os.path.isdir(where):
        return None
    if os.path.exists(f"{where}/partition"):
        where = os.path.dirname(where)
    disk = text(f"{where}/dev", 32)
    return BlockDevice(number=disk, name=os.path.basename(where)) if disk else None


def _number_of(source: str) -> str:
    import stat

    try:
        found = os.stat(source) if source.startswith("/dev/") else None
    except OSError:
        return ""
    if found is None or not stat.S_ISBLK(found.st_mode):
        return ""
    return f"{os.major(found.st_rdev)}:{os.minor(found.st_rdev)}"


def disks_below(paths: "Sequence[str]") -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Return the numbers of the disks that `paths` lie on, and those paths whose disk is not known.

    What lies in memory has no disk.
    """
    numbers: set[str] = set()
    unknown: list[str] = []
    for path in paths:
        filesystem = filesystem_of(path)
        disk = block_device(filesystem)
        if disk is not None:
            numbers.add(disk.number)
        elif filesystem.kind not in _IN_MEMORY:
            unknown.append(path)
    return tuple(sorted(numbers)), tuple(unknown)
