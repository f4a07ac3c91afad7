"""Run one command in a fresh sandbox, from beginning to end: what `ringfence.run` and ``ringfence run`` share."""

from __future__ import annotations

import os
import time

from ringfence.errors import UsageError
from ringfence.sandbox import launch, protocol
from ringfence.sandbox.prepare import Request, plan_for
from ringfence.sandbox.result import Result, Usage
from ringfence.sandbox.streams import Attendance, Budget, Collect, Source, agent_deadline_ms, relay

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from ringfence.sandbox.launch import Running
    from ringfence.sandbox.streams import Ending, Sink

    Text = str | bytes

# What no reader can hold: the output of a policy without a limit is not collected beyond this.
MOST_COLLECTED_BYTES = 1 << 30
TIMED_OUT = 124
KILLED = 128


def run(
    argv: Sequence[Text] = (),
    *,
    policy: str = "untrusted",
    isolation: str | None = None,
    image: str | None = None,
    pull: str = "missing",
    rootfs: str | None = None,
    runtime: str | None = None,
    gvisor_platform: str | None = None,
    allow_emulation: bool = False,
    vmm: str | None = None,
    stdin: bytes = b"",
    timeout: float | None = None,
    env: Mapping[str, str] | None = None,
    cwd: str | None = None,
    overrides: Mapping[str, object] | None = None,
    allow_unenforced: Sequence[str] = (),
) -> Result:
    """Run `argv` in a fresh sandbox and return its `Result`; stdout and stderr are bytes.

    An image's entrypoint comes before `argv`, and its own command in place of an empty one; `pull` says when an
    image is fetched: "missing", "always" or "never". With `allow_emulation` a microVM may do without KVM, and so
    without a hardware boundary: the proof says so. `vmm` is "qemu", the default, or "firecracker".

    `policy` is a preset or a path; `timeout` (seconds) and `isolation` override the policy's own, as does every
    entry of `overrides`, by dotted YAML key ("limits.memory": "512MiB"). `env` is added to the image's
    environment; nothing is inherited from the caller. A command that is missing or not executable is a result
    with exit status 127 or 126. Raises a `ringfence.errors.RingfenceError` when nothing could be run.
    """
    fields = dict(overrides or {})
    if isolation is not None:
        fields["isolation"] = isolation
    if timeout is not None:
        fields["limits.time"] = timeout
    request = Request(
        policy=policy,
        overrides=fields,
        image=image,
        pull=pull,
        rootfs=rootfs,
        runtime=runtime or "",
        gvisor_platform=gvisor_platform or "",
        allow_emulation=allow_emulation,
        vmm=vmm or "",
        allow_unenforced=tuple(allow_unenforced),
    )
    plan = plan_for(request)
    argv = [*plan["entrypoint"], *(argv or plan["command"])]
    if not argv:
        raise UsageError(
            "no command was given, and the image names none", hint='ringfence.run(["COMMAND", "ARG"])'
        )
    with_env = [f"{name}={value}" for name, value in (env or {}).items()]
    running = launch.prepare(
        plan,
        name="",
        argv=[_shown(word) for word in argv],
        detached=False,
        remove=True,
        env=with_env,
        cwd=cwd,
    )
    try:
        launch.start(running)
        return _captured(running, [os.fsencode(word) for word in argv], with_env, cwd, stdin)
    finally:
        running.close()


def _captured(
    running: Running, argv: Sequence[bytes], env: Sequence[str], cwd: str | None, stdin: bytes
) -> Result:
    pipes = Pipes(running.owner())
    out, err = Collect(), Collect()
    plan = running.plan
    limit = plan["output_bytes"]
    budget = Budget(MOST_COLLECTED_BYTES if limit is None else limit)
    try:
        start_job(running, argv, env, cwd, pipes.theirs)
        pipes.close_theirs()
        source = Source(pipes.take_input(), data=stdin)
        ending = Attendance(
            running, pipes.take_outputs(out, err), source, budget=budget, deadline_s=deadline_s(running)
        ).run()
    except launch.CommandError as error:
        return Result(error.status, stderr=f"ringfence: {error}\n".encode(), proof=running.proof)
    finally:
        pipes.close()
    return finish(running, ending, budget, bytes(out.data), bytes(err.data))


def start_job(
    running: Running,
    argv: Sequence[bytes],
    env: Sequence[str],
    cwd: str | None,
    descriptors: Sequence[int],
    *,
    flags: int = 0,
    window: tuple[int, int] = (0, 0),
) -> None:
    """Hand the job to the agent, take the proof while it is held, and let it go."""
    plan = running.plan
    detached = bool(flags & protocol.DETACH)
    relayed: list[int] = []
    if flags & protocol.TTY and not detached and plan["isolation"] != "linux":
        # A pty's master cannot leave a kernel of its own; the agent inside carries what goes through it.
        running.pty, theirs = relay()
        relayed, descriptors, flags = [theirs], [theirs], flags | protocol.RELAY
    frame = protocol.encode_start(
        argv,
        [os.fsencode(item) for item in launch.merged_env(plan["env"], env)],
        os.fsencode(cwd or plan["cwd"]),
        flags=flags | protocol.HOLD,
        deadline_ms=agent_deadline_ms(plan["time_s"]),
        output_limit_bytes=(plan["output_bytes"] or 0) if detached else 0,
        cols=window[0],
        rows=window[1],
    )
    try:
        reported = launch.hold(running, frame, descriptors)
    finally:
        for fd in relayed:
            os.close(fd)
    launch.prove_held(running, reported)
    launch.go(running)


