"""Attendance on real pipes and a real socket, whose other end the test plays: nothing may block it."""

import os
import pty
import select
import socket
import struct
import threading
import time
from collections.abc import Iterator

import pytest

from ringfence.errors import SandboxError
from ringfence.sandbox import protocol, streams
from ringfence.sandbox.launch import CommandError
from ringfence.sandbox.streams import Attendance, Budget, Collect, Ending, Forward, Sink, Source

EXITED = struct.Struct("<IBBHIII")


class Job:
    """The other side: an agent's end of the connection and the job's ends of its streams."""

    def __init__(self) -> None:
        ours, self.agent = socket.socketpair()
        ours.setblocking(False)
        self.connection: protocol.Connection | None = protocol.Connection(ours)
        self.command = "job"
        self.killed = 0
        self.stdin, self._stdin = os.pipe()
        self._stdout, self.stdout = os.pipe()
        self._stderr, self.stderr = os.pipe()

    def kill(self) -> None:
        """Die: the agent's end and all of the job's are closed by the kernel."""
        self.killed += 1
        self.end()

    def exit(self, code: int, signal: int = 0, flags: int = 0) -> None:
        """Say how the job ended, and be gone."""
        self.agent.send(EXITED.pack(12, protocol.EXITED, 0, 0, code, signal, flags))
        self.end()

    def end(self) -> None:
        for fd in (self.stdin, self.stdout, self.stderr):
            if fd >= 0:
                os.close(fd)
        self.stdin = self.stdout = self.stderr = -1
        self.agent.close()

    def outputs(self, out: Sink, err: Sink) -> dict[int, Sink]:
        return {self._stdout: out, self._stderr: err}

    def source(self, **more: object) -> Source:
        return Source(self._stdin, **more)  # type: ignore[arg-type]

    def attend(
        self,
        outputs: dict[int, Sink],
        source: Source | None = None,
        *,
        limit: int | None = None,
        time_s: float = 20,
    ) -> Ending:
        deadline = time.monotonic() + time_s
        self.budget = Budget(limit)
        return Attendance(self, outputs, source, budget=self.budget, deadline_s=deadline).run()  # type: ignore[arg-type]


@pytest.fixture
def job() -> Iterator[Job]:
    before = set(os.listdir("/proc/self/fd"))
    made = Job()
    yield made
    made.end()
    assert made.connection is not None
    made.connection.close()
    for fd in (made._stdin, made._stdout, made._stderr):
        try:
            os.close(fd)
        except OSError:
            continue
    assert set(os.listdir("/proc/self/fd")) == before


def beside(work: object) -> threading.Thread:
    thread = threading.Thread(target=work)  # type: ignore[arg-type]
    thread.start()
    return thread


def test_output_and_the_agents_word_come_through(job: Job) -> None:
    """Both streams byte for byte, and the status with its signal and flags."""
    out, err = Collect(), Collect()
    os.write(job.stdout, b"out\xff\0")
    os.write(job.stderr, b"err")
    job.exit(137, 9, protocol.TIMED_OUT)
    ending = job.attend(job.outputs(out, err))
    assert (bytes(out.data), bytes(err.data)) == (b"out\xff\0", b"err")
    assert (ending.exited, ending.timed_out) == ((137, 9, protocol.TIMED_OUT), False)


def test_an_agent_that_is_gone_without_a_word(job: Job) -> None:
    """Nothing is made up: there is no status."""
    job.end()
    assert job.attend(job.outputs(Collect(), Collect())).exited is None


def test_a_command_that_could_not_be_executed(job: Job) -> None:
    """The agent's stage and errno become the error with the status of shells."""
    job.agent.send(struct.pack("<IBBHII", 8, protocol.FAILED, 0, 0, protocol.STAGE_EXEC, 2))
    with pytest.raises(CommandError, match="'job': No such file") as caught:
        job.attend(job.outputs(Collect(), Collect()))
    assert caught.value.status == 127


def test_garbage_from_the_agent_is_an_error(job: Job) -> None:
    """What comes out of a sandbox is checked before it is believed."""
    job.agent.send(b"\xff" * 64)
    with pytest.raises(SandboxError, match="protocol"):
        job.attend(job.outputs(Collect(), Collect()))
    job.connection = protocol.Connection(socket.socket())


