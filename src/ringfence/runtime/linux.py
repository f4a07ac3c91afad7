"""The linux tier: the first ring, with nothing in it but the agent and its job."""

from __future__ import annotations

from ringfence.runtime import ring

TYPE_CHECKING = False
if TYPE_CHECKING:
    from ringfence.plan.document import Plan
    from ringfence.runtime.base import Instance, Starting


def start(plan: Plan, instance: Instance, descriptors: tuple[int, ...]) -> Starting:
    """Start the agent in a sandbox, with `descriptors` as its 3, 4, 5...

    Returns while the runtime is still at work. Raises HostError, MountError, SandboxError; then nothing runs.
    """
    return ring.start(plan, instance, descriptors)
