"""Asking a program a question: its answer is bounded in bytes and in time, and it is gone afterwards."""

import contextlib
import os
import signal

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Sequence
    from subprocess import Popen

_ENVIRONMENT = {"PATH": "/usr/sbin:/usr/bin:/sbin:/bin", "LC_ALL": "C"}


def start(argv: "Sequence[str]", *, errors: bool = False) -> "Popen[bytes] | None":
    """Start `argv` in a session of its own, for `answer`; None when that fails.

    With `errors` what it writes to stderr is part of the answer. Its environment is fixed, its directory is "/".
    """
    from subprocess import DEVNULL, PIPE, STDOUT, Popen

    try:
        return Popen(
            argv,
            stdin=DEVNULL,
            stdout=PIPE,
            stderr=STDOUT if errors else DEVNULL,
            env=_ENVIRONMENT,
            cwd="/",
            start_new_session=True,
        )
    except OSError:
        return None


def answer(process: "Popen[bytes] | None", deadline: float, most_bytes: int) -> tuple[str, int | None]:
    """Return what `process` said and its exit status, None if it did not end by itself, soon enough, within bounds.

    `deadline` is of time.monotonic(). Whatever else is in its session's process group is then killed as well.
    """
    if process is None or process.stdout is None:
        return "", None
    said = b""
    pidfd = os.pidfd_open(process.pid)
    try:
        with process.stdout as output:
            while len(said) < most_bytes and _readable(output.fileno(), deadline):
                piece = os.read(output.fileno(), most_bytes - len(said))
                if not piece:
                    break
                said += piece
            ended = len(said) < most_bytes and _readable(pidfd, deadline)
    finally:
        os.close(pidfd)
        # Not waited for before: until then its id, and so its group's, cannot be anybody else's.
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        status = process.wait()
    return said.decode("utf-8", "replace"), status if ended else None


def _readable(fd: int, deadline: float) -> bool:
    import select
    import time

    poll = select.poll()
    poll.register(fd, select.POLLIN)
    return bool(poll.poll(max(0.0, deadline - time.monotonic()) * 1000))