def test_the_deadline_kills(job: Job) -> None:
    """At its time, not much later, and once."""
    started = time.monotonic()
    ending = job.attend(job.outputs(Collect(), Collect()), time_s=0.2)
    assert 0.2 <= time.monotonic() - started < 2
    assert (ending.timed_out, ending.exited, job.killed) == (True, None, 1)


def flood(job: Job) -> threading.Thread:
    """Write to both streams until nobody reads them any more."""

    def write() -> None:
        try:
            while True:
                for fd in (job.stdout, job.stderr):
                    if select.select([], [fd], [], 0.01)[1]:
                        os.write(fd, b"x" * 4096)
        except (OSError, ValueError):
            return

    return beside(write)


@pytest.mark.parametrize("kind", ["pipe", "one pipe for both", "terminal", "socket"])
def test_a_reader_that_does_not_read_does_not_hold_up_the_deadline(
    job: Job, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The job is killed at its time, and what nobody takes is given up soon after."""
    monkeypatch.setattr(streams, "_DRAIN_S", 0.2)
    ends = socket.socketpair() if kind == "socket" else None
    reader, writer = (
        pty.openpty() if kind == "terminal" else (ends[0].detach(), ends[1].detach()) if ends else os.pipe()
    )
    out = Forward(writer)
    err: Sink = Forward(writer) if kind == "one pipe for both" else Collect()
    thread = flood(job)
    started = time.monotonic()
    ending = job.attend(job.outputs(out, err), time_s=0.5)
    assert time.monotonic() - started < 5
    assert ending.timed_out
    assert job.killed == 1
    thread.join(10)
    assert not thread.is_alive()
    os.close(writer)
    os.close(reader)


def test_the_callers_own_descriptor_stays_as_it_was(job: Job) -> None:
    """Whoever shares our standard output must not find it non-blocking, or closed."""
    reader, writer = os.pipe()
    os.write(job.stdout, b"x" * 50_000)
    job.exit(0)
    job.attend(job.outputs(Forward(writer), Collect()))
    assert os.get_blocking(writer)
    assert os.read(reader, 100_000) == b"x" * 50_000
    os.write(writer, b"still open")
    os.close(writer)
    os.close(reader)


def test_back_pressure_reaches_the_job(job: Job) -> None:
    """What nobody reads is not kept in memory: the job's pipe fills up, and then it is the job that waits."""
    reader, writer = os.pipe()
    written = 0

    def fill() -> None:
        nonlocal written
        until = time.monotonic() + 0.5
        while time.monotonic() < until:
            if select.select([], [job.stdout], [], 0.05)[1]:
                written += os.write(job.stdout, b"x" * 4096)
        # Now somebody reads.
        os.set_blocking(reader, True)
        beside(drain)
        job.exit(0)

    def drain() -> None:
        left = written
        while left:
            left -= len(os.read(reader, 65536))

    thread = beside(fill)
    job.attend(job.outputs(Forward(writer), Collect()))
    thread.join(10)
    assert 0 < written < 1 << 18  # the job's pipe, ours, and one piece between them
    os.close(writer)
    os.close(reader)


def test_a_reader_that_goes_away_closes_the_jobs_stream(job: Job) -> None:
    """The job gets SIGPIPE as it would without us; its other stream goes on."""
    reader, writer = os.pipe()
    os.close(reader)
    err = Collect()
    os.write(job.stdout, b"lost")
    outcome: list[type[Exception]] = []

    def write_until_broken() -> None:
        try:
            while True:
                os.write(job.stdout, b"x")
                time.sleep(0.01)
        except OSError as error:
            outcome.append(type(error))
        os.write(job.stderr, b"seen")
        job.exit(3)

    thread = beside(write_until_broken)
    ending = job.attend(job.outputs(Forward(writer), err))
    thread.join(10)
    assert outcome == [BrokenPipeError]
    assert bytes(err.data) == b"seen"
    assert ending.exited == (3, 0, 0)
    os.close(writer)


def test_a_full_disk_is_an_error_of_ours(job: Job) -> None:
    """It is not the job's fault and not silently dropped."""
    os.write(job.stdout, b"x")
    with open("/dev/full", "wb") as full, pytest.raises(SandboxError, match="No space left on device"):
        job.attend(job.outputs(Forward(full.fileno()), Collect()))


def test_the_budget_is_of_both_streams_together(job: Job) -> None:
    """What is beyond it is read, dropped and counted, so that the job does not stand still."""
    out, err = Collect(), Collect()
    os.write(job.stdout, b"o" * 600)
    os.write(job.stderr, b"e" * 600)
    job.exit(0)
    job.attend(job.outputs(out, err), limit=1000)
    assert len(out.data) + len(err.data) == 1000
    assert (job.budget.left, job.budget.dropped_bytes) == (0, 200)


@pytest.mark.parametrize(("limit", "passed"), [(None, b"abcdef"), (0, b""), (4, b"abcd"), (6, b"abcdef")])
def test_a_budget_takes_what_fits(limit: int | None, passed: bytes) -> None:
    """None is no limit; nothing is passed twice."""
    budget = Budget(limit)
    assert budget.take(b"abc") + budget.take(b"def") == passed
    assert budget.dropped_bytes == 6 - len(passed)


def read_all(job: Job, into: list[bytes]) -> threading.Thread:
    stdin, job.stdin = job.stdin, -1

    def work() -> None:
        data = b""
        while piece := os.read(stdin, 65536):
            data += piece
        os.close(stdin)
        into.append(data)
        job.exit(0)

    return beside(work)


def test_bytes_for_the_input_arrive_whole_and_end(job: Job) -> None:
    """More than any pipe holds, then the end of input."""
    data, got = os.urandom(300_000), list[bytes]()
    thread = read_all(job, got)
    job.attend(job.outputs(Collect(), Collect()), job.source(data=data))
    thread.join(10)
    assert got == [data]


def test_a_descriptor_for_the_input_arrives_whole_and_ends(job: Job) -> None:
    """The same from a pipe that is written piece by piece; `end` comes last."""
    reader, writer = os.pipe()
    pieces, got = [os.urandom(70_000) for _ in range(3)], list[bytes]()

    def feed() -> None:
        for piece in pieces:
            os.write(writer, piece)
        os.close(writer)

    threads = [read_all(job, got), beside(feed)]
    job.attend(job.outputs(Collect(), Collect()), job.source(fd=reader, end=b"\x04"))
    for thread in threads:
        thread.join(10)
    assert got == [b"".join(pieces) + b"\x04"]
    os.close(reader)


def test_a_job_that_does_not_read_its_input(job: Job) -> None:
    """It may close it or leave it: neither blocks us, and neither is an error."""
    os.close(job.stdin)
    job.stdin = -1
    beside(lambda: (time.sleep(0.2), job.exit(5)))
    ending = job.attend(job.outputs(Collect(), Collect()), job.source(data=b"x" * 200_000))
    assert ending.exited == (5, 0, 0)


def test_input_that_is_never_read_does_not_hold_up_the_end(job: Job) -> None:
    """The pipe is full and stays so: the job ends, and so do we."""
    beside(lambda: (time.sleep(0.2), job.exit(6)))
    started = time.monotonic()
    ending = job.attend(job.outputs(Collect(), Collect()), job.source(data=b"x" * 200_000))
    assert ending.exited == (6, 0, 0)
    assert time.monotonic() - started < 3


def test_an_output_that_outlives_the_agent_is_waited_for_a_while_only(
    job: Job, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A descriptor that somebody still holds cannot keep the run from ending."""
    monkeypatch.setattr(streams, "_DRAIN_S", 0.3)
    held = os.dup(job.stdout)
    out = Collect()
    os.write(held, b"last words")
    job.exit(0)
    started = time.monotonic()
    job.attend(job.outputs(out, Collect()))
    assert 0.3 <= time.monotonic() - started < 3
    assert bytes(out.data) == b"last words"
    os.close(held)


def test_a_wake_up_is_heard_while_the_job_runs(job: Job) -> None:
    """Signals of ours come through a descriptor of their own."""
    reader, writer = os.pipe()
    heard = []

    def wake() -> None:
        heard.append(os.read(reader, 10))
        job.exit(0)

    os.write(writer, b"\x02")
    Attendance(
        job,  # type: ignore[arg-type]
        job.outputs(Collect(), Collect()),
        None,
        budget=Budget(None),
        deadline_s=time.monotonic() + 10,
        wake_fd=reader,
        on_wake=wake,
    ).run()
    assert heard == [b"\x02"]
    os.close(reader)
    os.close(writer)


def test_the_agents_own_deadline_is_a_little_later() -> None:
    """The host's clock comes first; 0 is none."""
    assert streams.agent_deadline_ms(None) == 0
    assert streams.agent_deadline_ms(1.5) == 2500
