"""System calls of a traced job, one line each, in one form for all tiers: ``[TID] NAME(ARGUMENTS) = RESULT <SECONDS>``.

At the gVisor tier they come from runsc's own tracing (``--strace``), as a JSON object for each line, so that nothing
in an argument can begin another one. What the lines say is the word of the sentry, and partly of the job: an argument
may contain anything, and so may the name that a process gives itself.
"""

from __future__ import annotations

import json
import os
import re
from errno import errorcode

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator
    from typing import BinaryIO

# The message of a line: "strace.go:605] [   2:   3] python3 X read(0x3 /etc/passwd, …, 0x400) = 920 (0x398) (3.5µs)".
# The first pair of numbers are process and thread in the sandbox. "E" is the beginning of a call, "X" its end.
_HEAD = re.compile(r"strace\.go:\d+\] \[ *(?P<tgid>\d+): *(?P<tid>\d+)\] ")
_CALL = re.compile(r" (?P<way>[EX]) (?P<name>[a-z0-9_]+)\(")
_RESULT = re.compile(
    r"\) = (?P<value>-?\d+) \(0x[0-9a-f]+\)(?: errno=(?P<errno>\d+) \((?P<why>[^()]*)\))? \((?P<time>[0-9.a-zµ]+)\)"
)
_DURATION = re.compile(r"([0-9.]+)(ns|µs|ms|s|m|h)")
_SECONDS = {"ns": 1e-9, "µs": 1e-6, "ms": 1e-3, "s": 1.0, "m": 60.0, "h": 3600.0}
# What a process may call itself: TASK_COMM_LEN of the kernel without the NUL.
_MOST_NAME = 15
# How a call is called that cannot be told from another one. It may be any.
_UNCLEAR = "?"
_MAKES_TASKS = frozenset({"fork", "vfork", "clone", "clone3", _UNCLEAR})
# Of include/linux/errno.h: a job never sees them, a tracer does.
_RESTARTS = {512: "ERESTARTSYS", 513: "ERESTARTNOINTR", 514: "ERESTARTNOHAND", 516: "ERESTART_RESTARTBLOCK"}
_ADDRESSES = 1 << 32
_AGENT = "1"
_MOST_LINE_BYTES = 1 << 20
_MOST_ARGUMENTS = 4096
_MOST_BEGUN = 1024
# How runsc leaves out, at the end of a call, what the job wrote: it has shown that at the beginning.
_LEFT_OUT = ", ...,"


class _Line:
    """One line of the log: the beginning of a call, or its end with the result."""

    __slots__ = ("arguments", "begins", "name", "result", "tgid", "tid")

    def __init__(
        self, tgid: str, tid: str, name: str, arguments: str, *, begins: bool, result: re.Match[str] | None
    ) -> None:
        self.tgid = tgid
        self.tid = tid
        self.name = name
        self.arguments = arguments
        self.begins = begins
        self.result = result

    def value(self) -> int:
        """Return what the call returned, -1 for an error or as long as it has not returned."""
        return -1 if self.result is None or self.result["errno"] else int(self.result["value"])


class _Job:
    """Which threads are the job's: those that have executed something, and all that they make. Names prove nothing."""

    def __init__(self) -> None:
        self.threads: set[str] = set()
        # By thread, the call that it is in.
        self.begun: dict[str, _Line] = {}

    def has(self, line: _Line) -> bool:
        """Say whether the job made the call of `line`, and learn from it."""
        if line.tgid == _AGENT:
            return False
        executed = line.name in ("execve", "execveat") and not line.begins and line.value() == 0
        mine = line.tid in self.threads or line.tgid in self.threads
        # A child may run before the call that made it has ended.
        if executed or mine or (line.tid not in self.begun and self._makes_tasks()):
            self.threads.add(line.tid)
        if line.tid not in self.threads:
            return False
        if line.name in _MAKES_TASKS and line.value() > 0:
            self.threads.add(str(line.value()))
        return True

    def _makes_tasks(self) -> bool:
        return any(self.begun[tid].name in _MAKES_TASKS for tid in self.begun.keys() & self.threads)

    def begins(self, line: _Line) -> None:
        """Remember that a call has begun."""
        if line.tid in self.begun or len(self.begun) < _MOST_BEGUN:
            self.begun[line.tid] = line

    def ends(self, line: _Line) -> _Line | None:
        """Return the beginning of a call that ends here, if it is known."""
        return self.begun.pop(line.tid, None)


