"""Carry a job's standard streams to and fro until it ends, within its time and output limits.

Nothing here may block on one end: a reader of our output that stops reading, or a job that does not read its input,
must not keep the time limit from being kept. On the way of every run: imports only `os` and `select`.
"""

from __future__ import annotations

import errno
import os
import select
import stat
import time

from ringfence.errors import SandboxError
from ringfence.sandbox import protocol

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Protocol

    class Attended(Protocol):
        """What is asked of a sandbox, or of a session in one, while its streams are carried."""

        connection: protocol.Connection | None
        command: str

        def kill(self) -> None:
            """End the job at once."""


_CHUNK_BYTES = 1 << 16
# A pipe or terminal that poll(2) calls writable takes this much without blocking: pipe(7), PIPE_BUF.
_SAFE_BYTES = 4096
# What a signal needs to reach a job through its agent.
_SIGNAL_S = 0.02
# After the job's end its last processes are dying, and with them the other ends of the pipes.
_DRAIN_S = 5.0
# The agent keeps the time limit as well; the host's own clock comes first and does not depend on it.
_AGENT_GRACE_S = 1.0


class Budget:
    """How many bytes of output, of both streams together, are passed on; None is no limit."""

    __slots__ = ("dropped_bytes", "left")

    def __init__(self, limit_bytes: int | None) -> None:
        """Start with the whole limit."""
        self.left = limit_bytes
        self.dropped_bytes = 0

    def take(self, data: bytes) -> bytes:
        """Return as much of `data` as may pass, and count the rest as dropped."""
        if self.left is None:
            return data
        passed = data[: self.left]
        self.left -= len(passed)
        self.dropped_bytes += len(data) - len(passed)
        return passed


class Collect:
    """A sink that keeps what it gets, in memory."""

    __slots__ = ("data", "fd", "pending")

    def __init__(self) -> None:
        """Start empty."""
        self.data = bytearray()
        self.fd = -1
        self.pending = b""

    def put(self, data: bytes) -> bool:
        """Keep `data`."""
        self.data += data
        return True

    def flush(self) -> bool:
        """Do nothing: nothing is ever pending."""
        return True

    def close(self) -> None:
        """Do nothing: nothing is open."""


class Forward:
    """A sink that writes to a descriptor of ours, a little at a time and only when it can be written."""

    __slots__ = ("_opened", "fd", "pending", "whole")

    def __init__(self, fd: int) -> None:
        """Write to `fd`, which stays the caller's."""
        self._opened = _unblocked(fd)
        self.fd = fd if self._opened < 0 else self._opened
        self.pending = b""
        self.whole = self._opened >= 0 or stat.S_ISREG(os.fstat(fd).st_mode)

    def put(self, data: bytes) -> bool:
        """Take `data`; False when nobody will ever read it."""
        self.pending = data
        return self.flush() if self.whole else True

    def close(self) -> None:
        """Close what was opened here. Idempotent."""
        if self._opened >= 0:
            os.close(self._opened)
            self._opened = self.fd = -1

    def flush(self) -> bool:
        """Write some of what is pending, after poll(2) said that this is possible."""
        try:
            most = len(self.pending) if self.whole else _SAFE_BYTES
            self.pending = self.pending[os.write(self.fd, self.pending[:most]) :]
        except BlockingIOError:
            return True
        except OSError as error:
            self.pending = b""
            if error.errno in (errno.EPIPE, errno.EIO, errno.EBADF):
                return False
            raise SandboxError(
                f"cannot write the job's output: {error.strerror}", hint="free some space there"
            ) from error
        return True


def _unblocked(fd: int) -> int:
    """Return another descriptor of the same pipe or terminal that never blocks, -1 where there is none.

    Setting O_NONBLOCK on `fd` itself would set it for everybody who shares it, such as our caller's shell. And poll(2)
    is not enough: what it promises of a pipe, the other of our two sinks may have used up, and of a terminal it
    promises no more than one byte.
    """
    mode = os.fstat(fd).st_mode
    # Not a pty's master, behind whose name there is always a new one.
    slave = stat.S_ISCHR(mode) and os.isatty(fd) and os.fstat(fd).st_rdev != os.makedev(5, 2)
    if not (slave or stat.S_ISFIFO(mode)):
        return -1
    try:
        return os.open(f"/proc/self/fd/{fd}", os.O_WRONLY | os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC)
    except OSError:  # a terminal that belongs to somebody else
        return -1


