"""Which saved machine one is restored from: found, or made first. On the way of every run at the microVM tier."""

from __future__ import annotations

import os

from ringfence.errors import RingfenceError
from ringfence.linux.paths import state_dir
from ringfence.runtime.bridge import LOAD
from ringfence.runtime.microvm import snapshots

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

    from ringfence.sandbox.launch import Running

_ROOM_BYTES = 1 << 28


def snapshot_for(running: Running, wake_fd: int = -1, interrupted: Callable[[], bool] = lambda: False) -> int:
    """Return a descriptor of what the machine of `running` is to be restored from, -1 where it has to boot.

    That one could not be made is no reason not to run. Raises HostError for a snapshot that was changed, Interrupted.
    """
    plan = running.plan
    machine = plan["machine"]
    if machine is None or not running.snapshots or not snapshots.possible(plan):
        return -1
    state = state_dir()
    try:
        name = snapshots.key(plan, machine)
    except OSError:  # a file of QEMU's or a disk has just gone: the start says which
        return -1
    found = snapshots.load(state, name, machine)
    if found < 0 and _made(running, state, name, wake_fd, interrupted):
        found = snapshots.load(state, name, machine)
    if found >= 0:
        running.instance.snapshot = LOAD
    return found


def distrust(running: Running) -> None:
    """Remove the snapshot that `running` did not come up from."""
    machine = running.plan["machine"]
    if machine is None or running.instance.snapshot != LOAD:
        return
    try:
        snapshots.drop(state_dir(), snapshots.key(running.plan, machine))
    except OSError:  # a file that the key is made of has gone, so that nobody finds the snapshot any more
        return


def _made(running: Running, state: str, name: str, wake_fd: int, interrupted: Callable[[], bool]) -> bool:
    """Make the snapshot `name`; False if somebody else is at it, or it cannot be made."""
    from ringfence.runtime.microvm.saving import making, note_failure, publish
    from ringfence.sandbox.template import Patience, save

    machine = running.plan["machine"]
    assert machine is not None  # noqa: S101 - snapshot_for has seen to it
    try:
        with making(state, name) as made:
            if made is None or not _has_room(made.path, machine["memory_bytes"]):
                return False
            running.say("saving a booted machine, once, to restore it from now on")
            save(running.plan, made.descriptor, Patience(wake_fd, interrupted))
            publish(state, name, made, machine, running.plan["image"]["name"])
    except (RingfenceError, OSError) as error:
        note_failure(state, name, str(error))
        return False
    return True


def _has_room(path: str, memory_bytes: int) -> bool:
    """Say whether there is room for all of the machine, of which most is not saved, and some to spare."""
    found = os.statvfs(os.path.dirname(path))
    return found.f_bavail * found.f_frsize > memory_bytes + _ROOM_BYTES
