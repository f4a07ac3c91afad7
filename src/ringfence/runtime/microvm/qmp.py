"""Speak with a QEMU over its monitor: as much of QMP as it takes to save a machine.

QEMU may be in the hands of whoever broke out of the guest: what it says is bounded, and believed only as far as that it
has, or has not, done what it was told.
Source: https://www.qemu.org/docs/master/interop/qmp-spec.html
"""

import json
import socket
from collections.abc import Callable, Sequence

from ringfence.errors import SandboxError

_MOST_LINE_BYTES = 1 << 16
_MOST_EVENTS = 64
_MOST_BANDWIDTH = 1 << 40
_ENDED = ("completed", "failed", "cancelled")


class Monitor:
    """One end of a socket with QEMU's monitor behind it."""

    def __init__(self, sock: socket.socket, wait: Callable[[socket.socket], None]) -> None:
        """Greet it; `wait` returns when the socket can be read, or raises. Raises SandboxError for no answer."""
        self._sock = sock
        self._wait = wait
        self._data = bytearray()
        if "QMP" not in self._message():
            raise SandboxError("QEMU's monitor does not greet")
        self.command("qmp_capabilities")

    def save(self, descriptor: int) -> None:
        """Write the machine as it is into `descriptor`, and wait until all is written. Raises SandboxError.

        The machine runs on. One that is restored runs at once, too, because it was not stopped before.
        """
        self.command("migrate-set-capabilities", {"capabilities": [{"capability": "events", "state": True}]})
        bandwidth: dict[str, object] = {"max-bandwidth": _MOST_BANDWIDTH}
        self.command("migrate-set-parameters", bandwidth)
        self.command("getfd", {"fdname": "state"}, (descriptor,))
        self.command("migrate", {"uri": "fd:state"})
        for _ in range(_MOST_EVENTS):
            status = _migration(self._message())
            if status in _ENDED:
                break
        if status != "completed":
            raise SandboxError(f"QEMU cannot save the machine: {status}")

    def quit(self) -> None:
        """End QEMU. Raises SandboxError."""
        self.command("quit")

    def command(
        self, name: str, arguments: dict[str, object] | None = None, descriptors: Sequence[int] = ()
    ) -> object:
        """Have a command carried out and return what it returns; `descriptors` go with it. Raises SandboxError."""
        line = json.dumps({"execute": name, "arguments": arguments or {}}).encode() + b"\n"
        try:
            if descriptors:
                socket.send_fds(self._sock, [line], list(descriptors))
            else:
                self._sock.sendall(line)
        except OSError as error:
            raise SandboxError(f"QEMU's monitor is gone: {error.strerror}") from error
        for _ in range(_MOST_EVENTS):
            answer = self._message()
            if "return" in answer:
                return answer["return"]
            if "error" in answer:
                raise SandboxError(f"QEMU refuses {name}: {str(answer['error'])[:200]}")
        raise SandboxError(f"QEMU does not answer {name}")

    def _message(self) -> dict[str, object]:
        while b"\n" not in self._data:
            if len(self._data) > _MOST_LINE_BYTES:
                raise SandboxError("QEMU's monitor says too much")
            self._wait(self._sock)
            piece = self._sock.recv(_MOST_LINE_BYTES)
            if not piece:
                raise SandboxError("QEMU ended while it was being saved")
            self._data += piece
        line, _, rest = self._data.partition(b"\n")
        self._data = bytearray(rest)
        try:
            said = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise SandboxError("QEMU's monitor does not speak JSON") from error
        if not isinstance(said, dict):
            raise SandboxError("QEMU's monitor does not speak QMP")
        return said


def _migration(message: dict[str, object]) -> str:
    """Return the state of the migration that an event tells, "" for any other."""
    data = message.get("data")
    if message.get("event") != "MIGRATION" or not isinstance(data, dict):
        return ""
    return str(data.get("status"))[:64]
