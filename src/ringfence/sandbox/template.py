"""Boot a machine without a job, and save it for all of its shape to be restored from.

The machine that is saved is a sandbox like any other, in a ring of its own, but without a job: its guest says HELLO to
us, is saved while it waits for SETUP, and ends. It hangs on our control socket, as all do.
"""

from __future__ import annotations

import os
import select
import socket
import time
from _struct import Struct

from ringfence.errors import SandboxError
from ringfence.runtime.bridge import SAVE
from ringfence.sandbox import launch

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

    from ringfence.plan.document import Plan
    from ringfence.sandbox.launch import Running

# A boot under emulation on a busy machine, and the writing of some ten megabytes.
_MAKE_S = 40.0
# agent/LINK.md: a frame's header, the one frame that a guest says before it is told something, the machine's channel.
_HEADER = Struct("<IBBH")
_HELLO, _MACHINE = 1, 0xFFFF
_LINK_VERSION = b"\x01\x00\x00\x00"
_MOST_HELLO_BYTES = 1 << 10


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
    running = launch.reserve(plan, "(saving a booted machine)")
    running.instance.snapshot = SAVE
    try:
        machine = _Machine(running)
        try:
            machine.save(descriptor, patience)
        finally:
            machine.close()
    finally:
        running.close()


class _Machine:
    """A machine whose guest's link and whose monitor are ours."""

    def __init__(self, running: Running) -> None:
        """Start it. Raises HostError, SandboxError; then nothing runs."""
        from ringfence.runtime.microvm.qemu import start

        pairs = [socket.socketpair() for _ in range(3)]
        self._control, self._link, self._monitor = (ours for ours, _ in pairs)
        # Nobody has anything to ask it: in the place of the listener there is nothing.
        nothing = os.open("/dev/null", os.O_RDONLY | os.O_CLOEXEC)
        control, link, monitor = (theirs.fileno() for _, theirs in pairs)
        held = () if running.image_fd < 0 else (running.image_fd,)
        given = (control, nothing, running.entry.lock_fd, *held)
        try:
            running.starting = start(running.plan, running.instance, given, (link, monitor))
        except BaseException:
            self.close()
            raise
        finally:
            os.close(nothing)
            for _, theirs in pairs:
                theirs.close()

    def save(self, descriptor: int, patience: Patience) -> None:
        """Wait for the guest's HELLO, then write the machine into `descriptor`. Raises SandboxError, Interrupted."""
        from ringfence.runtime.microvm.qmp import Monitor

        _hear_hello(self._link, patience)
        monitor = Monitor(self._monitor, patience.wait)
        monitor.save(descriptor)
        monitor.quit()

    def close(self) -> None:
        """Let go of it: with our end of the control socket the bridge ends, and the machine with it. Idempotent."""
        for sock in (self._control, self._link, self._monitor):
            sock.close()


def _hear_hello(link: socket.socket, patience: Patience) -> None:
    """Read the one frame of the guest's; whoever broke out of it may say anything. Raises SandboxError, Interrupted."""
    said = b""
    wanted = _HEADER.size
    while len(said) < wanted:
        patience.wait(link)
        piece = link.recv(wanted - len(said))
        if not piece:
            raise SandboxError("the machine ended before it could be saved")
        said += piece
        if len(said) == _HEADER.size:
            length, kind, _, channel = _HEADER.unpack(said)
            if (kind, channel) != (_HELLO, _MACHINE) or not 8 < length <= _MOST_HELLO_BYTES:
                raise SandboxError("the guest does not begin with HELLO")
            wanted += length
    if said[_HEADER.size :][:4] != _LINK_VERSION:
        raise SandboxError("the guest's agent is of another version")
