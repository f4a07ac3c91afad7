"""Bring a sandbox up to the gate, prove it, and let the job go. On the way of every run.

The order is what makes a crash harmless: directory and lock first, then the record of what will exist, then the
things themselves. Whatever kills this process, the next one finds the record without a holder and removes it all.
"""

from __future__ import annotations

import _socket
import os
import select
import time
from _struct import Struct

from ringfence.cgroup.group import Cgroup
from ringfence.cgroup.layout import Layout
from ringfence.errors import HostError, ImageError, ProofError, RingfenceError, SandboxError
from ringfence.runtime.base import Instance
from ringfence.sandbox import protocol, ranges, reap, store

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from ringfence.plan.document import ImageChoice, Plan
    from ringfence.proof.guest import Guest
    from ringfence.proof.prove import Proof
    from ringfence.runtime.base import Starting
    from ringfence.runtime.door import Descriptors
    from ringfence.sandbox.store import Entry

# A start takes tens of milliseconds; on a machine that swaps it may take seconds.
START_TIMEOUT_S = 30.0
_AGENT_PATIENCE_S = 0.1
# What a runtime writes beside the bundle; with less left, the disk is why it failed.
_ROOM_BYTES, _ROOM_FILES = 1 << 17, 16
# `ps` shows the beginning of a command line; a record must stay small enough to be read back.
_SHOWN_WORDS, _SHOWN_CHARACTERS = 64, 1024
_MOST_ENV_CHARACTERS = 1 << 16
_SO_PASSCRED = 16
_SCM_CREDENTIALS = 2
_UCRED = Struct("=iII")
_STAGES = {
    protocol.STAGE_DESCRIPTORS: "its standard streams could not be set up",
    protocol.STAGE_CWD: "the working directory cannot be entered",
    protocol.STAGE_EXEC: "the command cannot be executed",
}


def failure(payload: bytes, command: str) -> Exception:
    """Return what a FAILED frame means: a CommandError, or a SandboxError when it was not the command's fault."""
    stage, number = protocol.decode_failed(payload)
    if stage == protocol.STAGE_FORK:
        return SandboxError(
            f"the sandbox has no room for {command!r}: {os.strerror(number)}",
            hint="its limits.pids, limits.threads or limits.memory are used up, or it is just ending",
        )
    if stage == protocol.STAGE_DESCRIPTORS:
        return SandboxError(f"{_STAGES[stage]}: {os.strerror(number)}", hint="see --debug")
    return CommandError(stage, number, command)


class Interrupted(Exception):
    """Whoever asked for a start gave it up; nothing was run."""


class CommandError(Exception):
    """The job's command could not be executed: `status` is 126 or 127. Not an error of Ringfence's."""

    code = "RF-COMMAND"

    def __init__(self, stage: int, number: int, command: str) -> None:
        """Say why: `number` is the errno inside the sandbox."""
        import errno

        self.status = 127 if number == errno.ENOENT and stage == protocol.STAGE_EXEC else 126
        hint = _command_hint(stage, number, command)
        reason = f"{os.strerror(number)}{hint} [{self.code}]"
        super().__init__(
            f"{command!r}: {reason}"
            if stage == protocol.STAGE_EXEC
            else f"{_STAGES.get(stage, stage)}: {reason}"
        )


def _command_hint(stage: int, number: int, command: str) -> str:
    import errno

    if stage == protocol.STAGE_CWD:
        return " (--workdir names a directory inside the sandbox)"
    if number == errno.ENOENT:
        return " in the image" if "/" in command else " on the PATH of the image"
    if number == errno.EACCES:
        return " (is it a file with execute permission?)"
    if number == errno.ENOEXEC:
        return " (a script needs a first line such as #!/bin/sh)"
    return ""