class Unread:
    """A sink in the place of one whose reader has gone, for a job that a kernel of its own does not tell so.

    gVisor's kernel answers EPIPE to a write into a pipe of the host's that nobody reads, and sends no SIGPIPE: a
    program that looks at neither would write for ever.
    """

    __slots__ = ("_tell", "fd", "pending")

    def __init__(self, tell: Callable[[], None]) -> None:
        """Wait for the job's next write; `tell` sends SIGPIPE then."""
        self._tell = tell
        self.fd = -1
        self.pending = b""

    def put(self, data: bytes) -> bool:  # noqa: ARG002 - nobody wants it
        """Send the signal; False, for the pipe is to be closed. A job that ignores SIGPIPE gets EPIPE then."""
        try:
            self._tell()
        except SandboxError:  # it has just ended
            pass
        # Before the pipe is closed, or whatever the program says about EPIPE would be seen as well.
        time.sleep(_SIGNAL_S)
        return False

    def flush(self) -> bool:
        """Do nothing: nothing is ever pending."""
        return True

    def close(self) -> None:
        """Do nothing: nothing is open."""


Sink = Collect | Forward | Unread


class Source:
    """Where the job's input comes from: bytes, then perhaps a descriptor `fd` of ours."""

    __slots__ = ("end", "fd", "pending", "to_fd")

    def __init__(self, to_fd: int, *, data: bytes = b"", fd: int = -1, end: bytes = b"") -> None:
        """Feed `to_fd`, which this object owns and makes non-blocking; `end` goes last (a terminal's Ctrl-D)."""
        os.set_blocking(to_fd, False)
        self.to_fd = to_fd
        self.pending = data
        self.fd = fd
        self.end = end

    def read(self) -> None:
        """Take more from `fd`, after poll(2) said that there is some."""
        try:
            self.pending = os.read(self.fd, _CHUNK_BYTES)
        except OSError:
            self.pending = b""
        if not self.pending:
            self.fd = -1
            self.pending, self.end = self.end, b""

    def write(self) -> None:
        """Give the job some of what is pending."""
        try:
            self.pending = self.pending[os.write(self.to_fd, self.pending) :]
        except BlockingIOError:
            return
        except OSError:  # it does not want any more
            self.pending = b""
            self.fd = -1

    def done(self) -> bool:
        """Whether there is nothing left to give."""
        return not self.pending and self.fd < 0

    def close(self) -> None:
        """Let the job see the end of its input."""
        if self.to_fd >= 0:
            os.close(self.to_fd)
            self.to_fd = -1


class Ending:
    """How it went: the agent's word, or None if it had no time for one, and what the host did."""

    __slots__ = ("exited", "timed_out")

    def __init__(self) -> None:
        """Nothing has happened yet."""
        self.exited: tuple[int, int, int] | None = None
        self.timed_out = False