def lines(file: BinaryIO) -> Iterator[bytes]:
    """Yield the lines of `file`; of one that is longer than a mebibyte nothing but an empty line."""
    while line := file.readline(_MOST_LINE_BYTES):
        if line.endswith(b"\n") or len(line) < _MOST_LINE_BYTES:
            yield line
            continue
        while (line := file.readline(_MOST_LINE_BYTES)) and not line.endswith(b"\n"):
            pass
        yield b""


def calls(log: Iterable[bytes]) -> Iterator[str]:
    """Yield the calls in the lines `log` of runsc's debug log that the job made; the agent's own are left out.

    A call that has not ended when the log does comes last. What is yielded may contain control characters.
    """
    job = _Job()
    for entry in log:
        if not entry:
            yield f"[?] a call whose line has more than {_MOST_LINE_BYTES} bytes was left out"
            continue
        line = _parsed(entry)
        if line is None:
            continue
        mine = job.has(line)
        if line.begins:
            job.begins(line)
            continue
        beginning = job.ends(line)
        if mine:
            yield _written(line, beginning)
    for line in job.begun.values():
        if line.tid in job.threads:
            yield f"[{line.tid}] {_shown(line)} = ? <unfinished>"


def _parsed(entry: bytes) -> _Line | None:
    try:
        item = json.loads(entry)
    except ValueError:
        return None
    text = item.get("msg") if isinstance(item, dict) else None
    head = _HEAD.match(text) if isinstance(text, str) else None
    if head is None or not isinstance(text, str):
        return None
    rest = text[head.end() :]
    found = [call for call in _CALL.finditer(rest) if call.start() <= _MOST_NAME]
    if not found:
        return None
    end = rest.rfind(") = ")
    result = _RESULT.fullmatch(rest, end) if end >= 0 else None
    call = found[0]
    if len(found) == 1:
        begins, name, start = call["way"] == "E", call["name"], call.end()
    else:
        # The process calls itself something like a call: which of the two it made cannot be told.
        begins, name, start = result is None, _UNCLEAR, 0
    if not begins and result is None:
        return None
    # A path in what has only begun may look like a result.
    stop = len(rest) - rest.endswith(")") if begins else end
    return _Line(
        head["tgid"], head["tid"], name, rest[start:stop], begins=begins, result=None if begins else result
    )


def _written(line: _Line, beginning: _Line | None) -> str:
    assert line.result is not None  # noqa: S101 - a line without one only begins a call
    if _LEFT_OUT in line.arguments and beginning is not None and beginning.name == line.name:
        line.arguments = beginning.arguments
    return f"[{line.tid}] {_shown(line)} = {_result(line.result)} <{_seconds(line.result['time']):.6f}>"


def _shown(line: _Line) -> str:
    arguments = line.arguments
    if len(arguments) > _MOST_ARGUMENTS:
        arguments = arguments[:_MOST_ARGUMENTS] + "…"
    name = line.name
    if name.startswith("sys_"):
        from ringfence.sandbox.sentry import numbered

        name = numbered(name, os.uname().machine)
    return f"{name}({arguments})"


def _result(found: re.Match[str]) -> str:
    if found["errno"]:
        number = int(found["errno"])
        known = _RESTARTS.get(number)
        return f"{'?' if known else '-1'} {known or errorcode.get(number, number)} ({found['why']})"
    value = int(found["value"])
    return hex(value) if value >= _ADDRESSES else str(value)


def _seconds(text: str) -> float:
    """Return the seconds of a duration as Go writes it, "1m2.5s" or "3.5µs"; 0 for one without sense."""
    try:
        return sum(float(number) * _SECONDS[unit] for number, unit in _DURATION.findall(text))
    except ValueError:
        return 0.0
