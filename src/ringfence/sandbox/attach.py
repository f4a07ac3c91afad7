"""Talk to the agent of a running sandbox through its socket: run another command there, or bring it to its end.

What is started this way is a child of the agent, like the first job: namespaces, user, capabilities, seccomp,
limits and cgroup are inherited and not set up once more. The socket is mode 0600 in a directory of mode 0700.
"""

from __future__ import annotations

import _socket
import os
import select
import struct
import time
from contextlib import suppress

from ringfence.errors import RingfenceError, SandboxError
from ringfence.sandbox import protocol, reap
from ringfence.sandbox.launch import failure
from ringfence.sandbox.streams import relay

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from ringfence.sandbox.store import Entry

ANSWER_TIMEOUT_S = 10.0
_SIGTERM = 15
# The agent waits two seconds at most for what it killed.
_SHUTDOWN_S = 3.0
# A launcher needs some milliseconds to clean up after its sandbox.
_SETTLE_S = 2.0
_SO_PASSCRED = 16
_SCM_CREDENTIALS = 2
_UCRED = struct.Struct("=iII")
_TIMEVAL = struct.Struct("@ll")


def connect(
    entry: Entry, *, timeout_s: float = ANSWER_TIMEOUT_S
) -> tuple[protocol.Connection, tuple[int, int]]:
    """Return a connection to the agent of `entry`, which has said that it is ready, and the agent's host uid and gid.

    Waits for one that is still starting. Raises SandboxError when it has ended or does not answer in time.
    """
    deadline = time.monotonic() + timeout_s
    sock = _socket.socket(_socket.AF_UNIX, _socket.SOCK_STREAM)
    connection = protocol.Connection(sock)
    try:
        # connect(2) waits while the agent's queue is full, and this is its only time limit: unix(7), socket(7).
        sock.setsockopt(_socket.SOL_SOCKET, _socket.SO_SNDTIMEO, _TIMEVAL.pack(int(timeout_s) + 1, 0))
        sock.setsockopt(_socket.SOL_SOCKET, _SO_PASSCRED, 1)
        while not _reached(sock, entry):
            if time.monotonic() > deadline:
                raise _no_answer(entry, timeout_s)
            time.sleep(0.01)
        sock.settimeout(max(0.001, deadline - time.monotonic()))
        owner = _owner(sock)
        frame = connection.recv()
        if frame is None:
            raise not_running(entry)
        if frame[0] != protocol.READY or protocol.decode_ready(frame[2])[0] != protocol.VERSION:
            raise SandboxError(
                f"the agent of sandbox {entry.id} speaks another protocol", hint="stop it and run it again"
            )
        sock.settimeout(ANSWER_TIMEOUT_S)
    except (TimeoutError, BlockingIOError):
        connection.close()
        raise _no_answer(entry, timeout_s) from None
    except BaseException:
        connection.close()
        raise
    return connection, owner


def _reached(sock: _socket.socket, entry: Entry) -> bool:
    try:
        sock.connect(entry.path("control.sock"))
    except (FileNotFoundError, ConnectionRefusedError):
        if not entry.alive():
            raise not_running(entry) from None
        return False
    return True


def _owner(sock: _socket.socket) -> tuple[int, int]:
    """Return the uid and gid of whoever answers, in the kernel's words: unix(7), SCM_CREDENTIALS; else (-1, -1)."""
    _, ancillary, _, _ = sock.recvmsg(1, _socket.CMSG_SPACE(_UCRED.size), _socket.MSG_PEEK)
    sock.setsockopt(_socket.SOL_SOCKET, _SO_PASSCRED, 0)
    for level, kind, value in ancillary:
        if level == _socket.SOL_SOCKET and kind == _SCM_CREDENTIALS:
            _, uid, gid = _UCRED.unpack(value)
            return uid, gid
    return -1, -1


def not_running(entry: Entry) -> SandboxError:
    """Return the error that says that a sandbox has ended."""
    return SandboxError(f"sandbox {entry.id} is not running", hint="'ringfence ps --all' says how it ended")


def _no_answer(entry: Entry, timeout_s: float) -> SandboxError:
    return SandboxError(
        f"sandbox {entry.id} does not answer within {timeout_s:g} s", hint=f"ringfence stop {entry.id}"
    )


