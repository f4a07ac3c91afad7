"""Read the log of a detached sandbox: records that the agent wrote, see agent/PROTOCOL.md.

The log comes out of the sandbox, so every length is checked; it can be no longer than the policy's output limit.
"""

from __future__ import annotations

import os

from ringfence.sandbox import protocol

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

_CHUNK_BYTES = 1 << 20
_RECORD_BYTES = 16
_END_BYTES = 24


class End:
    """The end record: how the job ended, in the agent's words."""

    __slots__ = ("dropped_bytes", "exit_status", "signal", "time_ns", "timed_out", "truncated")

    def __init__(self, time_ns: int, payload: bytes) -> None:
        """Decode `payload`."""
        code, self.signal, flags, self.dropped_bytes = protocol.decode_end(payload)
        self.exit_status = code & 0xFF
        self.timed_out = bool(flags & protocol.TIMED_OUT)
        self.truncated = bool(flags & protocol.OUTPUT_TRUNCATED)
        self.time_ns = time_ns


def end_of(path: str) -> End | None:
    """Return the end record, which is the last one; None while the job runs or when it never got that far."""
    try:
        fd = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
    except OSError:
        return None
    try:
        size = os.fstat(fd).st_size
        last = os.pread(fd, _RECORD_BYTES + _END_BYTES, max(0, size - _RECORD_BYTES - _END_BYTES))
    finally:
        os.close(fd)
    for _, time_ns, stream, payload in protocol.read_log(last):
        if stream == protocol.END and len(payload) == _END_BYTES:
            return End(time_ns, payload)
    return None


def utc(time_ns: int) -> str:
    """Return a time since 1970 in the form of RFC 3339, e.g. "2026-01-31T23:59:59.123Z"."""
    import time

    seconds, rest = divmod(time_ns, 1_000_000_000)
    return f"{time.strftime('%Y-%m-%dT%H:%M:%S', time.gmtime(seconds))}.{rest // 1_000_000:03}Z"


def follow(path: str, *, wait: Callable[[], bool] | None = None) -> Iterator[tuple[int, int, bytes]]:
    """Yield (time in ns, stream, bytes) of each record as it is there; stops at the end record.

    With `wait`, at the end of the file it is called to wait a little: False means that nothing more will come.
    """
    fd = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
    try:
        data, last_look = b"", False
        while True:
            piece = os.read(fd, _CHUNK_BYTES)
            if not piece:
                if wait is None or last_look:
                    return
                last_look = not wait()  # once more: what was written before it ended must be shown
                continue
            data += piece
            offset = 0
            for end, time_ns, stream, payload in protocol.read_log(data):
                if stream == protocol.END:
                    return
                yield time_ns, stream, payload
                offset = end
            data = data[offset:]
    finally:
        os.close(fd)
