"""Speak with a Firecracker over its API: HTTP on a socket of its ring, one request after the other.

A boot needs none of it: `ringfence.plan.firecracker` has the whole machine in one document, and the API is off. It is
for what can only be said to a machine that is there: pausing it, saving it, loading a saved one, writing its counters.
Whoever broke out of a guest may be the one who answers: sizes and times are bounded, and nothing is believed but that
something was done or not. Tests check each request against the published definition.
"""

import io
import json
import os
import socket
import time
from collections.abc import Mapping
from http.client import HTTPException, HTTPResponse
from typing import Literal

from ringfence.errors import SandboxError
from ringfence.linux import libc
from ringfence.plan.firecracker import Document

_MOST_ANSWER_BYTES = 1 << 16
_TIMEOUT_S = 10.0
# Memory is written while a request to save is answered.
_SAVE_TIMEOUT_S = 120.0
_MOST_BYTES = 2 * _MOST_ANSWER_BYTES  # with its head
# What makes a machine, in an order in which each request is allowed; the drives have one each.
_PUTS = ("logger", "metrics", "machine-config", "boot-source", "vsock", "entropy")
_OK = (200, 204)
_ROOT_RULES = libc.RESOLVE_IN_ROOT | libc.RESOLVE_NO_SYMLINKS | libc.RESOLVE_NO_MAGICLINKS


def connect(pid: int, path: str) -> socket.socket:
    """Connect to the socket `path` as process `pid` sees it, through no symlink. Raises SandboxError.

    The VMM may put there what it likes; a symlink of its would else lead to a socket of the host's.
    """
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        root = os.open(f"/proc/{pid}/root", os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            found = libc.openat2(root, path.lstrip("/"), os.O_PATH, _ROOT_RULES)
        finally:
            os.close(root)
        try:
            sock.settimeout(_TIMEOUT_S)
            sock.connect(f"/proc/self/fd/{found}")
        finally:
            os.close(found)
    except OSError as error:
        sock.close()
        raise SandboxError(f"Firecracker's API cannot be reached: {error.strerror or error}") from error
    return sock


class Api:
    """One connection to the API of one machine."""

    def __init__(self, sock: socket.socket) -> None:
        """Take over a connected socket."""
        self._sock = sock

    def close(self) -> None:
        """Hang up. Idempotent."""
        self._sock.close()

    def version(self) -> str:
        """Return Firecracker's version. Raises SandboxError."""
        return _text(self._ask("GET", "/version"), "firecracker_version")

    def state(self) -> str:
        """Return "Not started", "Running" or "Paused". Raises SandboxError."""
        return _text(self._ask("GET", "/"), "state")

    def configure(self, document: Document) -> None:
        """Make the machine that `document` describes, but do not start it. Raises SandboxError."""
        for name in _PUTS:
            body: object = document[name]  # type: ignore[literal-required] # each of _PUTS is one of its keys
            self._ask("PUT", f"/{name}", body)
        for drive in document["drives"]:
            self._ask("PUT", f"/drives/{drive['drive_id']}", drive)

    def start(self) -> None:
        """Start the machine. Raises SandboxError."""
        self._ask("PUT", "/actions", {"action_type": "InstanceStart"})

    def flush_metrics(self) -> None:
        """Have the counters written to their file now. Raises SandboxError."""
        self._ask("PUT", "/actions", {"action_type": "FlushMetrics"})

    def pause(self) -> None:
        """Stop all CPUs. Raises SandboxError."""
        self._ask("PATCH", "/vm", {"state": "Paused"})

    def resume(self) -> None:
        """Let a paused machine go on. Raises SandboxError."""
        self._ask("PATCH", "/vm", {"state": "Resumed"})

    def save(self, *, state_path: str, memory_path: str) -> None:
        """Write a paused machine into two files, by their paths in the ring. Raises SandboxError."""
        body = {"snapshot_type": "Full", "snapshot_path": state_path, "mem_file_path": memory_path}
        self._ask("PUT", "/snapshot/create", body, timeout_s=_SAVE_TIMEOUT_S)

    def load(self, *, state_path: str, memory_path: str, resume: bool) -> None:
        """Make the machine that was saved in two files; with `resume` it runs at once. Raises SandboxError.

        Its memory is mapped privately: the files stay as they are, and serve many machines.
        """
        body = {
            "snapshot_path": state_path,
            "mem_backend": {"backend_type": "File", "backend_path": memory_path},
            "resume_vm": resume,
        }
        self._ask("PUT", "/snapshot/load", body)

    def _ask(
        self,
        method: Literal["GET", "PUT", "PATCH"],
        path: str,
        body: object = None,
        *,
        timeout_s: float = _TIMEOUT_S,
    ) -> Mapping[str, object]:
        content = b"" if body is None else json.dumps(body).encode()
        head = f"{method} {path} HTTP/1.1\r\nHost: localhost\r\nAccept: application/json\r\n"
        if content:
            head += f"Content-Type: application/json\r\nContent-Length: {len(content)}\r\n"
        try:
            self._sock.settimeout(timeout_s)
            self._sock.sendall(head.encode() + b"\r\n" + content)
            status, said = self._answer(method, timeout_s)
        except (OSError, HTTPException) as error:
            raise SandboxError(
                f"Firecracker does not answer {method} {path}: {str(error)[:200] or type(error).__name__}"
            ) from error
        found = _decoded(said)
        if status not in _OK:
            why = found.get("fault_message") if found else None
            raise SandboxError(f"Firecracker refuses {method} {path}: {str(why or status)[:300]}")
        return found or {}

    def _answer(self, method: str, timeout_s: float) -> tuple[int, bytes]:
        """Read one answer. Raises OSError, HTTPException."""
        bounded = _Bounded(self._sock, time.monotonic() + timeout_s)
        response = HTTPResponse(bounded, method=method)  # type: ignore[arg-type] # all that it uses is makefile()
        try:
            response.begin()
            said = response.read(_MOST_ANSWER_BYTES + 1)
        finally:
            response.close()
        if len(said) > _MOST_ANSWER_BYTES:
            raise OSError("an answer of more than 64 KiB")
        return response.status, said


class _Bounded(io.RawIOBase):
    """What a socket says until a deadline, and so much of it at most; closing it leaves the socket open."""

    def __init__(self, sock: socket.socket, deadline_s: float) -> None:
        self._sock = sock
        self._deadline_s = deadline_s
        self._left = _MOST_BYTES

    def makefile(self, _mode: str) -> io.BufferedReader:
        return io.BufferedReader(self)

    def readable(self) -> bool:
        return True

    def readinto(self, room: memoryview) -> int:  # type: ignore[override] # which is all that BufferedReader gives
        left_s = self._deadline_s - time.monotonic()
        if left_s <= 0 or self._left <= 0:
            raise OSError("too slow" if left_s <= 0 else "too much")
        self._sock.settimeout(left_s)
        count = self._sock.recv_into(room, min(len(room), self._left))
        self._left -= count
        return count


def _decoded(said: bytes) -> dict[str, object] | None:
    """Return the object in an answer, None where it has none."""
    try:
        found = json.loads(said) if said else None
    except (ValueError, RecursionError):
        return None
    return found if isinstance(found, dict) else None


def _text(answer: Mapping[str, object], name: str) -> str:
    found = answer.get(name)
    if not isinstance(found, str):
        raise SandboxError(f"Firecracker does not say its {name}")
    return found[:100]
