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
_LAST_WORDS_S = 1.0
# proc_pid_oom_score_adj(5): chosen before every other process of the group.
_FIRST_TO_DIE = b"1000"
_MOST_WORDS = 600
_CONSOLE_LINES = 8


def found(running: Running, greeter: int) -> Guest:
    """Return the sandbox's processes as far as they are known; `greeter` is who spoke on the agent's socket."""
    if running.plan["isolation"] == "microvm":
        return Guest(report={}, parts={"bridge": greeter})
    return Guest(report={}, parts={"door": running.agent_pid, "sentry": greeter})


def subject(guest: Guest) -> int:
    """Return the host's process in which the kernel inside runs."""
    return guest.parts.get("sentry") or guest.parts["vmm"]


def settle(running: Running, guest: Guest) -> None:
    """Wait until only the sandbox's own processes are left, set the job's limits, and ask for the report.

    Raises SandboxError, HostError.
    """
    settled = _only_machine if running.plan["isolation"] == "microvm" else _only_sentry
    deadline = time.monotonic() + _SETTLE_S
    while not settled(guest):
        if running.wait_gone(0):
            raise failure(running)
        if time.monotonic() > deadline:
            raise SandboxError(
                "the runtime does not end after it has started the sandbox", hint="see --debug"
            )
        time.sleep(_PAUSE_S)
    _set_limits(running)
    _die_first(subject(guest))
    connection = running.connection
    assert connection is not None  # noqa: S101 - start() has set it
    connection.send(protocol.encode_report())
    answer = connection.recv()
    if answer is None or answer[0] != protocol.REPORTED:
        raise failure(running)
    guest.report = protocol.decode_reported(answer[2])


def _only_sentry(guest: Guest) -> bool:
    """Say whether the door has given up its rights, and no child is left to it but the sentry and the gofer."""
    sentry, door = guest.parts["sentry"], guest.parts["door"]
    children = _children(door)
    if len(children) != 2 or sentry not in children:
        return False
    guest.parts["gofer"] = next(pid for pid in children if pid != sentry)
    return _is_powerless(door)


def _only_machine(guest: Guest) -> bool:
    """Say whether the VMM is the one child of the bridge."""
    children = _children(guest.parts["bridge"])
    if len(children) != 1:
        return False
    guest.parts["vmm"] = children[0]
    return True


def door(running: Running) -> int:
    """Return the pid of the sandbox's first process on the host. Raises HostError."""
    # On a busy machine all that is inside may be up before crun or runc has written the file.
    if running.starting is not None:
        running.starting.wait()
    return door_pid(running.instance)


def check_door(running: Running) -> None:
    """Raise SandboxError unless the pid that was read from a file, and is open now, is this very sandbox's door."""
    try:
        with open(f"/proc/{running.agent_pid}/cmdline", "rb") as file:
            words = file.read(1 << 16).split(b"\0")
    except OSError:
        words = []
    if b"--door" not in words[:2] or running.instance.id.encode() not in words:
        raise SandboxError("the sandbox ended while it was started", hint="see --debug")


def failure(running: Running) -> RingfenceError:
    """Return why a sandbox with a kernel of its own is gone before its job began, in that kernel's own words."""
    _wait_for_last_words(running)
    machine = running.plan["isolation"] == "microvm"
    what = "the microVM" if machine else "gVisor"
    if running.cgroup is not None and running.cgroup.oom_kills() > 0:
        return SandboxError(
            f"{what} ended before the job started: the memory limit is too small",
            hint="raise limits.memory (--memory)",
        )
    said = "; ".join(line.strip() for line in _said(running)[-_MOST_WORDS:].splitlines() if line.strip())
    if "invalid number of instructions" in said:
        return HostError(
            "the seccomp profile is too large for gVisor's kernel, which takes 4,096 instructions",
            hint="fewer rules with arguments; seccomp: default fits",
        )
    if machine:
        hint = "'ringfence kernel ls' lists the kernels; 'ringfence doctor' looks at KVM and QEMU"
    else:
        hint = "'ringfence doctor' says which of gVisor's platforms work here"
    if not said:
        hint += "; a seccomp profile of your own must allow what the agent needs (agent/PROTOCOL.md)"
    return HostError(f"{what} could not start the sandbox: {said or 'it said nothing'}", hint=hint)


def _wait_for_last_words(running: Running) -> None:
    """Wait until door or bridge, which closes its connection first and then writes down what was said, is gone."""
    if running.pidfd >= 0 or running.cgroup is None:
        running.wait_gone(_LAST_WORDS_S)
        return
    # It did not come as far as telling who it is, but it is in the sandbox's group.
    deadline = time.monotonic() + _LAST_WORDS_S
    while running.cgroup.procs() and time.monotonic() < deadline:
        time.sleep(_PAUSE_S)


def _said(running: Running) -> str:
    """Return the words of what runs the sandbox, and of the kernel inside."""
    said = words(running.entry.directory)
    machine = running.plan["machine"]
    if machine is not None and machine["vmm"] == "firecracker":
        from ringfence.runtime.microvm.firecracker import explain

        return explain(said)
    return said


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
    # A machine has its memory from the beginning, and its guest's kernel keeps the job's limit.
    if isinstance(limit, int) and running.plan["isolation"] == "gvisor":
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


def ran_out_of_memory(running: Running) -> bool:
    """Say whether a machine that ended without a word had its agent killed for want of memory, by its console.

    Files in memory belong to no process, so the guest's kernel may choose the agent where the job has filled them.
    """
    return "out of memory: Killed process" in words(running.entry.directory)


def notes(running: Running, *, crashed: bool) -> tuple[str, ...]:
    """Return what the kernel inside had to say about a job that failed; `crashed` if it went away without a word."""
    if running.plan["isolation"] == "microvm":
        return _machine_notes(running, crashed=crashed)
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


def _machine_notes(running: Running, *, crashed: bool) -> tuple[str, ...]:
    """Return the end of the guest's console, where a kernel that panics says why."""
    if not crashed:
        return ()
    lines = [line for line in _said(running).splitlines() if line.strip()][-_CONSOLE_LINES:]
    if not lines:
        return ("the microVM was killed, without a word on its console",)
    return ("the microVM ended; the last lines of its console:", *(f"  {line}" for line in lines))