class Running:
    """A sandbox whose agent lives, from this process's side."""

    __slots__ = (
        "agent_pid",
        "cgroup",
        "command",
        "connection",
        "door",
        "entry",
        "guest",
        "image_fd",
        "instance",
        "job_pid",
        "killed",
        "pidfd",
        "plan",
        "proof",
        "pty",
        "say",
        "snapshot_fd",
        "snapshots",
        "started_s",
        "starting",
    )

    def __init__(self, plan: Plan, entry: Entry, instance: Instance, command: str) -> None:
        """Nothing is started yet; `command` is the first word of the job, for messages."""
        self.plan = plan
        self.entry = entry
        self.instance = instance
        self.command = command
        self.cgroup = (
            Cgroup(Layout.from_dict(plan["cgroup"]), instance.cgroup_path) if plan["cgroup_limits"] else None
        )
        self.image_fd = -1
        # Of a sandbox with a kernel of its own: our ends of its logs, and which of the host's processes it is.
        self.door: Descriptors | None = None
        self.guest: Guest | None = None
        self.starting: Starting | None = None
        self.connection: protocol.Connection | None = None
        self.agent_pid = 0
        self.job_pid = 0
        self.killed = False
        # Whether a machine may be restored from a saved one, from which, and whom to tell that one is being saved.
        self.snapshots = True
        self.snapshot_fd = -1
        self.say: Callable[[str], object] = lambda _: None
        self.pidfd = -1
        self.pty = -1
        self.proof: Proof | None = None
        self.started_s = 0.0

    def owner(self) -> tuple[int, int]:
        """Return the job's uid and gid on the host, (-1, -1) where nothing can be given to them.

        Without root nobody can; and a kernel of its own does not know of the host's ids.
        """
        user, base = self.plan["user"], self.instance.base
        if self.plan["rootless"] or self.plan["isolation"] != "linux":
            return -1, -1
        return base + user["uid"], base + user["gid"]

    def open_log(self) -> int:
        """Return a new descriptor of what a detached job's output goes into. Raises OSError."""
        if self.door is not None:
            return os.dup(self.door.log)
        flags = os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
        return os.open(self.entry.log_path(), flags, 0o600)

    def kill(self) -> None:
        """Kill the sandbox: its pid namespace dies with the agent. Waits until it is gone."""
        self.killed = True
        if not self.wait_gone(0):
            import signal

            try:
                signal.pidfd_send_signal(self.pidfd, signal.SIGKILL)
            except ProcessLookupError:
                pass
        if not self.wait_gone(_AGENT_PATIENCE_S) and self.cgroup is not None:
            # The job may have put the agent behind itself in every queue for a CPU (SCHED_IDLE, one CPU, 60 rivals):
            # it dies only when it runs, 15 s later as measured. Its rivals are at the front, and die at once.
            self.cgroup.kill()
        self.wait_gone()

    def wait_gone(self, timeout_s: float = 5.0) -> bool:
        """Wait until the agent is dead; False if it is still there."""
        if self.pidfd < 0:
            return True
        poll = select.poll()
        poll.register(self.pidfd, select.POLLIN)
        return bool(poll.poll(timeout_s * 1000))

    def close(self) -> None:
        """Remove everything of the sandbox; it must be dead or dying. Raises HostError if it cannot be killed."""
        if self.connection is not None:
            self.connection.close()
            self.connection = None
        if self.starting is not None:
            self.starting.wait()
            self.starting.release()
        try:
            self.kill()
            reap.discard(self.entry)
        finally:
            self._close_descriptors()
            # Also of what could not be killed: as long as it is held, nobody else tries again.
            self.entry.unlock()

    def let_go(self) -> None:
        """Leave the sandbox to itself (detached)."""
        if self.connection is not None:
            self.connection.close()
            self.connection = None
        if self.starting is not None:
            self.starting.wait()
            self.starting.release()
        self._close_descriptors()
        self.entry.unlock()

    def _close_descriptors(self) -> None:
        for fd in (self.pidfd, self.pty, self.image_fd, self.snapshot_fd):
            if fd >= 0:
                os.close(fd)
        self.pidfd = self.pty = self.image_fd = self.snapshot_fd = -1
        if self.door is not None:
            self.door.close()


def prepare(
    plan: Plan,
    *,
    name: str,
    argv: Sequence[str],
    detached: bool,
    remove: bool,
    env: Sequence[str] = (),
    cwd: str | None = None,
    traced: bool = False,
) -> Running:
    """Reserve everything for a sandbox of `plan` and record it; nothing of it runs yet.

    `env` and `cwd` are the job's, which `exec` starts from as well; `traced` asks for a trace of its system calls.
    Raises SandboxError, UsageError, HostError; then nothing is left.
    """
    reap.sweep()
    if not name:
        running = _reserve(plan, name, argv, env, cwd, detached=detached, remove=remove)
        running.instance.traced = traced
        return running
    with store.naming():
        if store.name_taken(name):
            raise SandboxError(
                f"there is a sandbox called {name!r}", hint=f"ringfence rm {name}, or another name"
            )
        return _reserve(plan, name, argv, env, cwd, detached=detached, remove=remove)


def reserve(plan: Plan, shown: str) -> Running:
    """Reserve everything for a sandbox without a job, which `ps` shows as `shown`. Raises as `prepare` does."""
    return _reserve(plan, "", [shown], (), None, detached=False, remove=True)


