"""Speak with a QEMU over its monitor: as much of QMP as it takes to boot a machine and to save it.

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
    """One end of a socket with the monitor of a QEMU behind it, which was told not to start its machine yet."""

    def __init__(self, sock: socket.socket, wait: Callable[[socket.socket], None]) -> None:
        """Greet it; `wait` returns when the socket can be read, or raises. Raises SandboxError for no answer."""
        self._sock = sock
        self._wait = wait
        self._data = bytearray()
        self._opened: set[str] = set()
        self._migration = ""
        if "QMP" not in self._message():
            raise SandboxError("QEMU's monitor does not greet")
        self._command("qmp_capabilities")

    def boot(self, port: str) -> None:
        """Start the machine, and return when its guest has opened the virtio port of the device called `port`.

        Raises SandboxError.
        """
        self._command("cont")
        self._listen_until(lambda: port in self._opened)

    def save(self, descriptor: int) -> None:
        """Write the machine as it is into `descriptor`, and wait until all is written. Raises SandboxError.

        It is not stopped for that: so one that is restored runs at once, too.
        """
        self._command("migrate-set-capabilities", {"capabilities": [{"capability": "events", "state": True}]})
        self._command("migrate-set-parameters", {"max-bandwidth": _MOST_BANDWIDTH})
        self._command("getfd", {"fdname": "state"}, (descriptor,))
        self._command("migrate", {"uri": "fd:state"})
        self._listen_until(lambda: self._migration in _ENDED)
        if self._migration != "completed":
            raise SandboxError(f"QEMU cannot save the machine: {self._migration}")

    def quit(self) -> None:
        """End QEMU. Raises SandboxError."""
        self._command("quit")

    def _command(
        self, name: str, arguments: dict[str, object] | None = None, descriptors: Sequence[int] = ()
    ) -> None:
        """Have a command carried out; `descriptors` go with it. Raises SandboxError."""
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
            if "error" in answer:
                raise SandboxError(f"QEMU refuses {name}: {str(answer['error'])[:200]}")
            if "return" in answer:
                return
        raise SandboxError(f"QEMU does not answer {name}")

    def _listen_until(self, happened: Callable[[], bool]) -> None:
        for _ in range(_MOST_EVENTS):
            if happened():
                return
            self._message()
        raise SandboxError("QEMU's monitor tells of everything but what it was asked for")

    def _message(self) -> dict[str, object]:
        while b"\n" not in self._data:
            if len(self._data) > _MOST_LINE_BYTES:
                raise SandboxError("QEMU's monitor says too much")
            self._wait(self._sock)
            piece = self._sock.recv(_MOST_LINE_BYTES)
            if not piece:
                raise SandboxError("QEMU ended before the machine was saved")
            self._data += piece
        line, _, rest = self._data.partition(b"\n")
        self._data = bytearray(rest)
        try:
            said = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise SandboxError("QEMU's monitor does not speak JSON") from error
        if not isinstance(said, dict):
            raise SandboxError("QEMU's monitor does not speak QMP")
        self._note(said)
        return said

    def _note(self, said: dict[str, object]) -> None:
        """Remember what an event tells, whenever it comes."""
        data = said.get("data")
        if not isinstance(data, dict):
            return
        if said.get("event") == "VSERPORT_CHANGE" and data.get("open") is True:
            self._opened.add(str(data.get("id"))[:64])
        if said.get("event") == "MIGRATION":
            self._migration = str(data.get("status"))[:64]
