"""The host's side of the conversation with the agent, PID 1 of every sandbox: agent/PROTOCOL.md.

What arrives here comes out of a sandbox: sizes, types and descriptor counts are checked first.
"""

import _struct as struct
from _socket import CMSG_SPACE, MSG_CMSG_CLOEXEC, MSG_CTRUNC, MSG_NOSIGNAL, SCM_RIGHTS, SOL_SOCKET
from os import close

from ringfence.errors import SandboxError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from _socket import socket
    from collections.abc import Iterator, Sequence

VERSION = 1
MAX_PAYLOAD_BYTES = 4 << 20
MAX_STRINGS = 1 << 18  # argv and env together
MAX_REPORT_BYTES = 1 << 18
# What a REPORTED frame may tell of: texts of /proc/PID/NAME, then of the sandbox's kernel as a whole.
REPORT_NAMES = frozenset(
    (
        "status",
        "limits",
        "mountinfo",
        "net/dev",
        "uid_map",
        "gid_map",
        "version",
        "hostname",
        "no_new_privileges",
    )
)

# host -> agent
START, GO, SIGNAL, RESIZE, SHUTDOWN, REPORT = 1, 2, 3, 4, 5, 6
# agent -> host
READY, PREPARED, FAILED, EXITED, REPORTED = 65, 66, 67, 68, 69

# flags of START
TTY, DETACH, HOLD, RELAY = 1, 2, 4, 8
# stages of FAILED
STAGE_FORK, STAGE_DESCRIPTORS, STAGE_CWD, STAGE_EXEC = 1, 2, 3, 4
# flags of EXITED and of a log's end record
TIMED_OUT, OUTPUT_TRUNCATED, OUT_OF_MEMORY = 1, 2, 4  # the last: agent/LINK.md
# streams of a log record
END, STDOUT, STDERR = 0, 1, 2

_HEADER = struct.Struct("<IBBH")
_START = struct.Struct("<IIQHHII")
_RECORD = struct.Struct("<QIBxxx")
_END_RECORD = struct.Struct("<IIIIQ")
_U32X2 = struct.Struct("<II")
_U32X3 = struct.Struct("<III")

_ANSWER_BYTES = {READY: 8, PREPARED: 8, FAILED: 8, EXITED: 12}
_MAX_DESCRIPTORS = 3
_ANCILLARY_BYTES = CMSG_SPACE(_MAX_DESCRIPTORS * 4)


def encode(kind: int, flags: int = 0, payload: bytes = b"") -> bytes:
    """Return one frame. Raises SandboxError if `payload` is longer than MAX_PAYLOAD_BYTES."""
    if len(payload) > MAX_PAYLOAD_BYTES:
        raise SandboxError(
            f"command and environment take {len(payload)} bytes, the limit is {MAX_PAYLOAD_BYTES}",
            hint="pass less on the command line, put the data in a file",
        )
    return _HEADER.pack(len(payload), kind, flags, 0) + payload


def encode_start(
    argv: "Sequence[bytes]",
    env: "Sequence[bytes]",
    cwd: bytes,
    *,
    flags: int = 0,
    deadline_ms: int = 0,
    output_limit_bytes: int = 0,
    cols: int = 0,
    rows: int = 0,
) -> bytes:
    """Return a START frame; `env` are ``NAME=value`` strings, `flags` of TTY | DETACH | HOLD | RELAY.

    `deadline_ms` 0 is none, counted from GO; `output_limit_bytes` 0 is none, and counts only with DETACH.
    Raises SandboxError for an empty `argv`, a relative `cwd`, a NUL byte inside a string, or too much of all.
    """
    strings = (cwd, *argv, *env)
    if not argv or not cwd.startswith(b"/"):
        raise SandboxError(f"the agent needs a command and an absolute directory, not {argv!r} in {cwd!r}")
    if len(strings) > MAX_STRINGS:
        raise SandboxError(f"{len(strings)} arguments and variables, the limit is {MAX_STRINGS}")
    tail = b"\0".join(strings) + b"\0"
    if tail.count(b"\0") != len(strings):
        raise SandboxError("a NUL byte inside an argument, a variable or the directory")
    head = _START.pack(deadline_ms, 0, output_limit_bytes, cols, rows, len(argv), len(env))
    return encode(START, flags, head + tail)


def encode_go() -> bytes:
    """Return the frame that lets a held job execute."""
    return encode(GO)


def encode_signal(signo: int) -> bytes:
    """Return the frame that signals the connection's own job, or the main job if it has none."""
    return encode(SIGNAL, 0, signo.to_bytes(4, "little"))


def encode_resize(cols: int, rows: int) -> bytes:
    """Return the frame that sets the window size of the connection's own job, which has a TTY."""
    return encode(RESIZE, 0, cols.to_bytes(2, "little") + rows.to_bytes(2, "little"))


def encode_shutdown() -> bytes:
    """Return the frame that kills everything in the sandbox and ends the agent."""
    return encode(SHUTDOWN)


def encode_report() -> bytes:
    """Return the frame that asks what the sandbox's kernel says of the connection's own job, which is held."""
    return encode(REPORT)


def decode_ready(payload: bytes) -> tuple[int, int]:
    """Return (protocol version, pid of the agent in its own pid namespace)."""
    version, pid = _U32X2.unpack(payload)
    return version, pid


def decode_prepared(payload: bytes) -> tuple[int, int]:
    """Return (pid of the job's first process in the sandbox, number of descriptors it says it has)."""
    pid, descriptors = _U32X2.unpack(payload)
    return pid, descriptors


def decode_failed(payload: bytes) -> tuple[int, int]:
    """Return (stage, errno): nothing of the job ran."""
    stage, errno = _U32X2.unpack(payload)
    return stage, errno


