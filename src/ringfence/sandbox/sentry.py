"""What gVisor's sentry writes about itself: the system calls that it lacks, and why it went away."""

from __future__ import annotations

import json
import re

# runsc's user log (boot/compat.go of the release 20240729) writes a call that its kernel does not have once.
_UNSUPPORTED = re.compile(r"Unsupported syscall ([a-z0-9_]{1,40})\(([^)]{0,200})\)")
_NUMBERED = re.compile(r"sys_([0-9]{1,4})")
# Libraries try these at every start and do well without.
_HARMLESS = frozenset({"copy_file_range", "rseq", "set_robust_list", "clone3"})
_MOST = 12
# How the Go runtime begins its last words.
_LAST = re.compile(r"^(panic: |fatal error: |runtime: |SIG[A-Z]+: |\[signal )")
_MOST_CHARACTERS = 300


def unsupported(said: str, arch: str = "") -> list[str]:
    """Return the names of the system calls in the user log `said` that the sentry lacks, each once, in order."""
    found: dict[str, None] = {}
    for text in _logged(said):
        match = _UNSUPPORTED.search(text)
        if match is not None:
            found.setdefault(_named(match[1], match[2], arch))
    names = [name for name in found if name not in _HARMLESS]
    return [*names[:_MOST], *([f"and {len(names) - _MOST} more"] if len(names) > _MOST else ())]


def _logged(said: str) -> list[str]:
    texts = []
    for line in said.splitlines():
        if not line.startswith("{"):
            continue
        try:
            item = json.loads(line)
        except ValueError:
            continue
        if isinstance(item, dict) and isinstance(item.get("log"), str):
            texts.append(item["log"])
    return texts


def _named(name: str, arguments: str, arch: str) -> str:
    """Return "openat2" for "sys_437"; ioctls, prctls and socket options are told apart by their number."""
    if _NUMBERED.fullmatch(name):
        import os

        return numbered(name, arch or os.uname().machine).replace("sys_", "number ")
    place = {"ioctl": 1, "prctl": 0, "arch_prctl": 0, "setsockopt": 2, "getsockopt": 2, "fcntl": 1}.get(name)
    values = arguments.split(",")
    return name if place is None or place >= len(values) else f"{name} {values[place].strip()}"


def numbered(name: str, arch: str) -> str:
    """Return "openat2" for gVisor's "sys_437", and every other name, or the number of no call, as it is."""
    found = _NUMBERED.fullmatch(name)
    if found is None:
        return name
    from ringfence.linux.syscalls import name_of

    return name_of(int(found[1]), arch) or name


def last_words(said: str) -> str:
    """Return the sentence with which the sentry went away, "" if it left none."""
    for line in said.splitlines():
        if _LAST.match(line):
            return f"gVisor's kernel crashed: {line[:_MOST_CHARACTERS]}"
    return ""
