"""The programs that can run a tier: where they are, and what they say of their version."""

import os
import re
import stat

from ringfence.host import programs
from ringfence.host.facts import Runtime
from ringfence.host.places import NAMES, find

_MOST_BYTES = 4096
_TIMEOUT_S = 5.0


def runtimes() -> dict[str, Runtime]:
    """Return every runtime found, by name; their ``--version`` are asked side by side, 5 s at most."""
    import time

    found = {name: path for name in NAMES if (path := find(name)) and trustworthy(path)}
    started = {name: programs.start([path, "--version"]) for name, path in found.items()}
    deadline = time.monotonic() + _TIMEOUT_S
    answers = {name: programs.answer(process, deadline, _MOST_BYTES) for name, process in started.items()}
    return {name: described(found[name], answers[name][0]) for name in found}


def described(path: str, answer: str) -> Runtime:
    """Return the runtime at `path` that answered ``--version`` with `answer`."""
    line = next(iter(answer.splitlines()), "").strip()[:120]
    # Versions of runsc are dates, which Debian writes as 0.0~20240729.0.
    dated = re.search(r"(20\d{6})(?:\.(\d{1,9}))?(?:\.(\d{1,9}))?", line) if "runsc" in line else None
    match = dated or re.search(r"(\d{1,9})(?:\.(\d{1,9}))?(?:\.(\d{1,9}))?", line)
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
