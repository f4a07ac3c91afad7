"""How control groups are laid out on this host, and which of them this caller may use."""

import os
import re

import msgspec

from ringfence.host.facts import CgroupFacts, CgroupVersion
from ringfence.host.kernelfiles import text

_BASE = "/ringfence"
# Where a caller in a delegated scope moved itself: ringfence.cgroup.layout.CALLER_LEAF.
_CALLER_LEAF = "/ringfence-caller"


class _Mount(msgspec.Struct, frozen=True):
    point: str
    kind: str
    options: tuple[str, ...]


def cgroup_facts() -> CgroupFacts:
    """Read the layout of control groups; "none" when there is no mount or no /proc."""
    return facts_from(text("/proc/self/mountinfo", 1 << 20), text("/proc/self/cgroup"), text("/proc/cgroups"))


def facts_from(mountinfo: str, own: str, known: str) -> CgroupFacts:
    """Return the facts for the texts of /proc/self/mountinfo, /proc/self/cgroup and /proc/cgroups.

    Interface files below the mount points named in `mountinfo` are read as well.
    """
    mounts = _cgroup_mounts(mountinfo)
    names = {line.split()[0] for line in known.splitlines() if line.strip() and line[0] != "#"}
    v1 = {
        option: mount.point
        for mount in reversed(mounts)
        if mount.kind == "cgroup"
        for option in mount.options
        if option in names or option.startswith("name=")
    }
    unified = next((mount.point for mount in mounts if mount.kind == "cgroup2"), "")
    has_v1 = any(not name.startswith("name=") for name in v1)
    if has_v1:
        return _v1_facts(v1, unified)
    return _v2_facts(unified, _own_groups(own).get("", "/")) if unified else CgroupFacts()


def _v1_facts(mounts: dict[str, str], unified: str) -> CgroupFacts:
    version: CgroupVersion = "hybrid" if unified else "v1"
    usable = tuple(sorted(name for name, point in mounts.items() if os.access(point, os.W_OK)))
    return CgroupFacts(
        version=version,
        mounts=dict(sorted(mounts.items())),
        unified=unified,
        controllers=tuple(name for name in usable if not name.startswith("name=")),
        base=_BASE,
        writable=bool(usable),
        hybrid_v2_mount=unified,
        hybrid_v2_controllers=_controllers(unified) if unified else (),
        swap_accounting=os.path.exists(f"{mounts.get('memory', '')}/memory.memsw.limit_in_bytes"),
        io_throttle=os.path.exists(f"{mounts.get('blkio', '')}/blkio.throttle.write_bps_device"),
    )


def _v2_facts(unified: str, own: str) -> CgroupFacts:
    if os.access(unified, os.W_OK):
        controllers, base, mine = _controllers(unified), _BASE, {}
        writable, delegated = True, False
    else:
        own = own.removesuffix(_CALLER_LEAF)
        delegated = own != "/" and _may_divide(unified + own)
        controllers = _controllers(unified + own) if delegated else ()
        base, mine, writable = (f"{own}{_BASE}" if delegated else _BASE), {"": own}, delegated
    swap_counted = "swapaccount=0" not in text("/proc/cmdline").split()
    return CgroupFacts(
        version="v2",
        unified=unified,
        controllers=controllers,
        base=base,
        own=mine,
        writable=writable,
        delegated=delegated,
        # The files themselves exist only below the root; a kernel without them refuses the write, so nothing
        # runs unlimited where this guess is wrong.
        swap_accounting="memory" in controllers and swap_counted and os.path.exists("/proc/swaps"),
        io_throttle="io" in controllers,
    )


def _controllers(group: str) -> tuple[str, ...]:
    return tuple(sorted(text(f"{group}/cgroup.controllers").split()))


def _may_divide(group: str) -> bool:
    """Whether this caller may make groups below `group` and move processes there, as delegation promises."""
    files = (group, f"{group}/cgroup.procs", f"{group}/cgroup.subtree_control")
    return all(os.access(file, os.W_OK) for file in files)


def _own_groups(text_of_file: str) -> dict[str, str]:
    """Read /proc/PID/cgroup: {controller: path}, v2 under "". cgroups(7)."""
    found: dict[str, str] = {}
    for line in text_of_file.splitlines():
        _, controllers, path = [*line.split(":", 2), "", ""][:3]
        for name in controllers.split(","):
            found[name] = path.replace("\0", "")
    return found


def _cgroup_mounts(mountinfo: str) -> list[_Mount]:
    """Return the cgroup mounts of /proc/PID/mountinfo, those below /sys/fs/cgroup first. proc(5)."""
    found: dict[str, _Mount] = {}
    for line in mountinfo.splitlines():
        before, _, after = line.partition(" - ")
        fields, words = before.split(), after.split()
        if len(fields) < 6 or len(words) < 3:
            continue
        point = re.sub(r"\\([0-7]{3})", lambda octal: chr(int(octal[1], 8)), fields[4])
        if not point.startswith("/") or "\0" in point:
            continue
        found.pop(point, None)  # a later mount on the same place hides the earlier one
        if words[0] in ("cgroup", "cgroup2"):
            found[point] = _Mount(point=point, kind=words[0], options=tuple(words[2].split(",")))
    return sorted(found.values(), key=lambda mount: not mount.point.startswith("/sys/fs/cgroup"))
