"""Start a runtime's process, with the descriptors that the agent inherits through it."""

from __future__ import annotations

import os

from ringfence.errors import HostError
from ringfence.runtime.base import Starting

# Duplicates of descriptors that are about to be given fixed numbers lie above these numbers.
_ABOVE = 32
FIRST = 3


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
    places = (0, 1, 2, *range(FIRST, FIRST + len(descriptors)))
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
