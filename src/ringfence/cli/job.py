"""A job of the command line and its streams, from the gate to the exit status."""

import gc
import os
import stat
import sys

from ringfence.cli.terminal import RawTerminal, Signals, window
from ringfence.errors import one_line
from ringfence.sandbox import protocol
from ringfence.sandbox.run import MOST_COLLECTED_BYTES, Pipes, deadline_s, finish, start_job
from ringfence.sandbox.streams import Attendance, Budget, Collect, Forward, Source

TYPE_CHECKING = False
if TYPE_CHECKING:
    import argparse

    from ringfence.plan.document import Plan
    from ringfence.sandbox.launch import Running
    from ringfence.sandbox.result import Result
    from ringfence.sandbox.streams import Ending, Sink

_SIGINT, _SIGPIPE, _SIGWINCH, _SIGTERM = 2, 13, 28, 15
# Somebody who asks three times means it.
_PATIENCE = 3
# A terminal has no end of input: it has this key, twice where there is an unfinished line.
_END_OF_INPUT = b"\x04\x04"


class Job:
    """One job of the command line, and its streams."""

    def __init__(
        self,
        args: "argparse.Namespace",
        running: "Running",
        argv: list[bytes],
        env: list[str],
        signals: Signals,
    ) -> None:
        self.args = args
        self.running = running
        self.argv = argv
        self.env = env
        self.signals = signals
        self.asked: dict[int, int] = {}

    def detach(self) -> bool:
        """Leave the job to its agent; True once it runs."""
        log = self.running.open_log()
        try:
            self._start((log,), protocol.DETACH | (protocol.TTY if self.args.tty else 0))
        finally:
            os.close(log)
        # Now: a job that nobody was told the id of must not live on.
        print(self.running.entry.id, flush=True)
        return True

    def attend(self) -> int:
        """Carry the streams until the job ends, and return the exit status."""
        plan = self.running.plan
        limit = plan["output_bytes"]
        # As JSON it is kept in memory until the end, which no policy may mean to be without a limit.
        budget = Budget(MOST_COLLECTED_BYTES if limit is None and self.args.json else limit)
        out: Sink = Collect() if self.args.json else Forward(1)
        err: Sink = Collect() if self.args.json else Forward(2)
        ending = self._attend_tty(budget) if self.args.tty else self._attend_pipes(budget, out, err)
        result = finish(
            self.running,
            ending,
            budget,
            bytes(out.data) if isinstance(out, Collect) else b"",
            bytes(err.data) if isinstance(err, Collect) else b"",
        )
        _explain(result, plan, budget)
        for text in result.notes:
            print(f"ringfence: {one_line(text)}", file=sys.stderr)
        if self.args.usage:
            print(f"ringfence: used {_usage(result)}", file=sys.stderr)
        if self.args.json:
            print(_as_json(result, self.running))
        return result.exit_status

    def _start(self, descriptors: tuple[int, ...], flags: int = 0) -> None:
        start_job(
            self.running,
            self.argv,
            self.env,
            self.args.workdir,
            descriptors,
            flags=flags,
            window=window(1) if flags & protocol.TTY else (0, 0),
        )

    def _attend_pipes(self, budget: Budget, out: "Sink", err: "Sink") -> "Ending":
        forwarded = self.args.interactive or not os.isatty(0)
        direct = forwarded and _is_plain_pipe(0)
        if direct:
            _let_be_opened(0)
        opened = _own_stdin() if direct and self.running.plan["isolation"] != "linux" else -1
        if opened < 0 and self.running.plan["isolation"] != "linux":
            direct = False
        pipes = Pipes(self.running.owner(), stdin_fd=max(opened, 0) if direct else -1)
        if opened >= 0:
            os.close(opened)
        try:
            self._start(tuple(pipes.theirs))
            pipes.close_theirs()
            source = None if direct else Source(pipes.take_input(), fd=0 if forwarded else -1)
            return self._attendance(pipes.take_outputs(out, err), source, budget).run()
        finally:
            pipes.close()

    def _attend_tty(self, budget: Budget) -> "Ending":
        self._start((), protocol.TTY)
        master, self.running.pty = self.running.pty, -1
        source = Source(os.dup(master), fd=0 if self.args.interactive else -1, end=_END_OF_INPUT)
        attendance = self._attendance({master: Forward(1)}, source, budget)
        if self.args.interactive and os.isatty(0):
            with RawTerminal(0):
                return attendance.run()
        return attendance.run()

    def _attendance(self, outputs: "dict[int, Sink]", source: "Source | None", budget: Budget) -> Attendance:
        gc.enable()
        return Attendance(
            self.running,
            outputs,
            source,
            budget=budget,
            deadline_s=deadline_s(self.running),
            wake_fd=self.signals.fd,
            on_wake=self._pass_signals_on,
            on_unread=self._break_pipe if self.running.guest is not None and not self.args.tty else None,
        )

    def _break_pipe(self) -> None:
        if self.running.connection is not None:
            self.running.connection.send(protocol.encode_signal(_SIGPIPE))

    def _pass_signals_on(self) -> None:
        connection = self.running.connection
        for number in self.signals.read():
            if connection is None:
                return
            if number == _SIGWINCH:
                if self.args.tty:
                    connection.send(protocol.encode_resize(*window(1)))
                continue
            self.asked[number] = self.asked.get(number, 0) + 1
            if self.asked[number] >= _PATIENCE and number in (_SIGINT, _SIGTERM):
                self.running.kill()
            else:
                connection.send(protocol.encode_signal(number))


