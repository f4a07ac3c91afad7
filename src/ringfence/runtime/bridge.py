"""The bridge of a ring with a virtual machine in it: its command line and its descriptors (agent/LINK.md)."""

from __future__ import annotations

import os

from ringfence.errors import HostError
from ringfence.runtime.door import END_BYTES, NO_LIMIT, WORDS, new_file

TYPE_CHECKING = False
if TYPE_CHECKING:
    from ringfence.plan.document import Machine, Plan
    from ringfence.runtime.base import Instance

SETUP = "/setup"
# The socket of Firecracker's vsock device, as ringfence.plan.firecracker has it in the machine's document.
VSOCK = "/run/vsock"
# The first of the descriptors that are the VMM's.
FIRST_DISK = 8
# How a machine comes up: it boots; or it boots to be saved, with its monitor at the descriptor behind the disks, and
# nobody at the other end of its link; or it is restored from the descriptor behind the disks.
BOOT, SAVE, LOAD = "", "save", "load"
# The link's device in the VMM's command line, and the name of one without the bridge behind it.
_LINKED, LINK = "virtserialport,chardev=link", "link"


def arguments(plan: Plan, machine: Machine, instance: Instance) -> list[str]:
    """Return the bridge's command line, with the VMM's in it."""
    limit = plan["output_bytes"]
    log_bytes = 0
    if instance.detached:
        log_bytes = NO_LIMIT if limit is None else limit + END_BYTES
    filled = {f"@DISK{place}@": str(FIRST_DISK + place) for place in range(len(machine["disks"]))}
    behind = FIRST_DISK + len(filled)
    more: tuple[str, ...] = ()
    if instance.snapshot == SAVE:
        filled[_LINKED] = f"virtserialport,id={LINK}"
        monitor = ("-chardev", f"socket,id=monitor,fd={behind}", "-mon", "chardev=monitor,mode=control")
        more = (*monitor, "-S")
    elif instance.snapshot == LOAD:
        more = ("-incoming", f"fd:{behind}")
    return [
        plan["oci"]["process"]["args"][0],
        "--bridge",
        str(log_bytes),
        SETUP,
        f"vsock:{VSOCK}" if machine["vmm"] == "firecracker" else "1",
        str(len(machine["disks"]) + bool(instance.snapshot)),
        *(_filled(word, filled) for word in machine["argv"]),
        *more,
    ]


def _filled(word: str, values: dict[str, str]) -> str:
    for name, value in values.items():
        word = word.replace(name, value)
    return word


def descriptors(
    instance: Instance, given: tuple[int, ...], disks: list[int]
) -> tuple[tuple[int, ...], list[int]]:
    """Return the bridge's whole list, and those of it to close once it has them, beside `disks`.

    `given` are the control socket, the listener, the lock, and perhaps a hold; `disks` are the VMM's, with those that a
    snapshot needs. Raises HostError.
    """
    try:
        nothing = os.open("/dev/null", os.O_RDONLY | os.O_CLOEXEC)
    except OSError as error:
        raise HostError(f"cannot open /dev/null: {error.strerror}") from error
    try:
        words = new_file(f"{instance.directory}/{WORDS}")
    except OSError as error:
        os.close(nothing)
        raise HostError(
            f"cannot make the sandbox's log: {error.strerror}", hint="free some space there"
        ) from error
    hold = given[3] if len(given) > 3 else nothing
    return (*given[:3], hold, words, *disks), [nothing, words]
