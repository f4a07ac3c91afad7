"""The first ring, in which every tier starts: crun or runc start the agent's binary in a root that we staged.

At the linux tier it is the agent itself, beside the job; at the others the door to a kernel of its own.
"""

from __future__ import annotations

import os

from ringfence.errors import HostError
from ringfence.linux import libc
from ringfence.linux.thread import in_thread
from ringfence.linux.userns import make_userns
from ringfence.runtime.bundle import command, write_config
from ringfence.runtime.spawn import agent_path, spawn
from ringfence.runtime.stage import Ids, Stager

TYPE_CHECKING = False
if TYPE_CHECKING:
    from ringfence.plan.document import Plan
    from ringfence.runtime.base import Instance, Starting


def start(plan: Plan, instance: Instance, descriptors: tuple[int, ...]) -> Starting:
    """Start the plan's OCI object, with `descriptors` as the 3, 4, 5... of its process.

    Returns while the runtime is still at work. Raises HostError, MountError, SandboxError; then nothing runs.
    """
    if plan["rootless"]:
        from ringfence.runtime.rootless import start_rootless

        return start_rootless(plan, instance, descriptors)
    agent = agent_path()
    size = plan["user"]["range_size"]
    ranges = [(0, instance.base, size)]
    userns = make_userns(agent, ranges, ranges)
    try:
        ids = Ids(
            base=instance.base,
            uid=plan["user"]["uid"],
            gid=plan["user"]["gid"],
            userns=userns,
            served=plan["guest"] is not None,
        )
        stager = Stager(instance.staging, ids, agent)
        starting = in_thread(lambda: _set_up(plan, instance, stager, userns, descriptors))
    except OSError as error:
        os.close(userns)
        raise HostError(f"cannot set the sandbox up: {error}", hint="see --debug") from error
    except BaseException:
        os.close(userns)
        raise
    starting.keep(userns)
    return starting


def _set_up(
    plan: Plan, instance: Instance, stager: Stager, userns: int, descriptors: tuple[int, ...]
) -> Starting:
    """Stage the root in a mount namespace of this thread's own and start the runtime in it."""
    libc.unshare(libc.CLONE_NEWNS)  # implies CLONE_FS: the current directory is the thread's own as well
    # Private before anything is mounted, or it would appear on the host.
    libc.make_private("/")
    stager.run(plan["stage"])
    # Our own /proc entry and not "self": runc opens the path in a helper that has other descriptors.
    write_config(plan, instance, userns=f"/proc/{os.getpid()}/fd/{userns}")
    argv = command(plan, instance, preserve=len(descriptors))
    return spawn(argv, descriptors, runtime_dir=instance.directory)