def _own_stdin() -> int:
    """Return standard input opened once more, -1 if that cannot be done.

    A kernel of its own makes what it is handed non-blocking, which all that share the descriptor's description would
    notice, such as the next command of our caller's.
    """
    try:
        # A FIFO that nobody writes to yet must not keep us; the job is to wait for its input all the same.
        fd = os.open("/proc/self/fd/0", os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError:
        return -1
    os.set_blocking(fd, True)
    return fd


def _is_plain_pipe(fd: int) -> bool:
    """Say whether `fd` may be handed to a job as it is: the reading end of a pipe, and nothing else."""
    import fcntl

    readable_only = fcntl.fcntl(fd, fcntl.F_GETFL) & os.O_ACCMODE == os.O_RDONLY
    return readable_only and stat.S_ISFIFO(os.fstat(fd).st_mode)


def _let_be_opened(fd: int) -> None:
    """Let a job read a pipe of our caller's by name as well, as in "python3 /dev/stdin"; writing to it stays closed.

    Nobody else gets at a pipe without a name but through a process that has it: proc_pid_fd(5).
    """
    found = os.fstat(fd)
    ours = os.pipe()
    try:
        has_no_name = found.st_dev == os.fstat(ours[0]).st_dev
    finally:
        for end in ours:
            os.close(end)
    if has_no_name and found.st_uid == os.geteuid():
        os.fchmod(fd, stat.S_IMODE(found.st_mode) | 0o044)


def _explain(result: "Result", plan: "Plan", budget: Budget) -> None:
    """Say on stderr what the exit status alone does not."""
    if result.timed_out:
        print(
            f"ringfence: time limit of {plan['time_s']:g} s reached (limits.time, --timeout)", file=sys.stderr
        )
    if result.oom_killed:
        # The policy's own: the cgroup around a kernel of its own allows for that as well.
        machine = plan["machine"]
        limits = [
            control["asked"] for control in plan["controls"] if control["name"] == "cgroup.memory_bytes"
        ]
        if machine is not None:
            limits = [machine["job_limits"].get("limits.memory")]
        size = f" of {limits[0] / (1 << 20):g} MiB" if limits and isinstance(limits[0], int) else ""
        print(f"ringfence: out of memory: limit{size} reached (limits.memory, --memory)", file=sys.stderr)
    if result.output_truncated:
        limit = MOST_COLLECTED_BYTES if plan["output_bytes"] is None else plan["output_bytes"]
        print(
            f"ringfence: output limit of {limit} bytes reached, {budget.dropped_bytes} bytes dropped"
            " (limits.output)",
            file=sys.stderr,
        )


def _usage(result: "Result") -> str:
    used = result.usage
    moved = f"{_mib(used.io_read_bytes)} read from and {_mib(used.io_write_bytes)} written to disk"
    cpu = "unknown CPU time" if used.cpu_s is None else f"{used.cpu_s:.3f} s of CPU"
    return f"{used.wall_s:.3f} s, {cpu}, at most {_mib(used.memory_peak_bytes)} of memory, {moved}"


def _mib(size_bytes: int | None) -> str:
    return "an unknown amount" if size_bytes is None else f"{size_bytes / (1 << 20):.1f} MiB"


def _as_json(result: "Result", running: "Running") -> str:
    import base64
    import json

    streams: dict[str, str] = {}
    for name, data in (("stdout", result.stdout), ("stderr", result.stderr)):
        try:
            streams[name] = data.decode()
        except UnicodeDecodeError:
            streams[f"{name}_base64"] = base64.b64encode(data).decode()
    return json.dumps(
        {
            "sandbox": running.entry.id,
            "exit_status": result.exit_status,
            "signal": result.signal,
            "timed_out": result.timed_out,
            "oom_killed": result.oom_killed,
            "output_truncated": result.output_truncated,
            **streams,
            "notes": list(result.notes),
            "usage": result.usage.as_dict(),
            "proof": result.proof,
        }
    )