def merged_env(image: Sequence[str], given: Sequence[str]) -> list[str]:
    """Return "NAME=value" items, later ones winning; the caller's own environment plays no part."""
    found: dict[str, str] = {}
    for item in (*image, *given):
        name, _, value = item.partition("=")
        found[name] = value
    return [f"{name}={value}" for name, value in found.items()]


def _reserve(
    plan: Plan,
    name: str,
    argv: Sequence[str],
    env: Sequence[str],
    cwd: str | None,
    *,
    detached: bool,
    remove: bool,
) -> Running:
    entry = store.create()
    base = 0
    try:
        size = plan["user"]["range_size"]
        if size:
            base = ranges.allocate(size, entry.directory, rootless=plan["rootless"])
        layout = Layout.from_dict(plan["cgroup"])
        path = layout.path(entry.id) if plan["cgroup_limits"] else ""
        entry.write_record(
            {
                "id": entry.id,
                "name": name,
                "argv": [word[:_SHOWN_CHARACTERS] for word in argv[:_SHOWN_WORDS]],
                "created_ns": time.time_ns(),
                "image": plan["image"]["name"],
                "image_digest": plan["image"]["digest"],
                "stop_signal": plan["stop_signal"],
                "isolation": plan["isolation"],
                "runtime": _runner(plan),
                "time_s": plan["time_s"],
                "env": _bounded(merged_env(plan["env"], env), plan["env"]),
                "cwd": cwd or plan["cwd"],
                "detached": detached,
                "remove": remove,
                "base": base,
                "rootless": plan["rootless"],
                "cgroup": plan["cgroup"],
                "cgroup_path": path,
            }
        )
        instance = Instance(
            id=entry.id,
            directory=entry.directory,
            staging=store.staging_dir(),
            base=base,
            cgroup_path=path,
            detached=detached,
        )
        running = Running(plan, entry, instance, argv[0] if argv else "")
        running.image_fd = _held(plan["image"])
        return running
    except BaseException:
        ranges.release(base, entry.directory, rootless=plan["rootless"])
        entry.remove()
        entry.unlock()
        raise


def _runner(plan: Plan) -> str:
    """Return what runs the job, for `ps`; where there is a kernel of its own, crun and runc only make the ring."""
    if plan["isolation"] == "gvisor":
        return "runsc"
    machine = plan["machine"]
    return plan["runtime"]["name"] if machine is None else machine["vmm"]


def _held(image: ImageChoice) -> int:
    """Take hold of an image of the store, so that nobody removes it while a sandbox of it lives; -1 for others."""
    if not image["record"]:
        return -1
    from ringfence.image.hold import hold

    descriptor = hold(image["record"])
    if descriptor < 0:
        raise ImageError(f"the image {image['name']!r} has just been removed", hint="pull or build it again")
    return descriptor


def _bounded(env: list[str], image: list[str]) -> list[str]:
    """Return `env` if a record has room for it; without it `exec` starts from the image's alone."""
    return env if sum(map(len, env)) <= _MOST_ENV_CHARACTERS else image


def start(
    running: Running,
    *,
    meanwhile: Callable[[], object] | None = None,
    wake_fd: int = -1,
    interrupted: Callable[[], bool] = lambda: False,
) -> None:
    """Start the runtime and wait until the agent stands at the gate.

    `meanwhile` is called while the runtime is at work, for tens of milliseconds: the time to import what comes
    afterwards. When `wake_fd` can be read, `interrupted` says whether to give up. Raises SandboxError, HostError,
    MountError, Interrupted.
    """
    if running.plan["rootless"] and running.cgroup is not None:
        # The controllers have to be switched on on the way down, and we have to step aside: only we can do that.
        running.cgroup.create()
    if running.plan["isolation"] == "microvm":
        from ringfence.sandbox.snapshot import snapshot_for

        running.snapshot_fd = snapshot_for(running, wake_fd, interrupted)
    ours, theirs = _socket_pair()
    listener = _listener(running.entry.path("control.sock"))
    try:
        held = () if running.image_fd < 0 else (running.image_fd,)
        descriptors = (theirs.fileno(), listener.fileno(), running.entry.lock_fd, *held)
        _start_runtime(running, descriptors)
    except BaseException:
        ours.close()
        raise
    finally:
        theirs.close()
        listener.close()
    running.connection = protocol.Connection(ours)
    if meanwhile is not None:
        meanwhile()
    import ringfence.proof.prove  # noqa: F401

    _wait_for(ours, running, wake_fd, interrupted)
    greeter = _greeted_by(ours, running)
    running.agent_pid = greeter
    if running.plan["isolation"] != "linux":
        from ringfence.sandbox import guest

        if running.plan["isolation"] == "gvisor":
            # The words of the agent inside were written by the kernel that it runs under: gVisor's sentry.
            running.agent_pid = guest.door(running)
        running.guest = guest.found(running, greeter)
    running.pidfd = os.pidfd_open(running.agent_pid)
    if running.plan["isolation"] == "gvisor":
        guest.check_door(running)
    if running.cgroup is not None and running.plan["deny_devices"]:
        running.cgroup.deny_devices(running.plan["deny_devices"])
    frame = running.connection.recv()
    if frame is None:
        raise _died(running)
    if frame[0] != protocol.READY or protocol.decode_ready(frame[2])[0] != protocol.VERSION:
        raise SandboxError("the agent speaks another protocol", hint="run: make setup")


