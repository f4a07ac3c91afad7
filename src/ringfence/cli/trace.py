"""Print a trace of system calls on stderr while the job runs."""

from __future__ import annotations

import os
import sys
import threading

from ringfence.errors import one_line
from ringfence.sandbox.trace import calls, lines

# The pipe ends with the sandbox; a process that holds it open longer than that is stuck in the kernel.
_PATIENCE_S = 5.0


class Tracing:
    """Prints what arrives on a descriptor, call by call, on a thread of its own."""

    def __init__(self, descriptor: int) -> None:
        """Take `descriptor` over, and begin."""
        self._descriptor = descriptor
        self._thread = threading.Thread(target=self._print, daemon=True)
        self._thread.start()

    def join(self) -> None:
        """Wait for the last line, once the sandbox is gone."""
        self._thread.join(_PATIENCE_S)

    def _print(self) -> None:
        with os.fdopen(self._descriptor, "rb") as file:
            try:
                for call in calls(lines(file)):
                    print(one_line(call), file=sys.stderr)
            except OSError:
                return  # nobody reads it any more; with the pipe closed the kernel inside goes on without
