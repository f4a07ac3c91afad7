"""The microVM tier with Firecracker: the same ring and bridge as for QEMU, with the machine in a document of the ring.

Our ring stands in the place of Firecracker's own jailer: docs/decisions/0026-firecracker-in-our-own-ring.md.
"""

from __future__ import annotations

import os

from ringfence.errors import HostError
from ringfence.runtime import ring
from ringfence.runtime.bridge import descriptors as bridge_descriptors
from ringfence.runtime.microvm.disks import opened

TYPE_CHECKING = False
if TYPE_CHECKING:
    from ringfence.plan.document import Disk, Plan
    from ringfence.runtime.base import Instance, Starting

# FcExitCode in src/vmm/src/lib.rs of https://github.com/firecracker-microvm/firecracker.
_STATUSES = {
    1: "an error without a status of its own",
    2: "an error that cannot be",
    148: "it made a system call that its own seccomp filter refuses",
    149: "SIGBUS",
    150: "SIGSEGV",
    151: "SIGXFSZ",
    152: "this version does not take the machine's document",
    153: "this version does not know an option of its command line",
    154: "SIGXCPU",
    155: "SIGPIPE",
    156: "SIGHUP",
    157: "SIGILL",
}
_ENDED = "the VMM exited with status "
# Our own line says it better.
_NOISE = ("Running Firecracker ", "Firecracker exiting ")


def start(plan: Plan, instance: Instance, descriptors: tuple[int, ...]) -> Starting:
    """Start the bridge in a ring, and through it Firecracker, whose guest's agent gets `descriptors` 3 and 4.

    Returns while both are still at work. Raises HostError, ImageError, MountError, SandboxError; then nothing runs.
    """
    machine = plan["machine"]
    if machine is None:
        raise HostError("this plan has no machine", hint="make it again")
    mine = opened(machine["disks"], plan, instance)
    try:
        for disk, descriptor in zip(machine["disks"], mine, strict=True):
            _let_open(disk, descriptor)
        theirs, opened_now = bridge_descriptors(instance, descriptors, mine)
        mine += opened_now
        return ring.start(plan, instance, theirs)
    finally:
        for descriptor in mine:
            os.close(descriptor)


def _let_open(disk: Disk, descriptor: int) -> None:
    """Let the VMM open a disk that was made just now by the number of its descriptor: Firecracker opens all itself.

    Such a file has no name any more: nobody gets at it but those who have it open already.
    """
    if disk["kind"] == "image":
        return
    try:
        os.fchmod(descriptor, 0o444)
    except OSError as error:
        raise HostError(
            f"cannot give the copy of {disk['source']!r} to Firecracker: {error.strerror}", hint="see --debug"
        ) from error


def explain(words: str) -> str:
    """Return what `words`, of Firecracker, the guest's console and the bridge, say of an end, in fewer of them.

    Lines of the log lose time and place, each is said once, and a status gets its meaning. All of it may be invented by
    a guest.
    """
    found = [message for line in words.splitlines() if (message := _message(line.strip()))]
    return "\n".join(dict.fromkeys(found))


def _message(line: str) -> str:
    if line.startswith(_ENDED):
        status = line.removeprefix(_ENDED)
        meaning = _STATUSES.get(int(status)) if status.isdecimal() and len(status) < 4 else None
        return f"Firecracker exited with status {status}" + (f": {meaning}" if meaning else "")
    # A line of the log has a time, then in brackets the machine, the thread and the level, then its text.
    time, _, rest = line.partition(" ")
    if time[:4].isdecimal() and "T" in time and rest.startswith("["):
        line = rest.partition("] ")[2]
    return "" if line.startswith(_NOISE) else line
