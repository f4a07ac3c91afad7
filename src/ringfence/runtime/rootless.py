"""The first ring for a user who is not root: the whole set-up happens inside a user namespace.

Mounts need CAP_SYS_ADMIN, which an ordinary user has only inside a user namespace of his own, and only a process
with a single thread can enter one. So a second interpreter does it: it unshares, waits until newuidmap(1) and
newgidmap(1) have written its maps, stages the root, goes on into a second one below it, which may not loosen what was
staged, and becomes the runtime. Root inside is the user himself, who owns the files of the set-up; the job's user and
all others inside are subordinate ids of the sandbox's own.
"""

from __future__ import annotations

import json
import os
import sys

from ringfence.errors import HostError
from ringfence.runtime.base import Instance, Starting
from ringfence.runtime.spawn import FIRST, agent_path, spawn

TYPE_CHECKING = False
if TYPE_CHECKING:
    from ringfence.plan.document import Plan

NOBODY = 65534
_MOST_BYTES = 8 << 20
_TIMEOUT_MS = 20_000
# Where the caller may make no cgroup: runc calls that an error unless it is told that nobody expects one.
_WITHOUT_CGROUP = {"runc": ("--rootless", "true"), "crun": ("--cgroup-manager=disabled",)}
# In a delegated v2 subtree: plain files, no systemd.
_WITH_CGROUP = {"runc": ("--rootless", "true"), "crun": ("--cgroup-manager=cgroupfs",)}


def start_rootless(plan: Plan, instance: Instance, descriptors: tuple[int, ...]) -> Starting:
    """Start a ring as `ringfence.runtime.ring.start` does, without being root. Raises HostError."""
    spec_r, spec_w = os.pipe2(os.O_CLOEXEC)
    ready_r, ready_w = os.pipe2(os.O_CLOEXEC)
    go_r, go_w = os.pipe2(os.O_CLOEXEC)
    try:
        argv = [sys.executable, "-I", "-m", "ringfence.runtime.rootless", str(len(descriptors))]
        starting = spawn(argv, (*descriptors, spec_r, ready_w, go_r), runtime_dir=instance.directory)
        for fd in (spec_r, ready_w, go_r):
            os.close(fd)
        spec_r = ready_w = go_r = -1
        if _hears(ready_r) != b"R":
            raise _failed(starting)
        if plan["user"]["range_size"]:
            _map(plan, instance, starting.pid)
        else:
            _map_own(starting.pid)
        _send(spec_w, _spec(plan, instance))
        os.write(go_w, b"G")
        return starting
    finally:
        for fd in (spec_r, spec_w, ready_r, ready_w, go_r, go_w):
            if fd >= 0:
                os.close(fd)


def ranges(plan: Plan, instance: Instance, own: int) -> list[tuple[int, int, int]]:
    """Return the (inside, host, count) map: the caller's own id as root, then the sandbox's subordinate ids.

    gVisor gives its sentry the ids of "nobody", which lie beyond a short range: the last of the range stands for them.
    """
    size = plan["user"]["range_size"]
    if plan["isolation"] != "gvisor":
        return [(0, own, 1), (1, instance.base + 1, size - 1)]
    return [(0, own, 1), (1, instance.base + 1, size - 2), (NOBODY, instance.base + size - 1, 1)]


def _map_own(pid: int) -> None:
    """Map the caller's own ids as 0, which needs no help; the kernel wants setgroups(2) closed for that."""
    for name, text in (
        ("setgroups", "deny"),
        ("uid_map", f"0 {os.geteuid()} 1"),
        ("gid_map", f"0 {os.getegid()} 1"),
    ):
        try:
            fd = os.open(f"/proc/{pid}/{name}", os.O_WRONLY | os.O_CLOEXEC)
            try:
                os.write(fd, text.encode())
            finally:
                os.close(fd)
        except OSError as error:
            raise HostError(
                f"cannot map your own id into a user namespace: {error.strerror}",
                hint="see 'ringfence doctor'",
            ) from error