class Attendance:
    """One job being attended to until it ends."""

    def __init__(
        self,
        running: Attended,
        outputs: dict[int, Sink],
        source: Source | None,
        *,
        budget: Budget,
        deadline_s: float | None,
        wake_fd: int = -1,
        on_wake: Callable[[], None] | None = None,
        on_unread: Callable[[], None] | None = None,
    ) -> None:
        """Attend to `running`: `outputs` maps descriptors that the job writes to (ours to close) to sinks.

        `deadline_s` is a time of time.monotonic(); `on_wake` is called when `wake_fd` has something to read.
        `on_unread` sends the job a SIGPIPE, where its own kernel does not: see `Unread`.
        """
        self.running = running
        self.outputs = outputs
        self.source = source
        self.budget = budget
        self.deadline_s = deadline_s
        self.wake_fd = wake_fd
        self.on_wake = on_wake
        self.on_unread = on_unread
        self.ending = Ending()
        self._agent_lives = True
        self._drain_until_s = 0.0

    def run(self) -> Ending:
        """Return when the job has ended and its output is passed on."""
        try:
            while self._agent_lives or self.outputs:
                if not self._turn():
                    break
        finally:
            for fd in list(self.outputs):
                self._close(fd)
            if self.source is not None:
                self.source.close()
        return self.ending

    def _turn(self) -> bool:
        poll, wanted = select.poll(), self._wanted()
        for fd, events in wanted.items():
            poll.register(fd, events)
        ready = dict(poll.poll(self._patience_ms()))
        now = time.monotonic()
        if self.deadline_s is not None and now >= self.deadline_s and self._agent_lives:
            self.ending.timed_out = True
            self.deadline_s = None
            self.running.kill()
        if not ready and not self._agent_lives and now > self._drain_until_s and not self._pending():
            return False
        self._serve(ready)
        return True

    def _wanted(self) -> dict[int, int]:
        wanted: dict[int, int] = {}
        if self._agent_lives:
            wanted[self._connection().fileno()] = select.POLLIN
        if self.wake_fd >= 0:
            wanted[self.wake_fd] = select.POLLIN
        for fd, sink in self.outputs.items():
            if sink.pending:
                wanted[sink.fd] = wanted.get(sink.fd, 0) | select.POLLOUT
            else:
                wanted[fd] = select.POLLIN
        source = self.source
        if source is not None and self._agent_lives:
            if source.pending:
                wanted[source.to_fd] = wanted.get(source.to_fd, 0) | select.POLLOUT
            elif source.fd >= 0:
                wanted[source.fd] = wanted.get(source.fd, 0) | select.POLLIN
        return wanted

    def _patience_ms(self) -> float | None:
        ends = [self.deadline_s] if self.deadline_s is not None and self._agent_lives else []
        if not self._agent_lives and not self._pending():
            ends.append(self._drain_until_s)
        return max(0.0, (min(ends) - time.monotonic()) * 1000) + 1 if ends else None

    def _pending(self) -> bool:
        """Whether somebody is still to read something, for whom it is worth to wait: not beyond the time limit."""
        return not self.ending.timed_out and any(sink.pending for sink in self.outputs.values())

    def _connection(self) -> protocol.Connection:
        connection = self.running.connection
        assert connection is not None  # noqa: S101 - it is closed after us
        return connection

    def _serve(self, ready: dict[int, int]) -> None:
        if self.wake_fd in ready and self.on_wake is not None:
            self.on_wake()
        source = self.source
        if source is not None:
            if source.pending and source.to_fd in ready:
                source.write()
            elif source.fd in ready:
                source.read()
            if source.done():
                source.close()
                self.source = None
        for fd, sink in list(self.outputs.items()):
            if sink.pending and sink.fd in ready:
                self._keep_or_close(fd, sink.flush())
            elif not sink.pending and fd in ready:
                self._pass_on(fd, sink)
        if self._agent_lives and self._connection().fileno() in ready:
            self._hear()

    def _pass_on(self, fd: int, sink: Sink) -> None:
        try:
            data = os.read(fd, _CHUNK_BYTES)
        except BlockingIOError:
            return
        except OSError:  # a pty whose last user is gone: EIO
            data = b""
        if not data:
            self._close(fd)
            return
        passed = self.budget.take(data)
        if passed:
            self._keep_or_close(fd, sink.put(passed))

    def _keep_or_close(self, fd: int, readable: bool) -> None:
        # Nobody reads our output: the job gets SIGPIPE, as it would without us.
        if readable:
            return
        if self.on_unread is None or isinstance(self.outputs[fd], Unread):
            self._close(fd)
        else:
            self.outputs[fd].close()
            self.outputs[fd] = Unread(self.on_unread)

    def _close(self, fd: int) -> None:
        os.close(fd)
        self.outputs.pop(fd).close()

    def _hear(self) -> None:
        try:
            frame = self._connection().recv()
        except (BlockingIOError, TimeoutError):
            return
        if frame is None:
            self._agent_lives = False
            self._drain_until_s = time.monotonic() + _DRAIN_S
        elif frame[0] == protocol.EXITED:
            self.ending.exited = protocol.decode_exited(frame[2])
        elif frame[0] == protocol.FAILED:
            from ringfence.sandbox.launch import failure

            raise failure(frame[2], self.running.command)


def relay() -> tuple[int, int]:
    """Return two ends of a connection that stands for a terminal's: ours, and the one for the agent."""
    import _socket

    ours, theirs = _socket.socketpair(_socket.AF_UNIX, _socket.SOCK_STREAM)
    return ours.detach(), theirs.detach()


def agent_deadline_ms(time_s: float | None) -> int:
    """Return the agent's own time limit: a little later than the host's, 0 for none."""
    return 0 if time_s is None else max(1, round((time_s + _AGENT_GRACE_S) * 1000))
