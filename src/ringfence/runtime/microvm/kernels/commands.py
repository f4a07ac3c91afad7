"""Running a program that takes its time: what it says is passed on line by line, and none of it outlives us."""

import contextlib
import os
import selectors
import shutil
import signal
import subprocess
import time
from collections import deque

from ringfence.errors import HostError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence
    from typing import IO

_PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
_PASSED_ON = ("http_proxy", "https_proxy", "ftp_proxy", "no_proxy", "all_proxy")
_LAST_LINES = 12
_MOST_LOG_BYTES = 16 << 20
_MOST_LINE_BYTES = 4096
_TICK_S = 1.0


class CommandFailed(HostError):
    """A program ended otherwise than well; `last` are the last lines that it said."""

    def __init__(self, argv: "Sequence[str]", how: str, last: "Sequence[str]", *, hint: str = "") -> None:
        """Say which program failed and how."""
        words = f": {last[-1][:300]}" if last else ""
        super().__init__(f"{os.path.basename(argv[0])} {how}{words}", hint=hint)
        self.last = tuple(last)


def need(*programs: str, package: str) -> None:
    """Raise HostError when one of the programs is not installed; `package` is what to install."""
    for program in programs:
        if shutil.which(program, path=_PATH) is None:
            raise HostError(f"{program} is not installed", hint=f"apt-get install {package}")


def run(
    argv: "Sequence[str]",
    *,
    cwd: str,
    timeout_s: float,
    env: "Mapping[str, str] | None" = None,
    lock: int = -1,
    log: "IO[bytes] | None" = None,
    heard: "Callable[[str], None]" = lambda _line: None,
) -> None:
    """Run `argv` in the directory `cwd` and tell `heard` each line that it says, and "" each second of silence.

    It gets a fixed environment with `env` on top, no input, a session of its own, and the descriptor `lock`, which it
    keeps. `log` takes what it says, up to 16 MiB. Whatever ends us ends it too, with all that it has started. Raises
    CommandFailed, and HostError when it cannot be started.
    """
    need("setpriv", package="util-linux")
    proxies = {name: os.environ[name] for name in os.environ if name.lower() in _PASSED_ON}
    try:
        process = subprocess.Popen(
            # make, told to end, takes its compilers with it.
            ["setpriv", "--pdeathsig=TERM", *argv],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            env={"PATH": _PATH, "LC_ALL": "C", **proxies, **(env or {})},
            cwd=cwd,
            pass_fds=[lock] if lock >= 0 else [],
            start_new_session=True,
        )
    except OSError as error:
        raise HostError(f"cannot start {argv[0]}: {error.strerror}") from error
    last: deque[str] = deque(maxlen=_LAST_LINES)
    try:
        timely = _listen(process, time.monotonic() + timeout_s, log, last, heard)
    finally:
        # Not waited for before: until then its id, and so its group's, cannot be anybody else's.
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        status = process.wait()
        assert process.stdout is not None  # noqa: S101 - for the type checker: it is a pipe
        process.stdout.close()
    if not timely:
        raise CommandFailed(argv, f"did not end within {timeout_s:.0f} s", last)
    if status != 0:
        raise CommandFailed(argv, f"ended with status {status}", last)


def _listen(
    process: "subprocess.Popen[bytes]",
    deadline_s: float,
    log: "IO[bytes] | None",
    last: deque[str],
    heard: "Callable[[str], None]",
) -> bool:
    """Pass on what `process` says until it has ended; False when the time is over before."""
    assert process.stdout is not None  # noqa: S101 - for the type checker: it is a pipe
    output, rest, written = process.stdout.fileno(), b"", 0
    pidfd = os.pidfd_open(process.pid)
    try:
        with selectors.DefaultSelector() as waiting:
            waiting.register(output, selectors.EVENT_READ)
            waiting.register(pidfd, selectors.EVENT_READ)
            while time.monotonic() < deadline_s:
                ready = [key.fd for key, _ in waiting.select(_TICK_S)]
                piece = os.read(output, 1 << 16) if output in ready else b""
                if log is not None and piece and written < _MOST_LOG_BYTES:
                    written += log.write(piece)
                rest = _lines(rest + piece, last, heard)
                if not ready:
                    heard("")
                # A program that it leaves behind may hold the pipe: its own end is what counts.
                if not piece and pidfd in ready:
                    _lines(rest + b"\n", last, heard)
                    return True
                if not piece and output in ready:
                    waiting.unregister(output)
    finally:
        os.close(pidfd)
    return False


def _lines(text: bytes, last: deque[str], heard: "Callable[[str], None]") -> bytes:
    """Tell the whole lines of `text` and return the rest."""
    *whole, rest = text.replace(b"\r", b"\n").split(b"\n")
    for raw in whole:
        line = raw[:_MOST_LINE_BYTES].decode("utf-8", "replace").rstrip()
        if line:
            last.append(line)
            heard(line)
    return rest[:_MOST_LINE_BYTES]