def deadline_s(running: Running) -> float | None:
    """Return when the job's time is up, on the clock of time.monotonic()."""
    time_s = running.plan["time_s"]
    return None if time_s is None else running.started_s + time_s


def finish(
    running: Running, ending: Ending, budget: Budget, stdout: bytes = b"", stderr: bytes = b""
) -> Result:
    """Return the result once the sandbox is dead, with what its cgroup counted."""
    running.wait_gone()
    wall_s = time.monotonic() - running.started_s
    group = running.cgroup
    counted = group.usage() if group is not None else None
    code, signal, flags = ending.exited or (KILLED + 9, 9, 0)
    # A microVM's kernel keeps the job's limit, and says so; its cgroup on the host is only around the machine.
    oom_killed = bool(flags & protocol.OUT_OF_MEMORY) or (group is not None and group.oom_kills() > 0)
    timed_out = ending.timed_out or bool(flags & protocol.TIMED_OUT)
    if running.plan["isolation"] == "microvm" and ending.exited is None and not timed_out:
        from ringfence.sandbox.guest import ran_out_of_memory

        oom_killed = oom_killed or ran_out_of_memory(running)
    status = TIMED_OUT if timed_out else code & 0xFF
    notes: tuple[str, ...] = ()
    if running.plan["isolation"] != "linux" and (status != 0 or ending.exited is None):
        from ringfence.sandbox.guest import notes as guest_notes

        notes = guest_notes(running, crashed=ending.exited is None and not running.killed and not oom_killed)
    if ending.exited is None and not timed_out and not oom_killed:
        # The agent is gone without a word, and not because of us: somebody killed the sandbox from outside.
        signal = 9
    return Result(
        status,
        notes=notes,
        signal=signal,
        stdout=stdout,
        stderr=stderr,
        timed_out=timed_out,
        oom_killed=oom_killed,
        output_truncated=budget.dropped_bytes > 0,
        usage=Usage(
            wall_s=wall_s,
            cpu_s=counted and counted["cpu_s"],
            memory_peak_bytes=counted and counted["memory_peak_bytes"],
            io_read_bytes=counted and counted["io_read_bytes"],
            io_write_bytes=counted and counted["io_write_bytes"],
        ),
        proof=running.proof,
    )


class Pipes:
    """Three pipes: ours and the job's ends of its standard streams. `stdin_fd` stands in for the first one."""

    __slots__ = ("_input", "_outputs", "theirs")

    def __init__(self, owner: tuple[int, int], stdin_fd: int = -1) -> None:
        """Open them close-on-exec; they reach the job as passed descriptors only.

        `owner` are the job's host ids, `Running.owner`: opening /dev/stdout by name opens the pipe anew. Where there
        are none it is open to all: nobody gets at it but through a process that has it.
        """
        self.theirs: list[int] = []
        self._outputs: list[int] = []
        self._input = -1
        if stdin_fd >= 0:
            self.theirs.append(os.dup(stdin_fd))
        else:
            reader, self._input = os.pipe2(os.O_CLOEXEC)
            self.theirs.append(reader)
            _give(reader, owner)
        for _ in range(2):
            reader, writer = os.pipe2(os.O_CLOEXEC)
            self._outputs.append(reader)
            self.theirs.append(writer)
            _give(writer, owner)

    def close_theirs(self) -> None:
        """Close the job's ends, which it has by now."""
        for fd in self.theirs:
            os.close(fd)
        self.theirs = []

    def take_input(self) -> int:
        """Return the end that feeds the job; the caller owns it now."""
        fd, self._input = self._input, -1
        return fd

    def take_outputs(self, out: Sink, err: Sink) -> dict[int, Sink]:
        """Return {descriptor: sink}; the caller owns the descriptors now."""
        fds, self._outputs = self._outputs, []
        return dict(zip(fds, (out, err), strict=True))

    def close(self) -> None:
        """Close what nobody has taken."""
        for fd in (*self.theirs, *self._outputs, *([self._input] if self._input >= 0 else [])):
            os.close(fd)
        self.theirs, self._outputs, self._input = [], [], -1


def _give(pipe: int, owner: tuple[int, int]) -> None:
    if owner[0] >= 0:
        os.fchown(pipe, *owner)
    else:
        os.fchmod(pipe, 0o666)


def _shown(word: Text) -> str:
    return os.fsdecode(word)
