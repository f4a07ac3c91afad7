"""One control group of one sandbox, in all hierarchies at once: made, watched, killed and removed."""

from __future__ import annotations

import errno
import os
import time

from ringfence.cgroup import files, readings
from ringfence.cgroup.layout import CALLER_LEAF, components, valid_id
from ringfence.errors import HostError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterable

    from ringfence.cgroup.layout import Layout
    from ringfence.cgroup.readings import Observed, Usage

_DELEGATE = "start under: systemd-run --user --scope -p Delegate=yes ringfence run ..."
# A pidfd for each process of a batch is open at once; the usual limit of open files is 1024.
_BATCH = 200


class Cgroup:
    """The group at `path` (``layout.path(id)``) in every hierarchy of `layout`."""

    __slots__ = ("layout", "path")

    def __init__(self, layout: Layout, path: str) -> None:
        """Name the group; nothing is made yet. Raises HostError for a path that could leave its hierarchy."""
        self.layout = layout
        self.path = "/" + "/".join(components(path))

    def create(self) -> None:
        """Make the group and its parents wherever a controller needs it; existing ones are kept.

        v2: controllers are switched on in ``cgroup.subtree_control`` on the way down; v1: an empty cpuset
        takes its parent's CPUs. Raises HostError when the kernel refuses or a controller does not arrive.
        """
        try:
            if self.layout.version == "v2":
                self._create_v2()
            else:
                self._create_v1()
        except OSError as err:
            raise HostError(
                f"cannot make cgroup {self.path}: {err.strerror} ({err.filename})", hint=_DELEGATE
            ) from err

    def _create_v1(self) -> None:
        for mount in dict.fromkeys(self.layout.mounts.values()):
            for path in _prefixes(self.path):
                made = files.make_directory(mount, path)
                if made and mount == self.layout.mounts.get("cpuset"):
                    _inherit_cpuset(mount, path)

    def _create_v2(self) -> None:
        mount, wanted = self.layout.unified, self.layout.controllers
        steps = _prefixes(self.path)
        for parent, path in zip(["", *steps], steps, strict=False):
            _enable(mount, parent, wanted)
            files.make_directory(mount, path)
        have = (files.read(mount, self.path, "cgroup.controllers") or "").split()
        missing = [name for name in wanted if name not in have]
        if missing:
            raise HostError(f"cgroup {self.path} does not get: {', '.join(missing)}", hint=_DELEGATE)

    def exists(self) -> bool:
        """Whether the group is there in at least one hierarchy."""
        return any(_is_directory(mount, self.path) for mount in self.layout.hierarchies())

    def procs(self) -> list[int]:
        """Return the ids of the processes in and below the group in any hierarchy; [] when it is gone."""
        # Any: a runtime killed half-way may have moved its process in some hierarchies and not in others.
        found: set[int] = set()
        for mount in self.layout.hierarchies():
            for _, directory in files.walk(mount, self.path):
                found.update(_pids(directory))
        return sorted(found)

    def kill(self, *, timeout_s: float = 5.0) -> None:
        """Kill every process in the group and below, also frozen ones, and wait until none is left.

        Raises HostError when some are left after `timeout_s` seconds (uninterruptible in the kernel).
        """
        deadline = time.monotonic() + timeout_s
        pause_s = 0.0005
        while pids := self.procs():
            if time.monotonic() > deadline:
                raise HostError(
                    f"processes {_some(pids)} in cgroup {self.path} do not die",
                    hint="they wait in the kernel (state D); 'ringfence gc' tries again later",
                )
            if not self._kill_v2():
                self._stop_forks()
                self._signal_all()
            time.sleep(pause_s)
            pause_s = min(pause_s * 2, 0.02)

    def _kill_v2(self) -> bool:
        """Use cgroup.kill (Linux 5.14): atomic against forks, and reaches frozen processes."""
        if self.layout.version != "v2":
            return False
        try:
            directory = files.open_directory(self.layout.unified, self.path)
        except OSError:
            return False
        try:
            files.write_at(directory, "cgroup.kill", "1")
        except OSError:
            return False
        finally:
            os.close(directory)
        return True

    def _stop_forks(self) -> None:
        """Let the group make no process more, and thaw it: a frozen process dies only when it runs again."""
        v2 = self.layout.version == "v2"
        thaw = ("cgroup.freeze", "0") if v2 else ("freezer.state", "THAWED")
        for controller, (name, text) in (("pids", ("pids.max", "0")), ("" if v2 else "freezer", thaw)):
            mount = self.layout.mount_of(controller)
            for _, directory in files.walk(mount, self.path) if mount else ():
                try:
                    files.write_at(directory, name, text)
                except OSError:
                    continue  # gone meanwhile, or a kernel without this file; the loop in kill() goes on

    def _signal_all(self) -> None:
        pids = self.procs()
        for start in range(0, len(pids), _BATCH):
            self._signal(pids[start : start + _BATCH])

    def _signal(self, pids: list[int]) -> None:
        from signal import SIGKILL, pidfd_send_signal

        handles = {pid: fd for pid in pids if (fd := _pidfd(pid)) >= 0}
        try:
            # Read again with the handles open: a number given to a new process meanwhile is not here.
            for pid in handles.keys() & set(self.procs()):
                try:
                    pidfd_send_signal(handles[pid], SIGKILL)
                except ProcessLookupError:
                    continue
        finally:
            for fd in handles.values():
                os.close(fd)

    def deny_devices(self, rules: Iterable[str]) -> None:
        """Take devices ("c 10:200 rwm") from the group that its runtime allows to all; v1 only, else nothing.

        Raises OSError. Source: https://docs.kernel.org/admin-guide/cgroup-v1/devices.html
        """
        mount = self.layout.mounts.get("devices", "")
        if not mount or self.layout.version == "v2":
            return
        directory = files.open_directory(mount, self.path)
        try:
            for rule in rules:
                files.write_at(directory, "devices.deny", rule)
        finally:
            os.close(directory)

    def usage(self) -> Usage:
        """Return cpu_s, memory_peak_bytes, io_read_bytes, io_write_bytes and pids_peak since the start.

        None means that this kernel or layout does not count it, or that the group is gone. On v1,
        io_write_bytes leaves out what the page cache wrote later: the kernel charges that to the root group.
        """
        return readings.usage(self.layout, self.path)

    def oom_kills(self) -> int:
        """Return how many processes here and below were killed for lack of memory; 0 if it is gone."""
        return readings.oom_kills(self.layout, self.path)

    def observed(self) -> Observed:
        """Return the limits in force, read from the kernel: {name: (value, file it was read from)}.

        Names: memory_bytes, swap_bytes (beyond memory), cpu_quota_us, cpu_period_us, cpu_weight (as read:
        cpu.shares on v1, cpu.weight on v2, as the file says), cpuset (text), pids, io ({"8:0": {"rbps",
        "wbps", "riops", "wiops"}}, only those limited). None is "no limit"; an absent name was not readable.
        """
        return readings.observed(self.layout, self.path)

    def unreclaimable_bytes(self) -> int:
        """Return how much memory the group uses that is not cache of files, in bytes; 0 if it is gone."""
        return readings.unreclaimable_bytes(self.layout, self.path)

    def limit_memory(self, limit_bytes: int, swap_bytes: int | None) -> None:
        """Lower the memory limit, and that of memory and swap with it where `swap_bytes` is not None.

        Raises HostError when the kernel does not take it: then more is in use than that.
        """
        mount = self.layout.mount_of("memory")
        rows = [("memory.max" if self.layout.version == "v2" else "memory.limit_in_bytes", limit_bytes)]
        if swap_bytes is not None and self.layout.version != "v2":
            rows.append(("memory.memsw.limit_in_bytes", limit_bytes + swap_bytes))
        try:
            directory = files.open_directory(mount, self.path)
            try:
                for name, value in rows:
                    files.write_at(directory, name, str(value))
            finally:
                os.close(directory)
        except OSError as err:
            raise HostError(
                f"cannot set the memory limit of {self.path} to {limit_bytes} bytes: {err.strerror}",
                hint="raise limits.memory (--memory)",
            ) from err

    def limit_cpu(self, quota_us: int, period_us: int) -> None:
        """Give the group `quota_us` of CPU time in every `period_us`. Raises HostError."""
        v2 = self.layout.version == "v2"
        rows = [("cpu.max", f"{quota_us} {period_us}")]
        if not v2:
            rows = [("cpu.cfs_period_us", str(period_us)), ("cpu.cfs_quota_us", str(quota_us))]
        try:
            directory = files.open_directory(self.layout.mount_of("cpu"), self.path)
            try:
                for name, text in rows:
                    files.write_at(directory, name, text)
            finally:
                os.close(directory)
        except OSError as err:
            raise HostError(
                f"cannot set the CPU limit of {self.path}: {err.strerror}", hint="see 'ringfence doctor'"
            ) from err

    def remove(self, *, timeout_s: float = 5.0) -> None:
        """Remove the group and those below it from every hierarchy; one that is not there is fine.

        A dead process leaves its group a moment after it died, so EBUSY is tried again until `timeout_s`
        seconds have passed, then raises HostError.
        """
        deadline = time.monotonic() + timeout_s
        for mount in self.layout.hierarchies():
            pause_s = 0.0002
            while not _removed(mount, self.path):
                if time.monotonic() > deadline:
                    raise HostError(
                        f"cgroup {mount}{self.path} is still in use by {_some(self.procs()) or 'the kernel'}",
                        hint="'ringfence gc' tries again later",
                    )
                time.sleep(pause_s)
                pause_s = min(pause_s * 2, 0.02)

    def remove_parent(self) -> None:
        """Remove the empty group that all sandboxes are below, wherever it is there; one in use is kept."""
        for mount in self.layout.hierarchies():
            try:
                os.rmdir(mount + files.parent_of(self.path))
            except OSError:
                continue


