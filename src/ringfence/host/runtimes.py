"""The programs that can run a tier: where they are, and what they say of their version."""

import contextlib
import os
import re
import signal
import stat

from ringfence.host.facts import Runtime
from ringfence.host.places import NAMES, find

TYPE_CHECKING = False
if TYPE_CHECKING:
    from subprocess import Popen

_MOST_BYTES = 4096
_TIMEOUT_S = 5.0


def runtimes() -> dict[str, Runtime]:
    """Return every runtime found, by name; their ``--version`` are asked side by side, 5 s at most."""
    import time

    found = {name: path for name in NAMES if (path := find(name)) and trustworthy(path)}
    started = {name: _ask(path) for name, path in found.items()}
    deadline = time.monotonic() + _TIMEOUT_S
    answers = {name: _answer(process, deadline) for name, process in started.items()}
    return {name: described(found[name], answers[name]) for name in found}


def described(path: str, answer: str) -> Runtime:
    """Return the runtime at `path` that answered ``--version`` with `answer`."""
    line = next(iter(answer.splitlines()), "").strip()[:120]
    match = re.search(r"(\d{1,9})(?:\.(\d{1,9}))?(?:\.(\d{1,9}))?", line)
    numbers = [int(part or 0) for part in match.groups()] if match else [0, 0, 0]
    printable = "".join(character for character in line if character.isprintable())
    return Runtime(path=path, version=(numbers[0], numbers[1], numbers[2]), version_text=printable)


def trustworthy(path: str) -> bool:
    """Whether only root and this user can change the program: it will be run with all our rights."""
    try:
        found = os.stat(path)
    except OSError:
        return False
    owned = found.st_uid in (0, os.geteuid())
    return stat.S_ISREG(found.st_mode) and owned and not found.st_mode & (stat.S_IWGRP | stat.S_IWOTH)


def _ask(path: str) -> "Popen[bytes] | None":
    from subprocess import DEVNULL, PIPE, Popen

    environment = {"PATH": "/usr/sbin:/usr/bin:/sbin:/bin", "LC_ALL": "C"}
    try:
        return Popen(
            [path, "--version"],
            stdin=DEVNULL,
            stdout=PIPE,
            stderr=DEVNULL,
            env=environment,
            cwd="/",
            start_new_session=True,
        )
    except OSError:
        return None


def _answer(process: "Popen[bytes] | None", deadline: float) -> str:
    """Return what the program said before it ended, filled the bound or took too long; it is then gone."""
    if process is None or process.stdout is None:
        return ""
    import select
    import time

    said = b""
    with process.stdout as output:
        while len(said) < _MOST_BYTES:
            ready, _, _ = select.select([output], [], [], max(0.0, deadline - time.monotonic()))
            piece = os.read(output.fileno(), _MOST_BYTES - len(said)) if ready else b""
            if not piece:
                break
            said += piece
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)  # and what it started: the session is its own
    process.wait()
    return said.decode("utf-8", "replace")