def _start_runtime(running: Running, descriptors: tuple[int, ...]) -> None:
    plan, instance = running.plan, running.instance
    if plan["isolation"] == "linux":
        from ringfence.runtime.linux import start as start_linux

        running.starting = start_linux(plan, instance, descriptors)
        return
    if plan["isolation"] == "microvm":
        if plan["machine"] is not None and plan["machine"]["vmm"] == "firecracker":
            from ringfence.runtime.microvm.firecracker import start as start_firecracker

            running.starting = start_firecracker(plan, instance, descriptors)
            return
        from ringfence.runtime.microvm.qemu import start as start_qemu

        saved = () if running.snapshot_fd < 0 else (running.snapshot_fd,)
        running.starting = start_qemu(plan, instance, descriptors, saved)
        return
    from ringfence.runtime.gvisor import start as start_gvisor

    running.starting, running.door = start_gvisor(
        plan, instance, descriptors, log_path=running.entry.log_path()
    )


def hold(running: Running, frame: bytes, descriptors: Sequence[int]) -> int:
    """Have the agent prepare the job and stop before its first instruction; return its count of descriptors.

    Raises CommandError, SandboxError.
    """
    connection = running.connection
    assert connection is not None  # noqa: S101 - start() has set it
    connection.send(frame, descriptors)
    answer = connection.recv()
    if answer is None:
        raise _died(running)
    kind, _, payload, received = answer
    if kind == protocol.FAILED:
        raise failure(payload, running.command)
    if kind == protocol.EXITED:
        raise _died(running)
    running.pty = received[0] if received else running.pty
    if running.guest is None:
        running.job_pid = _child_of(running.agent_pid)
    else:
        from ringfence.sandbox.guest import settle, subject

        settle(running, running.guest)
        running.job_pid = subject(running.guest)
    return protocol.decode_prepared(payload)[1]


def prove_held(running: Running, reported_descriptors: int) -> Proof:
    """Take the proof of the held job. Raises ProofError if any asked control was not observed."""
    from ringfence.proof.observe import Subject
    from ringfence.proof.prove import failures, prove

    subject = Subject(
        pid=running.job_pid,
        base=running.instance.base,
        size=running.plan["user"]["range_size"],
        cgroup=running.cgroup,
        rules=(),
    )
    running.proof = prove(
        running.plan,
        running.instance,
        subject,
        reported_descriptors=reported_descriptors,
        guest=running.guest,
    )
    if not running.proof["holds"]:
        found = failures(running.proof)
        more = f" (and {len(found) - 1} more)" if len(found) > 1 else ""
        raise ProofError(
            f"the kernel does not enforce what the policy asks: {found[0]}{more}; nothing was run",
            hint="--proof FILE has the whole table; 'ringfence doctor' says what this host can enforce",
        )
    return running.proof


def go(running: Running) -> None:
    """Let the job execute; the time limit counts from here."""
    assert running.connection is not None  # noqa: S101
    running.entry.mark_started()
    if running.plan["isolation"] == "gvisor":
        _start_clock(running)
    running.connection.send(protocol.encode_go())
    running.started_s = time.monotonic()


def _start_clock(running: Running) -> None:
    """Tell the door that its time limit counts now: it is the last to keep one when nobody else is there any more."""
    import signal

    try:
        signal.pidfd_send_signal(running.pidfd, signal.SIGUSR1)
    except ProcessLookupError:
        pass  # what it was the first process of is gone: its end is about to be read


