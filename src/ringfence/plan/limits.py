"""From a policy's limits to rlimits and cgroup resources of the OCI spec, and what the kernel will show of them."""

import msgspec

from ringfence.cgroup.weight import shares_of_weight
from ringfence.host.facts import Host
from ringfence.plan.document import Control, Value
from ringfence.plan.oci import BlockIo, Cpu, DeviceRule, Memory, Resources, Rlimit, Throttle
from ringfence.policy.model import Io, Limits

# The agent is a process of the job's user in the job's group; the job gets what the policy says beside it.
AGENT_PROCESSES = 1
CPU_PERIOD_US = 100_000
# The kernel refuses a quota below 1 ms: sched/core.c, min_cfs_quota_period.
_LEAST_QUOTA_US = 1_000


class Disks(msgspec.Struct, frozen=True):
    """The block devices ("254:0") that a workload reads from, and whether it may write to any."""

    numbers: tuple[str, ...]
    written: bool


_RLIMIT_FIELDS = {
    "RLIMIT_CORE": "limits.core",
    "RLIMIT_FSIZE": "limits.file_size",
    "RLIMIT_NOFILE": "limits.open_files",
    "RLIMIT_NPROC": "limits.threads",
    "RLIMIT_STACK": "limits.stack",
}


def rlimits(limits: Limits, skip: frozenset[str]) -> list[Rlimit]:
    """Return the rlimits of the job and the agent; one that the policy leaves open or that is in `skip` is not set."""
    wanted = {
        "RLIMIT_CORE": 0,
        "RLIMIT_FSIZE": limits.file_size_bytes,
        "RLIMIT_NOFILE": limits.open_files,
        "RLIMIT_NPROC": None if limits.threads is None else limits.threads + AGENT_PROCESSES,
        "RLIMIT_STACK": limits.stack_bytes,
    }
    return [
        {"type": name, "soft": value, "hard": value}
        for name, value in wanted.items()
        if value is not None and _RLIMIT_FIELDS[name] not in skip
    ]


def rlimit_controls(limits: Limits, skip: frozenset[str]) -> list[Control]:
    """Return what /proc/PID/limits must say."""
    return [
        {
            "name": f"rlimit.{limit['type'].removeprefix('RLIMIT_').lower()}",
            "field": _RLIMIT_FIELDS[limit["type"]],
            "asked": limit["hard"],
        }
        for limit in rlimits(limits, skip)
    ]


def cpu_quota_us(cpus: float) -> int:
    """Return the CFS quota for `cpus` cores in each period of 100 ms, at least the kernel's smallest.

    Source: https://docs.kernel.org/scheduler/sched-bwc.html
    """
    return max(_LEAST_QUOTA_US, round(cpus * CPU_PERIOD_US))


def whole_pages(size_bytes: int, page_bytes: int) -> int:
    """Return `size_bytes` as memory.limit_in_bytes and memory.max keep it: rounded down to pages."""
    return size_bytes // page_bytes * page_bytes


def resources(
    limits: Limits,
    host: Host,
    *,
    disks: Disks,
    skip: frozenset[str],
    devices: tuple[str, ...] = (),
) -> Resources:
    """Return ``linux.resources``; `skip` are fields that the user let pass unenforced, `devices` rules to allow."""
    found: Resources = {
        "devices": [{"allow": False, "access": "rwm"}, *(_device_rule(rule) for rule in devices)],
        "memory": _memory(limits, host, skip),
        "cpu": _cpu(limits, host, skip),
    }
    if limits.pids is not None and "limits.pids" not in skip:
        found["pids"] = {"limit": limits.pids + AGENT_PROCESSES}
    throttles = throttled(limits.io, disks, skip)
    if throttles:
        found["blockIO"] = _block_io(throttles, disks)
    if host.cgroup.version == "v2" and "limits.cpu_weight" not in skip:
        found["unified"] = {"cpu.weight": str(limits.cpu_weight)}
    return found


def _device_rule(rule: str) -> DeviceRule:
    """Return "c 10:229 rw" as the OCI spec writes it."""
    kind, number, access = rule.split()
    major, _, minor = number.partition(":")
    return {"allow": True, "access": access, "type": kind, "major": int(major), "minor": int(minor)}