def leftovers(layout: Layout) -> list[str]:
    """Return the ids of all sandboxes that have a group in any hierarchy, live ones among them."""
    found: set[str] = set()
    for mount in layout.hierarchies():
        try:
            directory = files.open_directory(mount, layout.base)
        except OSError:
            continue
        try:
            found.update(files.subgroups(directory))
        finally:
            os.close(directory)
    return sorted(name for name in found if _is_id(name))


def _is_id(name: str) -> bool:
    try:
        valid_id(name)
    except HostError:
        return False
    return True


def _prefixes(path: str) -> list[str]:
    parts = components(path)
    return ["/" + "/".join(parts[: count + 1]) for count in range(len(parts))]


def _is_directory(mount: str, path: str) -> bool:
    try:
        os.close(files.open_directory(mount, path))
    except OSError:
        return False
    return True


def _pids(directory: int) -> set[int]:
    words = (files.read_at(directory, "cgroup.procs") or "").split()
    # 0 is a process of another pid namespace: not ours to name.
    return {int(word) for word in words if word.isdecimal() and word != "0"}


def _pidfd(pid: int) -> int:
    try:
        return os.pidfd_open(pid)
    except OSError:
        return -1


def _some(pids: Iterable[int]) -> str:
    first = [str(pid) for pid in pids][:5]
    return ", ".join(first)


