"""Remove what is left of sandboxes whose agent and launcher are gone. On the way of every run."""

from __future__ import annotations

import os

from ringfence.errors import HostError, RingfenceError
from ringfence.sandbox import ranges, store

TYPE_CHECKING = False
if TYPE_CHECKING:
    from ringfence.cgroup.group import Cgroup
    from ringfence.cgroup.layout import Layout
    from ringfence.sandbox.store import Entry

# In the directory of a detached sandbox that has ended, until `rm`.
_KEPT = frozenset({"started", "record.json", "ended.json", "proof.json"})


class Swept:
    """What a sweep came to: sandboxes dealt with, id ranges found beside, and what went wrong, in words."""

    __slots__ = ("ids", "problems", "ranges")

    def __init__(self) -> None:
        """Nothing yet."""
        self.ids: list[str] = []
        self.problems: list[str] = []
        self.ranges: list[int] = []


def sweep() -> Swept:
    """Clean up after every sandbox that nobody alive holds.

    One that cannot be cleaned up, because a process of it hangs in the kernel, is no reason not to go on.
    """
    swept = Swept()
    for entry in store.entries():
        if entry.try_lock():
            try:
                reap(entry)
                swept.ids.append(entry.id)
            except (RingfenceError, OSError) as error:
                swept.problems.append(f"sandbox {entry.id}: {error}")
            finally:
                entry.unlock()
    if swept.ids:
        # Who was killed before he had written his record may have had a range.
        swept.ranges = _give_back_ranges()
    store.remove_unfinished()
    return swept


class Collected:
    """What `collect` came to, in words: removed, left alone although it may be rubbish, could not be removed."""

    __slots__ = ("kept", "problems", "removed")

    def __init__(self) -> None:
        """Nothing yet."""
        self.removed: list[str] = []
        self.kept: list[str] = []
        self.problems: list[str] = []


def collect(layout: Layout | None) -> Collected:
    """Do what `sweep` does, and also find what lost its directory; `layout` is where this host's cgroups are."""
    found = Collected()
    found.removed += [f"directory {name}" for name in store.remove_unfinished()]
    swept = sweep()
    found.removed += [f"what was left of sandbox {sandbox}" for sandbox in swept.ids]
    found.problems += swept.problems
    if layout is not None:
        _collect_groups(layout, found)
    found.removed += [f"id range {base}" for base in (*swept.ranges, *_give_back_ranges())]
    found.removed += [f"log {sandbox}" for sandbox in store.remove_stray_logs()]
    found.removed += _collect_snapshots()
    return found


def _collect_snapshots() -> list[str]:
    from ringfence.linux.paths import state_dir
    from ringfence.runtime.microvm.saving import collect as collect_snapshots

    return collect_snapshots(state_dir())


def _collect_groups(layout: Layout, found: Collected) -> None:
    from ringfence.cgroup.group import Cgroup, leftovers

    groups = leftovers(layout)
    # Read in this order: a sandbox has its directory and range before its cgroup, and loses them after it.
    known = {entry.id for entry in store.entries()} | {
        os.path.basename(owner) for owner in ranges.owners(rootless=os.geteuid() != 0)
    }
    for sandbox in groups:
        if sandbox in known:
            continue
        group = Cgroup(layout, layout.path(sandbox))
        pids = group.procs()
        if pids:
            found.kept.append(
                f"cgroup {group.path}: process {pids[0]} lives in it, and no sandbox here is called that;"
                " perhaps of another RINGFENCE_RUN_DIR"
            )
            continue
        try:
            group.remove()
            found.removed.append(f"cgroup {group.path}")
        except HostError as error:
            found.problems.append(str(error))


def _give_back_ranges() -> list[int]:
    return list(ranges.abandoned(rootless=os.geteuid() != 0))


def reap(entry: Entry) -> None:
    """Clean up after `entry`, whose lock we hold. May be killed at any point: the next one begins again.

    A detached sandbox whose job was started keeps its record, proof and log until `rm`; of any other nothing is
    kept.
    """
    record = entry.record()
    if not record.get("detached") or record.get("remove") or not entry.started():
        discard(entry)
        return
    group = cgroup_of(record)
    if group is not None:
        group.kill()
    if not entry.ended():
        entry.write_ended(_how_it_ended(entry, group))
    _give_back(entry, record, group)
    _settle(entry)


def discard(entry: Entry) -> None:
    """Kill and remove everything of `entry`, whose lock we hold. Raises HostError if it does not die."""
    record = entry.record()
    group = cgroup_of(record)
    if group is not None:
        group.kill()
    _give_back(entry, record, group)
    entry.remove()


def _give_back(entry: Entry, record: dict[str, object], group: Cgroup | None) -> None:
    if group is not None:
        group.remove()
    base, rootless = record.get("base"), bool(record.get("rootless"))
    if isinstance(base, int):
        # Every sandbox of root's has its range before a runtime makes its cgroup: with none left, nobody is about to.
        tidy = None if group is None or rootless else group.remove_parent
        ranges.release(base, entry.directory, rootless=rootless, last=tidy)


def cgroup_of(record: dict[str, object]) -> Cgroup | None:
    """Return the cgroup that a record names; None when it has none."""
    from ringfence.cgroup.group import Cgroup
    from ringfence.cgroup.layout import Layout

    layout, path = record.get("cgroup"), record.get("cgroup_path")
    if not isinstance(layout, dict) or not isinstance(path, str) or not path:
        return None
    return Cgroup(Layout.from_dict(layout), path)


def _settle(entry: Entry) -> None:
    """Remove the files that only a living sandbox needs, and its lock last: what has none is settled."""
    for name in os.listdir(entry.directory):
        path = entry.path(name)
        if name in _KEPT or name == store.LOCK:
            continue
        if os.path.isdir(path) and not os.path.islink(path):
            store.remove_tree(path)
        else:
            os.unlink(path)
    os.unlink(entry.path(store.LOCK))


def _how_it_ended(entry: Entry, group: Cgroup | None) -> dict[str, object]:
    from ringfence.sandbox.logs import end_of

    end = end_of(entry.log_path())
    ended: dict[str, object] = {"exit_status": None, "timed_out": False, "output_truncated": False}
    if end is not None:
        ended = {
            "exit_status": 124 if end.timed_out else end.exit_status,
            "timed_out": end.timed_out,
            "output_truncated": end.truncated,
            "ended_ns": end.time_ns,
        }
    try:
        ended["oom_killed"] = group is not None and group.oom_kills() > 0
        ended["usage"] = dict(group.usage()) if group is not None and group.exists() else {}
    except HostError:
        ended["oom_killed"] = False
    if end is None and ended["oom_killed"]:
        ended["exit_status"] = 137
    if end is None and entry.record().get("isolation") in ("gvisor", "microvm"):
        ended |= _guest_end(entry)
    return ended


def _guest_end(entry: Entry) -> dict[str, object]:
    """Return what door and sentry, or the bridge, say of an end of which the agent inside did not."""
    from ringfence.runtime.door import late_end_ns, words
    from ringfence.sandbox.sentry import last_words

    late_ns = late_end_ns(entry.directory)
    if late_ns is not None:
        reason = "its time limit had passed, and the agent inside did nothing"
        return {"exit_status": 124, "timed_out": True, "ended_ns": late_ns, "reason": reason}
    if entry.record().get("isolation") == "microvm":
        return {}
    return {"reason": last_words(words(entry.directory))}
