"""A sandbox with a kernel of its own, seen from the host: its processes, its own words, and its memory at the gate."""

from __future__ import annotations

import os
import time

from ringfence.errors import HostError, SandboxError
from ringfence.proof.guest import Guest
from ringfence.runtime.door import door_pid, words
from ringfence.sandbox import protocol

TYPE_CHECKING = False
if TYPE_CHECKING:
    from ringfence.errors import RingfenceError
    from ringfence.sandbox.launch import Running

# runsc goes away some milliseconds after it has started the sandbox, and the door gives up its rights then.
_SETTLE_S = 5.0
_PAUSE_S = 0.001
# proc_pid_oom_score_adj(5): chosen before every other process of the group.
_FIRST_TO_DIE = b"1000"
_MOST_WORDS = 600


def found(running: Running, greeter: int) -> Guest:
    """Return the sandbox's processes as far as they are known; `greeter` is who spoke on the agent's socket."""
    return Guest(report={}, sentry_pid=greeter, gofer_pid=0, door_pid=running.agent_pid)


def settle(running: Running, guest: Guest) -> None:
    """Wait until only the sandbox's own processes are left, give the job its memory, and ask for the report.

    Raises SandboxError, HostError.
    """
    deadline = time.monotonic() + _SETTLE_S
    while not _alone(guest):
        if time.monotonic() > deadline:
            raise SandboxError("runsc does not end after it has started the sandbox", hint="see --debug")
        time.sleep(_PAUSE_S)
    _set_limits(running)
    _die_first(guest.sentry_pid)
    connection = running.connection
    assert connection is not None  # noqa: S101 - start() has set it
    connection.send(protocol.encode_report())
    answer = connection.recv()
    if answer is None or answer[0] != protocol.REPORTED:
        raise failure(running)
    guest.report = protocol.decode_reported(answer[2])


def _alone(guest: Guest) -> bool:
    """Say whether the door has given up its rights, and no child is left to it but the sentry and the gofer."""
    children = _children(guest.door_pid)
    if len(children) != 2 or guest.sentry_pid not in children:
        return False
    guest.gofer_pid = next(pid for pid in children if pid != guest.sentry_pid)
    return _is_powerless(guest.door_pid)


def door(running: Running) -> int:
    """Return the pid of the sandbox's first process on the host. Raises HostError."""
    return door_pid(running.instance)


def failure(running: Running) -> RingfenceError:
    """Return why a sandbox with a kernel of its own is gone before its job began, in that kernel's own words."""
    running.wait_gone(1.0)  # the door writes down the last words before it goes
    if running.cgroup is not None and running.cgroup.oom_kills() > 0:
        return SandboxError(
            "gVisor ended before the job started: the memory limit is too small",
            hint="raise limits.memory (--memory)",
        )
    said = words(running.entry.directory)[-_MOST_WORDS:].replace("\n", "; ")
    hint = "'ringfence doctor' says which of gVisor's platforms work here"
    if not said:
        hint += "; a seccomp profile of your own must allow what the agent needs (agent/PROTOCOL.md)"
    return HostError(f"gVisor could not start the sandbox: {said or 'it said nothing'}", hint=hint)


def _set_limits(running: Running) -> None:
    """Give the job its CPU time, and its memory beside what the sentry, the gofer and the door use without it."""
    group = running.cgroup
    if group is None:
        return
    asked = {control["name"]: control["asked"] for control in running.plan["controls"]}
    quota, period = asked.get("cgroup.cpu_quota_us"), asked.get("cgroup.cpu_period_us")
    if isinstance(quota, int) and isinstance(period, int):
        group.limit_cpu(quota, period)
    limit, swap = asked.get("cgroup.memory_bytes"), asked.get("cgroup.swap_bytes")
    if isinstance(limit, int):
        base = group.unreclaimable_bytes()
        group.limit_memory(limit + base, swap if isinstance(swap, int) else None)
        running.instance.memory_base_bytes = base


def _die_first(sentry: int) -> None:
    """Have the kernel end the whole sandbox when its memory is used up.

    It would rather kill one of the processes that stand for the job's address spaces, and the sentry would make of that
    an exit with status 1, which nobody could tell from the job's own.
    """
    try:
        fd = os.open(f"/proc/{sentry}/oom_score_adj", os.O_WRONLY | os.O_CLOEXEC)
    except OSError:
        return  # without root the sentry is nobody's of ours: it holds all the same, and only says less
    try:
        os.write(fd, _FIRST_TO_DIE)
    finally:
        os.close(fd)


def _children(pid: int) -> list[int]:
    try:
        fd = os.open(f"/proc/{pid}/task/{pid}/children", os.O_RDONLY | os.O_CLOEXEC)
    except OSError:
        return []
    try:
        return [int(word) for word in os.read(fd, 4096).split()]
    finally:
        os.close(fd)


def _is_powerless(pid: int) -> bool:
    try:
        fd = os.open(f"/proc/{pid}/status", os.O_RDONLY | os.O_CLOEXEC)
    except OSError:
        return False
    try:
        text = os.read(fd, 8192)
    finally:
        os.close(fd)
    return b"\nCapPrm:\t0000000000000000\n" in text


def notes(running: Running, *, crashed: bool) -> tuple[str, ...]:
    """Return what the kernel inside had to say about a job that failed; `crashed` if it went away without a word."""
    from ringfence.sandbox.sentry import last_words, unsupported

    said = words(running.entry.directory)
    found = []
    if crashed:
        found.append(last_words(said) or "gVisor's kernel was killed from outside, without a word of its own")
    lacking = unsupported(said)
    if lacking:
        found.append(
            f"the job made system calls that gVisor does not have: {', '.join(lacking)};"
            " if it failed for that, -i linux has them"
        )
    return tuple(found)
