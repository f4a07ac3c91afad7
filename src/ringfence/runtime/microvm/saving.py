"""Make and remove files of snapshots: one maker at a time, and no more files than are worth their room."""

import contextlib
import fcntl
import os
import time
from collections.abc import Iterator

from ringfence.plan.document import Machine
from ringfence.runtime.microvm.snapshots import (
    FORMAT,
    boot_id,
    digest,
    drop,
    file_facts,
    snapshots_dir,
    write_record,
)

# A saved machine of the default size has 22 MB.
_MOST = 8
_UNUSED_S = 30 * 86400
# After a failure everybody boots for so long.
_AGAIN_S = 3600
_MOST_REASON = 500


class Making:
    """The file of a snapshot that is being made, open for writing only."""

    __slots__ = ("descriptor", "path")

    def __init__(self, path: str) -> None:
        """Make an empty file that nobody else may open. Raises OSError."""
        self.path = path
        flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
        self.descriptor = os.open(path, flags, 0o600)


@contextlib.contextmanager
def making(state: str, name: str) -> Iterator[Making | None]:
    """Yield a file for the snapshot `name`; None when somebody else is making one, or none could be made lately.

    The file is gone afterwards, unless it was published. Raises OSError.
    """
    with _locked(state) as alone:
        if not alone or _failed_lately(state, name):
            yield None
            return
        for rest in _named(state, ".new"):
            os.unlink(snapshots_dir(state, rest))
        made = Making(snapshots_dir(state, f"{name}.new"))
        try:
            yield made
        finally:
            os.close(made.descriptor)
            with contextlib.suppress(FileNotFoundError):
                os.unlink(made.path)


@contextlib.contextmanager
def _locked(state: str) -> Iterator[bool]:
    """Yield whether we are the only one at work; nobody is waited for."""
    home = snapshots_dir(state)
    with contextlib.suppress(FileExistsError):
        os.mkdir(home, 0o700)
    lock = os.open(f"{home}/lock", os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
    try:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            yield False
        else:
            yield True
    finally:
        os.close(lock)


def publish(state: str, name: str, made: Making, machine: Machine, image: str) -> None:
    """Give what was written its name and its record, and remove the snapshots not used for the longest time.

    Raises OSError.
    """
    descriptor = os.open(made.path, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
        os.rename(made.path, snapshots_dir(state, f"{name}.state"))
        # A rename changes the ctime, so what the file is comes last.
        record = {
            "format": FORMAT,
            "vmm": machine["version"],
            "kernel": machine["kernel"],
            "image": image,
            "memory_bytes": str(machine["memory_bytes"]),
            "blake2b": digest(descriptor),
            "boot": boot_id(),
            **file_facts(descriptor),
        }
    finally:
        os.close(descriptor)
    write_record(state, name, record)
    for old in _by_use(state)[_MOST:]:
        drop(state, old)


def note_failure(state: str, name: str, reason: str) -> None:
    """Write down why a snapshot could not be made, so that the next runs do not try. Never fails."""
    with contextlib.suppress(OSError), open(snapshots_dir(state, f"{name}.failed"), "w") as file:
        file.write(f"{reason[:_MOST_REASON]}\n")


def _failed_lately(state: str, name: str) -> bool:
    path = snapshots_dir(state, f"{name}.failed")
    try:
        if time.time() - os.stat(path).st_mtime < _AGAIN_S:
            return True
        os.unlink(path)
    except FileNotFoundError:
        pass
    return False


def collect(state: str) -> list[str]:
    """Remove what nobody needs: rests, notes of failures, snapshots not used for a month. Return them in words."""
    if not os.path.isdir(snapshots_dir(state)):
        return []
    with _locked(state) as alone:
        if not alone:
            return []
        records = {name.removesuffix(".record") for name in _named(state, ".record")}
        used = [name for name in _by_use(state) if _age_s(state, name) < _UNUSED_S]
        for name in records.difference(used):
            drop(state, name)
        kept = {"lock", *(f"{name}.{end}" for name in used for end in ("record", "state"))}
        rests = [name for name in os.listdir(snapshots_dir(state)) if name not in kept]
        for name in rests:
            with contextlib.suppress(FileNotFoundError):
                os.unlink(snapshots_dir(state, name))
        return [f"snapshot {name}" for name in sorted({*records.difference(used), *rests})]


def _named(state: str, end: str) -> list[str]:
    return [name for name in os.listdir(snapshots_dir(state)) if name.endswith(end) and name[:1] != "."]


def _by_use(state: str) -> list[str]:
    """Return the names of all snapshots, the last used first."""
    names = [name.removesuffix(".record") for name in _named(state, ".record")]
    return sorted(names, key=lambda name: _age_s(state, name))


def _age_s(state: str, name: str) -> float:
    try:
        return time.time() - os.stat(snapshots_dir(state, f"{name}.record")).st_mtime
    except FileNotFoundError:
        return float("inf")
