"""System calls of a traced job, one line each, in one form for all tiers: ``[TID] NAME(ARGUMENTS) = RESULT <SECONDS>``.

At the gVisor tier they come from runsc's own tracing (``--strace``), whose lines this module reads. What the lines
say is the word of the sentry, and partly of the job: a name or an argument may contain anything.
"""

from __future__ import annotations

import re
from errno import errorcode

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

# "strace.go:605] [   2:   2] python3 X read(0x3 /etc/passwd, …, 0x400) = 920 (0x398) (3.5µs)"; the first pair of
# numbers are process and thread in the sandbox. "X" is the end of a call, "E" its beginning.
_LINE = re.compile(
    r"strace\.go:\d+\] \[ *(?P<tgid>\d+): *(?P<tid>\d+)\] .{1,16}? X (?P<name>[a-z0-9_]+)\((?P<args>.*)\)"
    r" = (?P<value>-?\d+) \(0x[0-9a-f]+\)(?: errno=(?P<errno>\d+) \((?P<why>[^()]*)\))?"
    r" \((?P<number>[0-9.]+)(?P<unit>ns|µs|ms|s)\)$"
)
# Go writes a duration of a minute or more in parts, "1m2.5s": such a call is shown without its time.
_LONG = re.compile(r" \((?:\d+h)?\d+m[0-9.]+s\)$")
_SECONDS = {"ns": 1e-9, "µs": 1e-6, "ms": 1e-3, "s": 1.0}
_MAKES_TASKS = frozenset({"fork", "vfork", "clone", "clone3"})
_AGENT = "1"


def calls(lines: Iterable[bytes]) -> Iterator[str]:
    """Yield the calls in runsc's debug log `lines` that the job made; the agent's own are left out.

    A thread is the job's from its first successful execve on, or if the job made it: names prove nothing.
    """
    job: set[str] = set()
    for line in lines:
        text = _LONG.sub(" (0s)", line.decode("utf-8", "replace").rstrip("\n"))
        found = _LINE.search(text)
        if found is None or found["tgid"] == _AGENT:
            continue
        tid, name = found["tid"], found["name"]
        if name in ("execve", "execveat") and not found["errno"]:
            job.add(tid)
        if tid not in job:
            continue
        if name in _MAKES_TASKS and int(found["value"]) > 0:
            job.add(found["value"])
        yield _written(found)


def _written(found: re.Match[str]) -> str:
    seconds = float(found["number"]) * _SECONDS[found["unit"]]
    result = found["value"]
    if found["errno"]:
        result = f"-1 {errorcode.get(int(found['errno']), found['errno'])} ({found['why']})"
    return f"[{found['tid']}] {found['name']}({found['args']}) = {result} <{seconds:.6f}>"
