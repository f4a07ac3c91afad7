"""The linux tier: crun or runc start the agent in a root that we staged."""

from __future__ import annotations

import os

from ringfence.errors import HostError
from ringfence.linux import libc
from ringfence.linux.thread import in_thread
from ringfence.linux.userns import make_userns
from ringfence.plainjson import dumps
from ringfence.runtime.base import Starting
from ringfence.runtime.bundle import instantiate
from ringfence.runtime.stage import Ids, Stager

TYPE_CHECKING = False
if TYPE_CHECKING:
    from ringfence.plan.document import Plan
    from ringfence.runtime.base import Instance

# Duplicates of descriptors that are about to be given fixed numbers lie above these numbers.
_ABOVE = 32
_FIRST = 3


def start(plan: Plan, instance: Instance, descriptors: tuple[int, ...]) -> Starting:
    """Start the agent in a sandbox, with `descriptors` as its 3, 4, 5...

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
        ids = Ids(base=instance.base, uid=plan["user"]["uid"], gid=plan["user"]["gid"], userns=userns)
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
    write_config(plan, instance, root=f"{instance.staging}/root", userns=f"/proc/{os.getpid()}/fd/{userns}")
    argv = command(plan, instance, preserve=len(descriptors))
    return spawn(argv, descriptors, runtime_dir=instance.directory)


def write_config(plan: Plan, instance: Instance, *, root: str, userns: str) -> None:
    """Write the bundle's config.json. Raises HostError when the disk does not take it."""
    oci = instantiate(plan, instance, root=root, userns=userns)
    path = f"{instance.directory}/config.json"
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
    try:
        fd = os.open(path, flags, 0o600)
        try:
            data = memoryview(dumps(oci).encode())
            while data:
                data = data[os.write(fd, data) :]
        finally:
            os.close(fd)
    except OSError as error:
        raise HostError(
            f"cannot write {path}: {error.strerror}",
            hint="free some space there, or set RINGFENCE_RUN_DIR",
        ) from error


def command(plan: Plan, instance: Instance, *, preserve: int, options: tuple[str, ...] = ()) -> list[str]:
    """Return the runtime's command line: start the agent, hand it `preserve` descriptors, and go away."""
    return [
        plan["runtime"]["path"],
        "--root",
        f"{instance.directory}/runtime",
        *options,
        "run",
        "--detach",
        "--preserve-fds",
        str(preserve),
        "--bundle",
        instance.directory,
        instance.id,
    ]


def spawn(argv: list[str], descriptors: tuple[int, ...], *, runtime_dir: str) -> Starting:
    """Start `argv` in a session of its own, with `descriptors` as its 3, 4, ...

    Its standard streams are pipes of ours and nothing else: a runtime may give them to the sandbox's user
    (fchown), which must never happen to the host's /dev/null or to a file.
    """
    import fcntl

    empty_r, empty_w = os.pipe2(os.O_CLOEXEC)
    said_r, said_w = os.pipe2(os.O_CLOEXEC)
    os.close(empty_w)
    high = [fcntl.fcntl(fd, fcntl.F_DUPFD_CLOEXEC, _ABOVE) for fd in (empty_r, said_w, said_w, *descriptors)]
    places = (0, 1, 2, *range(_FIRST, _FIRST + len(descriptors)))
    actions = [(os.POSIX_SPAWN_DUP2, fd, place) for fd, place in zip(high, places, strict=True)]
    env = {"PATH": "/usr/sbin:/usr/bin:/sbin:/bin", "XDG_RUNTIME_DIR": runtime_dir}
    try:
        return Starting(os.posix_spawn(argv[0], argv, env, file_actions=actions, setsid=True), said_r)
    except OSError as error:
        os.close(said_r)
        raise HostError(f"cannot start {argv[0]}: {error.strerror}", hint="see 'ringfence doctor'") from error
    finally:
        for fd in (*high, empty_r, said_w):
            os.close(fd)


def agent_path() -> str:
    """Return the path of the agent's binary; raises HostError when it was not built."""
    path = f"{os.path.dirname(os.path.dirname(__file__))}/_agent/ringfence-agent"
    if not os.path.exists(path):
        raise HostError("the agent is not built", hint="run: make setup (or make -C agent install)")
    return path
