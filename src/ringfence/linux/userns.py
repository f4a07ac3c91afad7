"""A user namespace with a given map, held by a descriptor and no process."""

import os

from ringfence.errors import HostError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Sequence

    IdMap = Sequence[tuple[int, int, int]]


def make_userns(agent: str, uid_map: "IdMap", gid_map: "IdMap") -> int:
    """Return a close-on-exec descriptor of a new user namespace with (inside, host, count) maps.

    A process has to be in a namespace while its maps are written; the agent's binary is the cheapest one at hand
    (`agent --userns` waits for the end of its input). Raises HostError when the kernel refuses.
    See user_namespaces(7).
    """
    ready_r, ready_w = os.pipe2(os.O_CLOEXEC)
    stay_r, stay_w = os.pipe2(os.O_CLOEXEC)
    actions = [(os.POSIX_SPAWN_DUP2, stay_r, 0), (os.POSIX_SPAWN_DUP2, ready_w, 1)]
    try:
        pid = os.posix_spawn(agent, ["agent", "--userns"], {}, file_actions=actions)
    except OSError as error:
        for fd in (ready_r, ready_w, stay_r, stay_w):
            os.close(fd)
        raise HostError(f"cannot start {agent}: {error.strerror}", hint="run: make setup") from error
    os.close(ready_w)
    os.close(stay_r)
    try:
        if os.read(ready_r, 1) != b"R":
            raise HostError("the kernel makes no user namespace", hint="see 'ringfence doctor'")
        for name, ranges in (("uid_map", uid_map), ("gid_map", gid_map)):
            fd = os.open(f"/proc/{pid}/{name}", os.O_WRONLY | os.O_CLOEXEC)
            try:
                os.write(fd, "".join(f"{a} {b} {count}\n" for a, b, count in ranges).encode())
            finally:
                os.close(fd)
        return os.open(f"/proc/{pid}/ns/user", os.O_RDONLY | os.O_CLOEXEC)
    except OSError as error:
        raise HostError(
            f"cannot map ids of a user namespace: {error.strerror}", hint="see 'ringfence doctor'"
        ) from error
    finally:
        os.close(ready_r)
        os.close(stay_w)
        os.waitpid(pid, 0)