def _map(plan: Plan, instance: Instance, pid: int) -> None:
    import subprocess

    for program, own in (("newuidmap", os.geteuid()), ("newgidmap", os.getegid())):
        numbers = [str(number) for line in ranges(plan, instance, own) for number in line]
        try:
            subprocess.run([program, str(pid), *numbers], check=True, capture_output=True, timeout=10)
        except (OSError, subprocess.SubprocessError) as error:
            said = getattr(error, "stderr", b"") or b""
            raise HostError(
                f"{program} refused: {said.decode('utf-8', 'replace').strip() or error}",
                hint="apt-get install uidmap; usermod --add-subuids and --add-subgids give a user ranges",
            ) from error


def _spec(plan: Plan, instance: Instance) -> bytes:
    facts = {name: getattr(instance, name) for name in Instance.__slots__}
    return json.dumps({"plan": plan, "instance": facts}).encode()


def _send(fd: int, data: bytes) -> None:
    view = memoryview(len(data).to_bytes(4, "little") + data)
    while view:
        view = view[os.write(fd, view) :]


def _hears(fd: int) -> bytes:
    import select

    poll = select.poll()
    poll.register(fd, select.POLLIN)
    return os.read(fd, 1) if poll.poll(_TIMEOUT_MS) else b""


def _failed(starting: Starting) -> HostError:
    return HostError(
        f"no user namespace could be made: {starting.words(300) or 'the kernel refused'}",
        hint="'ringfence doctor' says what is missing",
    )


def _child(count: int) -> None:
    """Do what the module's docstring says the second interpreter does."""
    from ringfence.linux import libc
    from ringfence.runtime.bundle import command, write_config
    from ringfence.runtime.stage import Ids, Stager

    spec, ready, go = (FIRST + count + place for place in range(3))
    for fd in (spec, ready, go):
        os.set_inheritable(fd, False)
    agent = agent_path()
    libc.unshare(libc.CLONE_NEWUSER | libc.CLONE_NEWNS)
    os.write(ready, b"R")
    plan, instance = _receive(spec)
    if os.read(go, 1) != b"G":
        raise SystemExit("the launcher is gone")
    os.setresgid(0, 0, 0)
    os.setresuid(0, 0, 0)
    libc.make_private("/")
    ids = Ids(base=0, uid=plan["user"]["uid"], gid=plan["user"]["gid"], userns=-1)
    Stager(instance.staging, ids, agent).run(plan["stage"])
    _lock_mounts(plan, instance, agent)
    write_config(plan, instance, userns="")
    options = (_WITH_CGROUP if plan["cgroup_limits"] else _WITHOUT_CGROUP)[plan["runtime"]["name"]]
    argv = command(plan, instance, preserve=count, options=options)
    os.execve(argv[0], argv, dict(os.environ))


def _lock_mounts(plan: Plan, instance: Instance, agent: str) -> None:
    """Go on in a user namespace below this one, with the same ids, and a copy of the mounts that it cannot loosen.

    crun mounts the root over itself and takes all flags away from it that it may: ro, nosuid and nodev are gone where
    they were set in its own user namespace. As root they were not; so they are not here either. See
    mount_namespaces(7), "Restrictions on mount namespaces".
    """
    from ringfence.linux import libc
    from ringfence.linux.userns import make_userns

    lines = ranges(plan, instance, 0) if plan["user"]["range_size"] else [(0, 0, 1)]
    same = [(inside, inside, count) for inside, _, count in lines]
    userns = make_userns(agent, same, same)
    libc.setns(userns, libc.CLONE_NEWUSER)
    os.close(userns)
    libc.unshare(libc.CLONE_NEWNS)
    libc.make_private("/")


def _receive(fd: int) -> tuple[Plan, Instance]:
    size = int.from_bytes(_exactly(fd, 4), "little")
    if size > _MOST_BYTES:
        raise SystemExit("the plan is too large")
    found = json.loads(_exactly(fd, size))
    return found["plan"], Instance(**found["instance"])


def _exactly(fd: int, size: int) -> bytes:
    data = b""
    while len(data) < size and (piece := os.read(fd, size - len(data))):
        data += piece
    return data


if __name__ == "__main__":
    from ringfence.errors import RingfenceError

    try:
        _child(int(sys.argv[1]))
    except RingfenceError as error:
        raise SystemExit(error.message) from error
    except OSError as error:
        raise SystemExit(str(error)) from error