class Session:
    """One more job in a running sandbox. It ends with its connection, and so with this process."""

    __slots__ = ("command", "connection", "killed", "owner", "pty", "relayed")

    def __init__(self, entry: Entry, command: str) -> None:
        """Connect; `command` is the first word of the job, for messages. Raises SandboxError.

        `owner` are the host uid and gid of the job, (-1, -1) where nothing can be given to them (rootless,
        or a kernel of its own). `relayed` says that a terminal needs the flag RELAY.
        """
        self.connection: protocol.Connection | None
        self.connection, self.owner = connect(entry)
        if entry.record().get("rootless") or entry.record().get("isolation") != "linux":
            self.owner = (-1, -1)
        self.relayed = entry.record().get("isolation") != "linux"
        self.command = command
        self.killed = False
        self.pty = -1

    def start_with_terminal(self, frame: bytes) -> None:
        """Hand over a START with TTY, and RELAY where `relayed` is set; `pty` is our end of the terminal then."""
        if not self.relayed:
            self.start(frame, ())
            return
        self.pty, theirs = relay()
        try:
            self.start(frame, (theirs,))
        finally:
            os.close(theirs)

    def start(self, frame: bytes, descriptors: Sequence[int]) -> None:
        """Hand over a START with HOLD, and let the job go. Raises CommandError, SandboxError when nothing was run."""
        connection = self._connected()
        connection.send(frame, descriptors)
        try:
            answer = connection.recv()
        except TimeoutError:
            raise SandboxError(
                f"the sandbox does not start {self.command!r}", hint="it may be paused, or out of memory"
            ) from None
        if answer is None or answer[0] == protocol.EXITED:
            raise SandboxError(
                f"the sandbox ended before {self.command!r} started", hint="'ringfence ps --all' says how"
            )
        kind, _, payload, received = answer
        if kind == protocol.FAILED:
            raise failure(payload, self.command)
        if received:
            self.pty = received[0]
        connection.send(protocol.encode_go())

    def kill(self) -> None:
        """Kill the job and all of its session: the agent does so when we have nothing more to say."""
        self.killed = True
        self._connected().sock.shutdown(_socket.SHUT_WR)

    def close(self) -> None:
        """End the job if it still runs."""
        if self.connection is not None:
            self.connection.close()
            self.connection = None

    def _connected(self) -> protocol.Connection:
        assert self.connection is not None  # noqa: S101 - only close() takes it away
        return self.connection


def ended(connection: protocol.Connection, timeout_s: float) -> bool:
    """Wait until the sandbox has ended, `timeout_s` seconds at most, and say whether it has."""
    poll = select.poll()
    poll.register(connection.fileno(), select.POLLIN)
    if not poll.poll(timeout_s * 1000):
        return False
    try:
        return connection.recv() is None
    except (TimeoutError, BlockingIOError):
        return False


def stop(entries: Iterable[Entry], *, grace_s: float) -> list[RingfenceError | None]:
    """Bring sandboxes to their ends and clean up; return for each what went wrong, or None.

    Their jobs get SIGTERM and, all at once, `grace_s` seconds; then everything in them is killed. With 0 there is
    no SIGTERM. A sandbox counts as stopped only when no process of it is left.
    """
    asked = [(entry, _asked_to_end(entry, grace_s)) for entry in entries]
    connections = [connection for _, connection in asked if connection is not None]
    _wait_for(connections, grace_s)
    for connection in connections:
        with suppress(SandboxError):  # it has ended
            connection.send(protocol.encode_shutdown())
    _wait_for(connections, _SHUTDOWN_S)
    for connection in connections:
        connection.close()
    return [_buried(entry, answered=connection is not None) for entry, connection in asked]


def _asked_to_end(entry: Entry, grace_s: float) -> protocol.Connection | None:
    """Return a connection on which SIGTERM was sent; None when there is nobody to talk to."""
    try:
        connection, _ = connect(entry, timeout_s=max(1.0, min(grace_s, ANSWER_TIMEOUT_S)))
    except SandboxError:
        return None
    if grace_s > 0:
        with suppress(SandboxError):  # it ends just now, which shows on the connection
            wanted = entry.record().get("stop_signal")
            connection.send(protocol.encode_signal(wanted if isinstance(wanted, int) else _SIGTERM))
    return connection


def _wait_for(connections: Sequence[protocol.Connection], timeout_s: float) -> None:
    """Wait until all sandboxes have ended, or `timeout_s` seconds are over."""
    deadline = time.monotonic() + timeout_s
    for connection in connections:
        ended(connection, max(0.0, deadline - time.monotonic()))


def _buried(entry: Entry, *, answered: bool) -> RingfenceError | None:
    """Kill what may be left of `entry` and clean up, unless its launcher does; return what went wrong."""
    try:
        group = reap.cgroup_of(entry.record())
        had_agent = answered or (group is not None and bool(group.procs()))
        if group is not None:
            group.kill()
        # Held although it had an agent and has no process any more: by a launcher that is itself stopped. It will
        # clean up, or gc after it. Without an agent, there may be one yet.
        if not _unheld(entry) and (group is None or not had_agent):
            return SandboxError(
                f"sandbox {entry.id} does not end",
                hint="kill the process that started it, then 'ringfence gc'",
            )
        if entry.try_lock():
            try:
                reap.reap(entry)
            finally:
                entry.unlock()
    except RingfenceError as error:
        return error
    return None


def _unheld(entry: Entry) -> bool:
    deadline = time.monotonic() + _SETTLE_S
    while entry.alive():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.005)
    return True
