"""What the kernel says of a group: use so far, limits in force, kills for lack of memory."""

from __future__ import annotations

import os

from ringfence.cgroup import files

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import TypedDict

    from ringfence.cgroup.layout import Layout

    Value = int | str | dict[str, dict[str, int]] | None
    Observed = dict[str, tuple[Value, str]]

    class Usage(TypedDict):
        """What a group has used so far; None where this host does not count it."""

        cpu_s: float | None
        memory_peak_bytes: int | None
        io_read_bytes: int | None
        io_write_bytes: int | None
        pids_peak: int | None


# cgroup v1 shows "no limit" as the largest multiple of the page size in 63 bits; pages are 4 to 64 KiB.
_V1_UNLIMITED = (1 << 63) - (1 << 16)
_V1_THROTTLE = {"rbps": "read_bps", "wbps": "write_bps", "riops": "read_iops", "wiops": "write_iops"}


class Reader:
    """Reads control files of one group by controller; keeps one descriptor a hierarchy until closed."""

    __slots__ = ("_directories", "layout", "path")

    def __init__(self, layout: Layout, path: str) -> None:
        """Open nothing yet."""
        self.layout = layout
        self.path = path
        self._directories: dict[str, int] = {}

    def __enter__(self) -> Reader:
        """Return self."""
        return self

    def __exit__(self, *_: object) -> None:
        """Close what was opened."""
        while self._directories:
            os.close(self._directories.popitem()[1])

    def text(self, controller: str, name: str) -> str | None:
        """Return the text of `name` in the group of `controller`'s hierarchy, or None."""
        mount = self.layout.mount_of(controller)
        if not mount:
            return None
        if mount not in self._directories:
            try:
                self._directories[mount] = files.open_directory(mount, self.path)
            except OSError:
                return None
        return files.read_at(self._directories[mount], name)

    def file(self, controller: str, name: str) -> str:
        """Return the full name of a control file, for reports."""
        return f"{self.layout.mount_of(controller)}{self.path}/{name}"

    def number(self, controller: str, name: str) -> int | None:
        """Return the one number in a control file; None when absent, unlimited or not a number."""
        return number(self.text(controller, name))


def number(text: str | None) -> int | None:
    """Read one number; None for "max", -1, the v1 way to say no limit, or anything else."""
    word = (text or "").strip()
    if not word.isdecimal() or int(word) >= _V1_UNLIMITED:
        return None
    return int(word)


def flat(text: str | None) -> dict[str, int]:
    """Read a "flat keyed" file such as memory.events: one "key number" a line."""
    pairs = (line.split() for line in (text or "").splitlines())
    return {pair[0]: int(pair[1]) for pair in pairs if len(pair) == 2 and pair[1].isdecimal()}


def nested(text: str | None) -> dict[str, dict[str, int]]:
    """Read a "nested keyed" file such as io.max ("8:0 rbps=1 wbps=max"); only keys with a number."""
    table = {}
    for device, *words in (line.split() for line in (text or "").splitlines() if line.strip()):
        pairs = (word.partition("=") for word in words)
        table[device] = {key: int(value) for key, _, value in pairs if value.isdecimal()}
    return table


def usage(layout: Layout, path: str) -> Usage:
    """Return what the group has used: see `Cgroup.usage`."""
    with Reader(layout, path) as group:
        return _usage_v2(group) if layout.version == "v2" else _usage_v1(group)


def _usage_v1(group: Reader) -> Usage:
    nanoseconds = group.number("cpuacct", "cpuacct.usage")
    moved = {"Read": 0, "Write": 0}
    blocks = group.text("blkio", "blkio.throttle.io_service_bytes_recursive")
    if blocks is None:
        blocks = group.text("blkio", "blkio.throttle.io_service_bytes")
    for line in (blocks or "").splitlines():
        words = line.split()  # "254:0 Read 4096"; the last line is "Total 4096"
        if len(words) == 3 and words[1] in moved and words[2].isdecimal():
            moved[words[1]] += int(words[2])
    return {
        "cpu_s": None if nanoseconds is None else nanoseconds / 1e9,
        "memory_peak_bytes": group.number("memory", "memory.max_usage_in_bytes"),
        "io_read_bytes": None if blocks is None else moved["Read"],
        "io_write_bytes": None if blocks is None else moved["Write"],
        "pids_peak": group.number("pids", "pids.peak"),  # since Linux 6.11
    }