def decode_exited(payload: bytes) -> tuple[int, int, int]:
    """Return (exit code, 128 + signal for a killed job; signal or 0; TIMED_OUT | OUTPUT_TRUNCATED)."""
    exit_code, signal, flags = _U32X3.unpack(payload)
    return exit_code, signal, flags


def decode_reported(payload: bytes) -> dict[str, str]:
    """Return the texts of a REPORTED frame by name, of REPORT_NAMES; one that was not to be had is missing.

    They are the word of whoever is inside; bytes that are no UTF-8 come out as backslash escapes. Raises SandboxError
    for anything but pairs of a known name, each once, and a text.
    """
    parts = payload.split(b"\0")
    if len(payload) > MAX_REPORT_BYTES or parts.pop() or len(parts) % 2 or len(parts) > 2 * len(REPORT_NAMES):
        raise SandboxError(f"the agent sent a report that is none, of {len(payload)} bytes")
    names = [name.decode("ascii", "backslashreplace") for name in parts[::2]]
    if len(set(names)) < len(names) or not REPORT_NAMES.issuperset(names):
        raise SandboxError(f"the agent reported what nobody asked for: {', '.join(names)[:200]}")
    return dict(zip(names, (text.decode("utf-8", "backslashreplace") for text in parts[1::2]), strict=True))


def read_log(data: bytes, offset: int = 0) -> "Iterator[tuple[int, int, int, bytes]]":
    """Yield (offset after the record, time in ns since 1970, stream, payload) for each whole record of a log.

    Stops before a record that is not whole yet, so that a follower goes on at the last offset.
    """
    while offset + _RECORD.size <= len(data):
        time_ns, length, stream = _RECORD.unpack_from(data, offset)
        end = offset + _RECORD.size + length
        if end > len(data):
            return
        yield end, time_ns, stream, data[offset + _RECORD.size : end]
        offset = end


def decode_end(payload: bytes) -> tuple[int, int, int, int]:
    """Return (exit code, signal, flags, bytes of output that were dropped) of a log's end record."""
    exit_code, signal, flags, _, dropped_bytes = _END_RECORD.unpack(payload)
    return exit_code, signal, flags, dropped_bytes


class Connection:
    """Frames over one connected AF_UNIX stream socket, which this object owns; blocking as the socket is."""

    __slots__ = ("_data", "_descriptors", "sock")

    def __init__(self, sock: "socket") -> None:
        """Take over `sock`; a timeout or non-blocking mode that is set on it holds."""
        self.sock = sock
        self._data = b""
        self._descriptors: list[int] = []

    def fileno(self) -> int:
        """Return the socket's descriptor, for poll(2)."""
        return self.sock.fileno()

    def send(self, frame: bytes, descriptors: "Sequence[int]" = ()) -> None:
        """Send a whole frame, `descriptors` with its first byte; SandboxError if the agent is gone."""
        try:
            if descriptors:
                rights = struct.pack(f"={len(descriptors)}i", *descriptors)
                sent = self.sock.sendmsg([frame], [(SOL_SOCKET, SCM_RIGHTS, rights)], MSG_NOSIGNAL)
            else:
                sent = self.sock.send(frame, MSG_NOSIGNAL)
            if sent < len(frame):
                self.sock.sendall(memoryview(frame)[sent:], MSG_NOSIGNAL)
        except (BrokenPipeError, ConnectionResetError):
            raise SandboxError(
                "the sandbox ended before it took its orders", hint="see the runtime's own words"
            ) from None

    def recv(self) -> "tuple[int, int, bytes, list[int]] | None":
        """Return the next frame as (type, flags, payload, descriptors), or None when the agent has gone.

        The descriptors are close-on-exec and the caller's to close. TimeoutError and BlockingIOError lose
        nothing: call again. Raises SandboxError for anything that is not a frame of this protocol.
        """
        while len(self._data) < _HEADER.size:
            if not self._more(_HEADER.size - len(self._data)):
                return None
        length, kind, flags, reserved = _HEADER.unpack_from(self._data)
        fits = length <= MAX_REPORT_BYTES if kind == REPORTED else _ANSWER_BYTES.get(kind) == length
        if reserved or not fits:
            raise self._refuse(f"type {kind} of {length} bytes")
        while len(self._data) < _HEADER.size + length:
            if not self._more(_HEADER.size + length - len(self._data)):
                return None
        descriptors = self._descriptors
        if len(descriptors) > (kind == PREPARED):
            raise self._refuse(f"{len(descriptors)} descriptors with type {kind}")
        payload = self._data[_HEADER.size :]
        self._data, self._descriptors = b"", []
        return kind, flags, payload, descriptors

    def close(self) -> None:
        """Close the socket and what arrived for a frame that never became whole."""
        for descriptor in self._descriptors:
            close(descriptor)
        self._descriptors = []
        self.sock.close()

    def _more(self, size: int) -> bool:
        try:
            data, ancillary, flags, _ = self.sock.recvmsg(size, _ANCILLARY_BYTES, MSG_CMSG_CLOEXEC)
        except ConnectionResetError:
            return False
        for level, kind, rights in ancillary:
            if level == SOL_SOCKET and kind == SCM_RIGHTS:
                count = len(rights) // 4
                self._descriptors += struct.unpack(f"={count}i", rights[: count * 4])
        if flags & MSG_CTRUNC or len(self._descriptors) > _MAX_DESCRIPTORS:
            raise self._refuse("too many descriptors")
        self._data += data
        return bool(data)

    def _refuse(self, what: str) -> SandboxError:
        self.close()
        return SandboxError(f"the agent sent what its protocol does not have: {what}")