def _memory(limits: Limits, host: Host, skip: frozenset[str]) -> Memory:
    found: Memory = {}
    if limits.memory_bytes is None or "limits.memory" in skip:
        return found
    found["limit"] = whole_pages(limits.memory_bytes, host.page_bytes)
    if limits.swap_bytes is not None and host.cgroup.swap_accounting and "limits.swap" not in skip:
        # The OCI value is memory and swap together.
        found["swap"] = found["limit"] + whole_pages(limits.swap_bytes, host.page_bytes)
    return found


def _cpu(limits: Limits, host: Host, skip: frozenset[str]) -> Cpu:
    found: Cpu = {}
    if limits.cpus is not None and "limits.cpus" not in skip:
        found["quota"] = cpu_quota_us(limits.cpus)
        found["period"] = CPU_PERIOD_US
    if host.cgroup.version != "v2" and "limits.cpu_weight" not in skip:
        found["shares"] = shares_of_weight(limits.cpu_weight)
    if limits.cpuset is not None and "limits.cpuset" not in skip:
        found["cpus"] = limits.cpuset
    return found


def throttled(io: Io, disks: Disks, skip: frozenset[str]) -> dict[str, int]:
    """Return {rbps, wbps, riops, wiops} of what is to be throttled on each of `disks`."""
    wanted = {
        "rbps": ("limits.io.read", io.read_bytes_per_s),
        "wbps": ("limits.io.write", io.write_bytes_per_s),
        "riops": ("limits.io.read_iops", io.read_iops),
        "wiops": ("limits.io.write_iops", io.write_iops),
    }
    return {
        key: value
        for key, (field, value) in wanted.items()
        if disks.numbers and value is not None and field not in skip and (disks.written or key[0] == "r")
    }


def _block_io(throttles: dict[str, int], disks: Disks) -> BlockIo:
    def on_each(key: str) -> list[Throttle]:
        numbers = [disk.split(":") for disk in disks.numbers] if key in throttles else []
        return [
            {"major": int(major), "minor": int(minor), "rate": throttles[key]} for major, minor in numbers
        ]

    return {
        "throttleReadBpsDevice": on_each("rbps"),
        "throttleWriteBpsDevice": on_each("wbps"),
        "throttleReadIOPSDevice": on_each("riops"),
        "throttleWriteIOPSDevice": on_each("wiops"),
    }


def cgroup_controls(limits: Limits, host: Host, *, disks: Disks, skip: frozenset[str]) -> list[Control]:
    """Return what the cgroup files must say for `resources` of the same arguments."""
    asked = resources(limits, host, disks=disks, skip=skip)
    memory, cpu = asked["memory"], asked["cpu"]
    rows: list[tuple[str, str, Value]] = [("cgroup.membership", "limits.pids", True)]
    if "limit" in memory:
        rows.append(("cgroup.memory_bytes", "limits.memory", memory["limit"]))
    if "swap" in memory:
        rows.append(("cgroup.swap_bytes", "limits.swap", memory["swap"] - memory["limit"]))
    if "quota" in cpu:
        rows.append(("cgroup.cpu_quota_us", "limits.cpus", cpu["quota"]))
        rows.append(("cgroup.cpu_period_us", "limits.cpus", cpu["period"]))
    if "shares" in cpu:
        rows.append(("cgroup.cpu_weight", "limits.cpu_weight", cpu["shares"]))
    elif "unified" in asked:
        rows.append(("cgroup.cpu_weight", "limits.cpu_weight", limits.cpu_weight))
    if "cpus" in cpu:
        rows.append(("cgroup.cpuset", "limits.cpuset", cpu["cpus"]))
    if "pids" in asked:
        rows.append(("cgroup.pids", "limits.pids", asked["pids"]["limit"]))
    throttles = throttled(limits.io, disks, skip)
    names = {"rbps": "read", "wbps": "write", "riops": "read_iops", "wiops": "write_iops"}
    rows += [
        (f"cgroup.io.{key}:{disk}", f"limits.io.{names[key]}", value)
        for disk in disks.numbers
        for key, value in throttles.items()
    ]
    return [{"name": name, "field": field, "asked": value} for name, field, value in rows]
