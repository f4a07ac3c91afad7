"""The microVM tier with QEMU: a first ring with the bridge in it, which starts the VMM."""

from __future__ import annotations

import os

from ringfence.errors import HostError
from ringfence.runtime import ring
from ringfence.runtime.bridge import descriptors as bridge_descriptors
from ringfence.runtime.microvm.disks import opened

TYPE_CHECKING = False
if TYPE_CHECKING:
    from ringfence.plan.document import Plan
    from ringfence.runtime.base import Instance, Starting


def start(
    plan: Plan, instance: Instance, descriptors: tuple[int, ...], more: tuple[int, ...] = ()
) -> Starting:
    """Start the bridge in a ring, and through it the VMM, whose guest's agent gets `descriptors` 3 and 4 by way of it.

    `more` are what `instance.snapshot` needs behind the disks.
    Returns while both are still at work. Raises HostError, ImageError, MountError, SandboxError; then nothing runs.
    """
    machine = plan["machine"]
    if machine is None:
        raise HostError("this plan has no machine", hint="make it again")
    mine = opened(machine["disks"], plan, instance)
    try:
        theirs, opened_now = bridge_descriptors(instance, descriptors, [*mine, *more])
        mine += opened_now
        return ring.start(plan, instance, theirs)
    finally:
        for descriptor in mine:
            os.close(descriptor)
