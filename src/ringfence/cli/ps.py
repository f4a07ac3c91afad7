"""``ringfence ps``: the sandboxes of this run directory, living and ended."""

from __future__ import annotations

import sys
import time

from ringfence.errors import HostError, one_line
from ringfence.sandbox import reap, store
from ringfence.sandbox.logs import utc

TYPE_CHECKING = False
if TYPE_CHECKING:
    import argparse

    from ringfence.sandbox.store import Entry

_HELP = """examples:
  ringfence ps
  ringfence ps --all --json
  ringfence stop $(ringfence ps -q)

List sandboxes, the newest first: those that live, and with --all those that have ended.
"""
_HEADINGS = ("ID", "NAME", "STATUS", "IMAGE", "ISOLATION", "COMMAND")
_COMMAND_WIDTH = 60
_KILLED = 137
_MEMORY_NOW = {"v1": "memory.usage_in_bytes", "hybrid": "memory.usage_in_bytes", "v2": "memory.current"}


def main(argv: list[str]) -> int:
    """Run the verb; see the module's docstring."""
    args = _parser().parse_args(argv)
    for problem in reap.sweep().problems:
        print(f"ringfence: warning: cannot clean up: {one_line(problem)}", file=sys.stderr)
    found = [(entry, _facts(entry)) for entry in store.entries()]
    shown = [
        (entry, facts) for entry, facts in found if args.all or facts["state"] in ("starting", "running")
    ]
    shown.sort(key=lambda pair: str(pair[1]["created"]), reverse=True)
    if args.json:
        import json

        print(json.dumps([facts | {"usage": _usage(entry)} for entry, facts in shown], indent=2))
    elif args.quiet:
        print("".join(f"{entry.id}\n" for entry, _ in shown), end="")
    else:
        _print_table([_row(facts) for _, facts in shown])
    return 0


def _parser() -> argparse.ArgumentParser:
    import argparse

    from ringfence.cli.parser import Parser

    parser = Parser(
        prog="ringfence ps",
        description=_HELP,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("-a", "--all", action="store_true", help="also those that have ended")
    how = parser.add_mutually_exclusive_group()
    how.add_argument("-q", "--quiet", action="store_true", help="print ids alone")
    how.add_argument("--json", action="store_true", help="print JSON, with what each has used")
    return parser


def _facts(entry: Entry) -> dict[str, object]:
    """Return what is known of a sandbox, as it stands in ``ps --json``."""
    record, ended = entry.record(), entry.ended()
    facts = {key: record.get(key) for key in ("name", "argv", "image", "isolation", "runtime", "detached")}
    return {
        "id": entry.id,
        **facts,
        "state": _state(entry, ended),
        "created": _time(record.get("created_ns")),
        "ended": _time(ended.get("ended_ns")),
        **{
            key: ended.get(key)
            for key in ("exit_status", "timed_out", "oom_killed", "output_truncated", "reason")
        },
    }


def _state(entry: Entry, ended: dict[str, object]) -> str:
    """Say "starting", "running", "exited", "killed" (nobody knows its exit status) or "dead" (not cleaned up)."""
    if ended:
        return "killed" if ended.get("exit_status") is None else "exited"
    if not entry.alive():
        return "dead"
    return "running" if entry.started() else "starting"


def _usage(entry: Entry) -> dict[str, object]:
    """Return what a sandbox has used, at its end or until now; {} where nothing counts it."""
    from ringfence.cgroup.readings import Reader

    kept = entry.ended().get("usage")
    if isinstance(kept, dict):
        return kept
    try:
        group = reap.cgroup_of(entry.record())
    except HostError:
        return {}
    if group is None or not group.exists():
        return {}
    with Reader(group.layout, group.path) as reader:
        now = reader.number("memory", _MEMORY_NOW.get(group.layout.version, ""))
        return {"memory_bytes": now, "pids": reader.number("pids", "pids.current"), **group.usage()}


def _row(facts: dict[str, object]) -> tuple[str, ...]:
    argv = facts["argv"]
    command = one_line(" ".join(map(str, argv))) if isinstance(argv, list) else ""
    if len(command) > _COMMAND_WIDTH:
        command = command[: _COMMAND_WIDTH - 3] + "..."
    texts = (facts["id"], facts["name"], _status(facts), facts["image"], facts["isolation"])
    return (*(one_line(str(text or "-")) for text in texts), command)


def _status(facts: dict[str, object]) -> str:
    state = facts["state"]
    if state == "running":
        return f"running {_age(facts['created'])}"
    if state == "exited":
        why = ", time limit" if facts["timed_out"] else ""
        if facts["oom_killed"] and facts["exit_status"] == _KILLED:
            why = ", out of memory"
        return f"exited ({facts['exit_status']}{why}) {_age(facts['ended'])} ago"
    return str(state)


def _time(ns: object) -> str | None:
    return utc(ns) if isinstance(ns, int) else None


def _age(moment: object) -> str:
    """Return the time since `moment` in its largest unit, rounded down."""
    import calendar

    if not isinstance(moment, str):
        return "?"
    then = calendar.timegm(time.strptime(moment[:19], "%Y-%m-%dT%H:%M:%S")) + float(moment[19:-1])
    seconds = max(0, int(time.time() - then))
    for size, unit in ((86400, "d"), (3600, "h"), (60, "min")):
        if seconds >= size:
            return f"{seconds // size} {unit}"
    return f"{seconds} s"


def _print_table(rows: list[tuple[str, ...]]) -> None:
    table = [_HEADINGS, *rows]
    widths = [max(len(row[column]) for row in table) for column in range(len(_HEADINGS) - 1)]
    for row in table:
        cells = [f"{cell:{width}}" for cell, width in zip(row, widths, strict=False)]
        print("  ".join([*cells, row[-1]]).rstrip())