def _usage_v2(group: Reader) -> Usage:
    # cpu.stat is there without the cpu controller, too.
    microseconds = flat(group.text("", "cpu.stat")).get("usage_usec")
    blocks = group.text("io", "io.stat")
    devices = nested(blocks).values()
    return {
        "cpu_s": None if microseconds is None else microseconds / 1e6,
        "memory_peak_bytes": group.number("memory", "memory.peak"),  # since Linux 5.19
        "io_read_bytes": None if blocks is None else sum(device.get("rbytes", 0) for device in devices),
        "io_write_bytes": None if blocks is None else sum(device.get("wbytes", 0) for device in devices),
        "pids_peak": group.number("pids", "pids.peak"),  # since Linux 6.1
    }


def unreclaimable_bytes(layout: Layout, path: str) -> int:
    """Return how much of the group's memory is not just cache of files; 0 where nothing is counted.

    Source: https://docs.kernel.org/admin-guide/cgroup-v1/memory.html (memory.stat) and cgroup-v2.html (memory.stat)
    """
    v2 = layout.version == "v2"
    with Reader(layout, path) as group:
        used = group.number("memory", "memory.current" if v2 else "memory.usage_in_bytes") or 0
        found = flat(group.text("memory", "memory.stat"))
    names = ("active_file", "inactive_file") if v2 else ("total_active_file", "total_inactive_file")
    return max(0, used - sum(found.get(name, 0) for name in names))


def oom_kills(layout: Layout, path: str) -> int:
    """Return how many processes of the group and of those below it were killed for lack of memory."""
    mount = layout.mount_of("memory")
    if not mount:
        return 0
    if layout.version == "v2":  # hierarchical: counts those below as well
        return flat(files.read(mount, path, "memory.events")).get("oom_kill", 0)
    # v1 counts in the group of the victim only.
    texts = (files.read_at(directory, "memory.oom_control") for _, directory in files.walk(mount, path))
    return sum(flat(text).get("oom_kill", 0) for text in texts)


def observed(layout: Layout, path: str) -> Observed:
    """Return the limits in force: see `Cgroup.observed`."""
    with Reader(layout, path) as group:
        found = _observed_v2(group) if layout.version == "v2" else _observed_v1(group)
        for key, controller, name in (
            ("cpuset", "cpuset", "cpuset.cpus"),
            ("pids", "pids", "pids.max"),
        ):
            text = group.text(controller, name)
            if text is not None:
                value = text.strip() if key == "cpuset" else number(text)
                found[key] = (value, group.file(controller, name))
    return found


def _observed_v1(group: Reader) -> Observed:
    found: Observed = {}
    plain = (
        ("memory_bytes", "memory", "memory.limit_in_bytes"),
        ("cpu_quota_us", "cpu", "cpu.cfs_quota_us"),
        ("cpu_period_us", "cpu", "cpu.cfs_period_us"),
        ("cpu_weight", "cpu", "cpu.shares"),
    )
    for key, controller, name in plain:
        text = group.text(controller, name)
        if text is not None:
            found[key] = (number(text), group.file(controller, name))
    both = group.text("memory", "memory.memsw.limit_in_bytes")
    if both is not None and "memory_bytes" in found:
        total, memory = number(both), found["memory_bytes"][0]
        swap = total - memory if total is not None and isinstance(memory, int) else None
        found["swap_bytes"] = (swap, group.file("memory", "memory.memsw.limit_in_bytes"))
    throttles: dict[str, dict[str, int]] = {}
    for key, name in _V1_THROTTLE.items():
        for device, value in flat(group.text("blkio", f"blkio.throttle.{name}_device")).items():
            throttles.setdefault(device, {})[key] = value
    if group.text("blkio", "blkio.throttle.read_bps_device") is not None:
        found["io"] = (throttles, group.file("blkio", "blkio.throttle.*_device"))
    return found


def _observed_v2(group: Reader) -> Observed:
    found: Observed = {}
    plain = (
        ("memory_bytes", "memory", "memory.max"),
        ("swap_bytes", "memory", "memory.swap.max"),
        ("cpu_weight", "cpu", "cpu.weight"),
    )
    for key, controller, name in plain:
        text = group.text(controller, name)
        if text is not None:
            found[key] = (number(text), group.file(controller, name))
    words = (group.text("cpu", "cpu.max") or "").split()
    if len(words) == 2:
        found["cpu_quota_us"] = (number(words[0]), group.file("cpu", "cpu.max"))
        found["cpu_period_us"] = (number(words[1]), group.file("cpu", "cpu.max"))
    io_text = group.text("io", "io.max")
    if io_text is not None:
        found["io"] = (nested(io_text), group.file("io", "io.max"))
    return found
