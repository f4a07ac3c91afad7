"""Remove what is left of sandboxes whose agent and launcher are gone. On the way of every run."""

from __future__ import annotations

import os

from ringfence.errors import HostError
from ringfence.sandbox import ranges, store

TYPE_CHECKING = False
if TYPE_CHECKING:
    from ringfence.cgroup.group import Cgroup
    from ringfence.sandbox.store import Entry

# In the directory of a detached sandbox that has ended, until `rm`.
_KEPT = frozenset({"lock", "record.json", "ended.json", "proof.json"})


def sweep() -> list[str]:
    """Clean up after every sandbox that nobody alive holds; return the ids of those that were dealt with."""
    done = []
    for entry in store.entries():
        if entry.try_lock():
            try:
                if reap(entry):
                    done.append(entry.id)
            finally:
                entry.unlock()
    return done


def sweep_all() -> list[str]:
    """Do what `sweep` does, and also find what lost its directory; return what was removed, in words."""
    removed = [f"sandbox {sandbox}" for sandbox in sweep()]
    for path in store.unfinished():
        store.remove_tree(path)
        removed.append(f"directory {os.path.basename(path)}")
    rootless = os.geteuid() != 0
    removed += [f"id range {base}" for base in ranges.abandoned(rootless=rootless)]
    return removed


def reap(entry: Entry) -> bool:
    """Clean up after `entry`, whose lock we hold; False when there was nothing to do.

    A detached sandbox keeps its record, proof and log until `rm`; of any other nothing is kept.
    """
    record = entry.record()
    if not record.get("detached") or record.get("remove"):
        discard(entry)
        return True
    if entry.ended():
        return False
    group = cgroup_of(record)
    if group is not None:
        group.kill()
    entry.write_ended(_how_it_ended(entry, group))
    _give_back(entry, record, group)
    tidy(entry)
    return True


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
    base = record.get("base")
    if isinstance(base, int):
        ranges.release(base, entry.directory, rootless=bool(record.get("rootless")))


def cgroup_of(record: dict[str, object]) -> Cgroup | None:
    """Return the cgroup that a record names; None when it has none."""
    from ringfence.cgroup.group import Cgroup
    from ringfence.cgroup.layout import Layout

    layout, path = record.get("cgroup"), record.get("cgroup_path")
    if not isinstance(layout, dict) or not isinstance(path, str) or not path:
        return None
    return Cgroup(Layout.from_dict(layout), path)


def tidy(entry: Entry) -> None:
    """Remove the files of a sandbox that only a living one needs."""
    for name in os.listdir(entry.directory):
        if name not in _KEPT:
            path = entry.path(name)
            if os.path.isdir(path) and not os.path.islink(path):
                store.remove_tree(path)
            else:
                os.unlink(path)


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
    return ended
