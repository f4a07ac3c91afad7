"""Boot a machine without a job, and save it for all of its shape to be restored from.

The machine that is saved is a sandbox like any other, in a ring of its own, but without a job and without the host's
end of its link: its guest boots, opens the link, and waits for somebody at the other end before it says HELLO. There
it is saved. A restored guest finds the bridge of its own ring there, and goes on as one that has just booted.
"""

from __future__ import annotations

import os
import select
import socket
import time

from ringfence.errors import SandboxError
from ringfence.runtime.bridge import LINK, SAVE
from ringfence.sandbox import launch

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

    from ringfence.plan.document import Plan
    from ringfence.sandbox.launch import Running

# A boot under emulation on a busy machine, and the writing of some ten megabytes.
_MAKE_S = 40.0
# The state of the devices, and the little that goes with each page of memory.
_DEVICES_BYTES = 64 << 20


class Patience:
    """Waits for sockets until the time is up or the user has given up."""

    def __init__(self, wake_fd: int, interrupted: Callable[[], bool]) -> None:
        """Start the clock. When `wake_fd` can be read, `interrupted` says whether to give up."""
        self._wake_fd = wake_fd
        self._interrupted = interrupted
        self._deadline_s = time.monotonic() + _MAKE_S

    def wait(self, sock: socket.socket) -> None:
        """Return when `sock` can be read. Raises SandboxError, Interrupted."""
        poll = select.poll()
        for fd in (sock.fileno(), *([self._wake_fd] if self._wake_fd >= 0 else [])):
            poll.register(fd, select.POLLIN)
        while True:
            ready = dict(poll.poll(max(0.0, self._deadline_s - time.monotonic()) * 1000))
            if sock.fileno() in ready:
                return
            if not ready:
                raise SandboxError(f"the machine was not saved within {_MAKE_S:.0f} s")
            if self._interrupted():
                raise launch.Interrupted


def save(plan: Plan, descriptor: int, patience: Patience) -> None:
    """Boot a machine of `plan`, save it into `descriptor`, and end it. Raises SandboxError, HostError, Interrupted."""
    running = launch.reserve(_bounded(plan), "(saving a booted machine)")
    running.instance.snapshot = SAVE
    try:
        machine = _Machine(running)
        try:
            machine.save(descriptor, patience)
        finally:
            machine.close()
    finally:
        running.close()


def _bounded(plan: Plan) -> Plan:
    """Return `plan` with a bound on what its VMM may write, which may be in the hands of a hostile image already."""
    machine, process = plan["machine"], plan["oci"]["process"]
    assert machine is not None  # noqa: S101 - snapshots.possible has seen to it
    most = machine["memory_bytes"] + _DEVICES_BYTES
    limits = [*process["rlimits"], {"type": "RLIMIT_FSIZE", "soft": most, "hard": most}]
    return {**plan, "oci": {**plan["oci"], "process": {**process, "rlimits": limits}}}  # type: ignore[typeddict-item]


class _Machine:
    """A machine whose monitor is ours."""

    def __init__(self, running: Running) -> None:
        """Start it. Raises HostError, SandboxError; then nothing runs."""
        from ringfence.runtime.microvm.qemu import start

        pairs = [socket.socketpair() for _ in range(2)]
        self._control, self._monitor = (ours for ours, _ in pairs)
        # Nobody has anything to ask it: in the place of the listener there is nothing.
        nothing = os.open("/dev/null", os.O_RDONLY | os.O_CLOEXEC)
        control, monitor = (theirs.fileno() for _, theirs in pairs)
        held = () if running.image_fd < 0 else (running.image_fd,)
        given = (control, nothing, running.entry.lock_fd, *held)
        try:
            running.starting = start(running.plan, running.instance, given, (monitor,))
        except BaseException:
            self.close()
            raise
        finally:
            os.close(nothing)
            for _, theirs in pairs:
                theirs.close()

    def save(self, descriptor: int, patience: Patience) -> None:
        """Boot it until its guest has opened the link, and save it. Raises SandboxError, Interrupted."""
        from ringfence.runtime.microvm.qmp import Monitor

        monitor = Monitor(self._monitor, patience.wait)
        monitor.boot(LINK)
        monitor.save(descriptor)
        monitor.quit()

    def close(self) -> None:
        """Let go of it: with our end of the control socket the bridge ends, and the machine with it. Idempotent."""
        for sock in (self._control, self._monitor):
            sock.close()