def _removed(mount: str, path: str) -> bool:
    try:
        files.remove_tree(mount, path)
    except OSError as err:
        if err.errno in (errno.EBUSY, errno.ENOTEMPTY):
            return False
        raise HostError(f"cannot remove cgroup {mount}{path}: {err.strerror}") from err
    return True


def _inherit_cpuset(mount: str, path: str) -> None:
    """Give a new v1 cpuset its parent's CPUs and memory nodes: an empty one admits no process. cpuset(7)."""
    directory = files.open_directory(mount, path)
    try:
        for name in ("cpuset.cpus", "cpuset.mems"):
            if not (files.read_at(directory, name) or "").strip():
                above = files.read(mount, files.parent_of(path), name) or ""
                files.write_at(directory, name, above.strip())
    finally:
        os.close(directory)


def _enable(mount: str, path: str, wanted: Iterable[str]) -> None:
    """Hand the `wanted` controllers that group `path` has on to its children (v2)."""
    directory = files.open_directory(mount, path)
    try:
        have = (files.read_at(directory, "cgroup.controllers") or "").split()
        on = (files.read_at(directory, "cgroup.subtree_control") or "").split()
        text = " ".join(f"+{name}" for name in wanted if name in have and name not in on)
        if text:
            _switch_on(mount, path, directory, text)
    finally:
        os.close(directory)


def _switch_on(mount: str, path: str, directory: int, text: str) -> None:
    try:
        files.write_at(directory, "cgroup.subtree_control", text)
    except PermissionError:
        return  # above what was delegated to us; create() checks what arrives in the end
    except OSError as err:
        # A group with processes cannot hand on controllers ("No Internal Process Constraint" of cgroup v2):
        # in a delegated scope that process is usually ourselves, so step aside into a leaf and try again.
        if err.errno != errno.EBUSY or os.getpid() not in _pids(directory):
            raise
        files.make_directory(mount, f"{path}/{CALLER_LEAF}")
        leaf = files.open_directory(mount, f"{path}/{CALLER_LEAF}")
        try:
            files.write_at(leaf, "cgroup.procs", "0")
        finally:
            os.close(leaf)
        files.write_at(directory, "cgroup.subtree_control", text)