def _died(running: Running) -> RingfenceError:
    memory = running.cgroup is not None and running.cgroup.oom_kills() > 0
    if not memory and running.starting is not None:
        if running.starting.wait() != 0:
            return _runtime_error(running)  # it had started the agent, and then failed all the same
        _distrust(running)
        if running.plan["isolation"] != "linux":
            from ringfence.sandbox import guest

            return guest.failure(running)
    return SandboxError(
        "the sandbox ended before the job started" + (": the memory limit is too small" if memory else ""),
        hint="raise limits.memory (--memory)" if memory else "see --debug",
    )


def _socket_pair() -> tuple[_socket.socket, _socket.socket]:
    ours, theirs = _socket.socketpair(_socket.AF_UNIX, _socket.SOCK_STREAM)
    ours.setsockopt(_socket.SOL_SOCKET, _SO_PASSCRED, 1)
    ours.settimeout(START_TIMEOUT_S)
    return ours, theirs


def _listener(path: str) -> _socket.socket:
    listener = _socket.socket(_socket.AF_UNIX, _socket.SOCK_STREAM)
    try:
        listener.bind(path)
        os.chmod(path, 0o600)
        listener.listen(8)
    except OSError as error:
        listener.close()
        raise SandboxError(f"cannot make {path}: {error.strerror or error}", hint=store.NO_ROOM) from error
    return listener


def _wait_for(sock: _socket.socket, running: Running, wake_fd: int, interrupted: Callable[[], bool]) -> None:
    """Wait until the agent says its first word. Raises SandboxError when it does not, Interrupted."""
    poll = select.poll()
    for fd in (sock.fileno(), *([wake_fd] if wake_fd >= 0 else [])):
        poll.register(fd, select.POLLIN)
    deadline = time.monotonic() + START_TIMEOUT_S
    while True:
        ready = dict(poll.poll(max(0.0, deadline - time.monotonic()) * 1000))
        if sock.fileno() in ready:
            return
        if not ready:
            raise _late(running)
        if interrupted():
            raise Interrupted


def _greeted_by(sock: _socket.socket, running: Running) -> int:
    """Return the pid of whoever speaks on the other end, in the kernel's words: unix(7), SCM_CREDENTIALS."""
    space = _socket.CMSG_SPACE(_UCRED.size)
    try:
        data, ancillary, _, _ = sock.recvmsg(1, space, _socket.MSG_PEEK)
    finally:
        sock.setsockopt(_socket.SOL_SOCKET, _SO_PASSCRED, 0)
    if not data:
        raise _died(running) if running.plan["isolation"] != "linux" else _runtime_error(running)
    for level, kind, value in ancillary:
        if level == _socket.SOL_SOCKET and kind == _SCM_CREDENTIALS:
            pid: int = _UCRED.unpack(value)[0]
            if pid > 0:
                return pid
    raise SandboxError("the kernel does not say who the agent is", hint="is this a nested pid namespace?")


def _late(running: Running) -> SandboxError:
    _distrust(running)
    said = ""
    if running.plan["isolation"] != "linux":
        from ringfence.runtime.door import words

        said = words(running.entry.directory)[-300:].replace("\n", "; ")
    return SandboxError(
        f"the runtime did not start the sandbox within {START_TIMEOUT_S:.0f} s"
        + (f": {said}" if said else ""),
        hint="see --debug",
    )


def _distrust(running: Running) -> None:
    if running.instance.snapshot:
        from ringfence.sandbox.snapshot import distrust

        distrust(running)


def _runtime_error(running: Running) -> HostError:
    starting, directory = running.starting, running.entry.directory
    assert starting is not None  # noqa: S101 - start() has set it
    status = starting.wait()
    said = starting.words(600).replace("\n", "; ")
    found = os.statvfs(directory)
    full = found.f_bavail * found.f_frsize < _ROOM_BYTES or found.f_favail < _ROOM_FILES
    return HostError(
        f"the runtime could not start the sandbox (exit status {status}): {said or 'it said nothing'}",
        hint=f"{directory} is full: {store.NO_ROOM}" if full else "'ringfence doctor' checks this host",
    )


def _child_of(pid: int) -> int:
    """Return the one child of the agent: at the gate it has no other. Raises SandboxError."""
    fd = os.open(f"/proc/{pid}/task/{pid}/children", os.O_RDONLY | os.O_CLOEXEC)
    try:
        children = os.read(fd, 4096).split()
    finally:
        os.close(fd)
    if len(children) != 1:
        raise SandboxError(f"the agent has {len(children)} children at the gate instead of one")
    return int(children[0])
