"""The gVisor tier: a first ring with the door in it, which starts runsc."""

from __future__ import annotations

from ringfence.runtime import ring
from ringfence.runtime.door import Descriptors

TYPE_CHECKING = False
if TYPE_CHECKING:
    from ringfence.plan.document import Plan
    from ringfence.runtime.base import Instance, Starting


def start(
    plan: Plan, instance: Instance, descriptors: tuple[int, ...], *, log_path: str
) -> tuple[Starting, Descriptors]:
    """Start the door in a ring, and through it the agent behind gVisor's kernel, with `descriptors` as its 3, 4, 5...

    Returns while both runtimes are still at work, with our ends of the sandbox's logs. Raises HostError,
    MountError, SandboxError; then nothing runs.
    """
    mine = Descriptors(instance, log_path)
    try:
        return ring.start(plan, instance, mine.after(descriptors)), mine
    except BaseException:
        mine.close()
        raise
    finally:
        mine.close_theirs()
