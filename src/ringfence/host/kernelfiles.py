"""Bounded reads of small kernel and configuration files; what cannot be read is absent, never an error."""

import os

_MOST_BYTES = 1 << 18


def text(path: str, most: int = _MOST_BYTES) -> str:
    """Return at most `most` bytes of a regular or kernel file, stripped; "" when it cannot be read."""
    try:
        # O_NONBLOCK: a FIFO put in the way must not hang us.
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK | os.O_NOCTTY)
    except OSError:
        return ""
    try:
        found = b""
        while len(found) < most and (piece := os.read(fd, most - len(found))):
            found += piece
    except OSError:
        return ""
    finally:
        os.close(fd)
    return found.decode("utf-8", "replace").strip()


def number(path: str) -> int | None:
    """Return the one whole number in a kernel file, or None."""
    word = text(path, 64)
    try:
        return int(word)
    except ValueError:
        return None


def names(directory: str) -> tuple[str, ...]:
    """Return the sorted names in a directory, () when it cannot be read."""
    try:
        return tuple(sorted(os.listdir(directory)))
    except OSError:
        return ()


def status_field(name: str) -> str:
    """Return one field of /proc/self/status, e.g. "CapEff"; "" when absent."""
    for line in text("/proc/self/status").splitlines():
        key, _, value = line.partition(":")
        if key == name:
            return value.strip()
    return ""
