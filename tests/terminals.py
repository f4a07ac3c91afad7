"""A terminal as people have one, with ringfence at it."""

import fcntl
import os
import pty
import select
import struct
import subprocess
import termios
import time

from commands import RINGFENCE


class Terminal:
    """A pty of ours, and on its other side, in a session of its own, ``ringfence VERB WORDS``."""

    def __init__(
        self, *words: str, verb: str = "run", rows: int = 33, cols: int = 77, stdin: int | None = None
    ) -> None:
        self.master, self.slave = pty.openpty()
        self.resize(rows, cols)
        self.before = termios.tcgetattr(self.slave)
        self.process = subprocess.Popen(
            [RINGFENCE, verb, *words],
            stdin=self.slave if stdin is None else stdin,
            stdout=self.slave,
            stderr=self.slave,
            start_new_session=True,
            preexec_fn=self._control if stdin is None else None,
        )
        self.shown = b""

    def _control(self) -> None:
        fcntl.ioctl(0, termios.TIOCSCTTY, 0)  # as a shell's terminal is: then it sends signals

    def resize(self, rows: int, cols: int) -> None:
        fcntl.ioctl(self.slave, termios.TIOCSWINSZ, struct.pack("HHHH", rows, cols, 0, 0))

    def type(self, keys: bytes) -> None:
        os.write(self.master, keys)

    def wait_for(self, text: bytes, timeout_s: float = 10) -> None:
        deadline = time.monotonic() + timeout_s
        while text not in self.shown:
            assert time.monotonic() < deadline, self.shown
            self._take(0.1)

    def end(self, timeout_s: float = 10) -> int:
        """Return the exit status; `shown` has everything then, and the settings must be as they were."""
        deadline = time.monotonic() + timeout_s
        while self.process.poll() is None:
            assert time.monotonic() < deadline, self.shown
            self._take(0.05)
        while self._take(0.05):
            pass
        assert termios.tcgetattr(self.slave) == self.before
        os.close(self.master)
        os.close(self.slave)
        return self.process.returncode

    def _take(self, patience_s: float) -> bool:
        if not select.select([self.master], [], [], patience_s)[0]:
            return False
        self.shown += os.read(self.master, 65536)
        return True
