"""Streams that are closed, full or flooded, signals at any moment, and a launcher that is killed."""

import os
import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

import leftovers
from commands import RINGFENCE, refused, remains, ringfence, run

pytestmark = pytest.mark.requires("root", "crun", "image:base", "userns")


@pytest.fixture(autouse=True)
def nothing_of_this_test_left(home: Path) -> Iterator[None]:
    """After each test no sandbox, id range or mount of it is there, at once and without a ``gc``."""
    yield
    assert remains(home) == []


def shell(command: str, **more: object) -> subprocess.CompletedProcess[bytes]:
    """Run a line of bash in which $RF is the program; the status of a pipe is that of its first failure."""
    options = {"stdin": subprocess.DEVNULL, "capture_output": True, "timeout": 60, **more}
    script = f"set -o pipefail; {command}"
    return subprocess.run(["bash", "-c", script], env={**os.environ, "RF": RINGFENCE}, **options)  # type: ignore[call-overload,no-any-return]


@pytest.mark.parametrize(
    ("command", "status", "stdout", "stderr"),
    [
        ("$RF run cat <&-", 0, b"", b""),
        ("$RF run echo hi >&-", 0, b"", b""),
        ("$RF run sh -c 'echo out; echo err >&2; exit 3' >&-", 3, b"", b"err\n"),
        ("$RF run sh -c 'echo out; echo err >&2; exit 3' 2>&-", 3, b"out\n", b""),
        ("$RF run sh -c 'echo out; exit 3' <&- >&- 2>&-", 3, b"", b""),
        ("$RF run nosuchcommand 2>&-", 127, b"", b""),
        ("$RF run --policy nosuch true 2>&-", 125, b"", b""),
        ("$RF run --policy nosuch true <&- >&- 2>&-", 125, b"", b""),
    ],
)
def test_standard_streams_that_are_closed(command: str, status: int, stdout: bytes, stderr: bytes) -> None:
    """A closed stream is an empty one; nothing of another stream, and no descriptor of ours, takes its place."""
    done = shell(command)
    assert (done.returncode, done.stdout, done.stderr) == (status, stdout, stderr)


def test_a_reader_that_goes_away_ends_the_job() -> None:
    """As with any program: the job gets SIGPIPE and so the status is 141, long before the time limit."""
    done = shell("$RF run sh -c 'while :; do echo y; done' | head -1")
    assert (done.returncode, done.stdout, done.stderr) == (141, b"y\n", b"")
    done = shell("$RF run sh -c 'trap \"\" PIPE; while echo y 2> /dev/null; do :; done; exit 9' | head -1")
    assert (done.returncode, done.stdout) == (9, b"y\n")
    done = shell("$RF run sh -c 'while :; do echo y >&2; done' 2>&1 > /dev/null | head -1")
    assert (done.returncode, done.stdout) == (141, b"y\n")


@pytest.mark.parametrize(
    ("words", "sleep_s"), [([], 20), (["--json"], 0), (["-d"], 20)], ids=["plain", "json", "detached"]
)
def test_output_that_cannot_be_written(words: list[str], sleep_s: int) -> None:
    """A full disk under our own standard output is an error of ours, and nothing goes on running."""
    with open("/dev/full", "wb") as full:
        done = run(
            *words,
            "--",
            "sh",
            "-c",
            f"echo x; sleep {sleep_s}",
            stdout=full,
            stderr=subprocess.PIPE,
            capture_output=False,
        )
    assert done.returncode == 125
    assert done.stderr.count(b"\n") == 1
    assert b"No space left on device" in done.stderr


def test_a_flood_is_cut_at_its_limit_and_time() -> None:
    """Output beyond limits.output is dropped and counted; two lines say what ended the job and what is missing."""
    done = run("--timeout", "1s", "--set", "limits.output=1000", "--", "yes")
    assert (done.returncode, len(done.stdout)) == (124, 1000)
    time_line, output_line = done.stderr.decode().splitlines()
    assert "time limit of 1 s reached" in time_line
    assert "output limit of 1000 bytes reached" in output_line


def test_a_reader_that_stops_reading_does_not_stop_the_clock() -> None:
    """The time limit holds although nobody takes the output: the pipe is full and stays open."""
    process = subprocess.Popen(
        [RINGFENCE, "run", "--timeout", "1s", "--", "yes"],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    assert process.stdout is not None
    started = time.monotonic()
    process.stdout.read(1)
    time.sleep(2)
    # Read only now: what is left in the pipe, and no more.
    rest, said = process.communicate(timeout=10)
    assert time.monotonic() - started < 8
    assert process.returncode == 124
    assert len(rest) < 8 << 20
    assert b"time limit" in said


@pytest.mark.parametrize("code", ["trap '' TERM INT HUP; sleep 100", "sleep 100", "kill -STOP $$; sleep 100"])
def test_a_job_past_its_time_is_ended_whatever_it_does(code: str) -> None:
    """Ignoring signals, sleeping or stopping itself gains a job nothing."""
    started = time.monotonic()
    refused(
        run("--timeout", "700ms", "--", "sh", "-c", code), 124, "time limit of 0.7 s reached", "--timeout"
    )
    assert time.monotonic() - started < 5


@pytest.mark.parametrize(
    "child", ["setsid sleep 1000 &", "(setsid sleep 1000 > /dev/null 2>&1 &);", "sleep 1000 & sleep 1000 &"]
)
def test_a_job_that_forks_and_exits_takes_its_children_with_it(child: str) -> None:
    """The run ends with the command; what it left in the background is killed, also what holds our streams."""
    started = time.monotonic()
    done = run("--", "sh", "-c", f"{child} exit 4")
    assert (done.returncode, done.stderr) == (4, b"")
    assert time.monotonic() - started < 10


def begin(*words: str) -> "subprocess.Popen[bytes]":
    """Start ``run WORDS`` and wait for the first byte of output: the job runs."""
    process = subprocess.Popen(
        [RINGFENCE, "run", *words], stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    assert process.stdout is not None
    assert process.stdout.read(1) == b"."
    return process


@pytest.mark.parametrize(
    ("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGHUP, 129)]
)
def test_a_signal_is_passed_on_to_the_job(number: int, status: int) -> None:
    """The job dies of it, and so does the run; a job that handles it decides for itself."""
    process = begin("--", "python3", "-c", "import time; print('.', end='', flush=True); time.sleep(20)")
    process.send_signal(number)
    process.communicate(timeout=10)
    assert process.returncode == status
    code = f"trap 'echo caught; exit 7' {signal.Signals(number).name[3:]}; echo -n .; while :; do sleep 0.05; done"
    process = begin("--", "sh", "-c", code)
    process.send_signal(number)
    assert process.communicate(timeout=10)[0] == b"caught\n"
    assert process.returncode == 7


def test_three_signals_end_a_job_that_ignores_them() -> None:
    """Who asks three times means it."""
    process = begin("--", "sh", "-c", "trap '' INT; echo -n .; sleep 60")
    for _ in range(3):
        assert process.poll() is None
        process.send_signal(signal.SIGINT)
        time.sleep(0.2)
    process.communicate(timeout=10)
    assert process.returncode == 137


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_at_any_moment_of_the_start(number: int) -> None:
    """Before, during and after the start: dead of the signal or with its status, in silence, within a second."""
    for step in range(16):
        process = subprocess.Popen(
            [RINGFENCE, "run", "--", "sleep", "20"],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
        )
        time.sleep(0.03 + step * 0.012)  # the interpreter's own start is before this
        process.send_signal(number)
        started = time.monotonic()
        stdout, stderr = process.communicate(timeout=10)
        assert time.monotonic() - started < 5
        assert process.returncode in (-number, 128 + number), (step, stderr)
        assert (stdout, stderr) == (b"", b"")


def test_a_killed_launcher_leaves_nothing_after_the_next_run(home: Path) -> None:
    """kill -9 at any moment: the next run removes directory, id range, cgroup and processes."""
    before = leftovers.found(home)
    for step in range(8):
        process = subprocess.Popen([RINGFENCE, "run", "--", "sleep", "20"], stdin=subprocess.DEVNULL)
        time.sleep(0.03 + step * 0.02)
        process.kill()
        process.wait()
    _next_run_cleans_up(before, home)


def test_a_killed_launcher_with_a_long_command_line_leaves_nothing(home: Path) -> None:
    """What is recorded of a sandbox can always be read back, however long its command is."""
    before = leftovers.found(home)
    process = begin("--", "sh", "-c", "echo -n .; sleep 20", *["x" * 100_000] * 19)
    (record,) = home.glob("sandboxes/*/record.json")
    assert record.stat().st_size < 1 << 18
    process.kill()
    process.communicate()
    _next_run_cleans_up(before, home)


def _next_run_cleans_up(before: dict[str, str], home: Path) -> None:
    deadline = time.monotonic() + 10
    while remains(home) and time.monotonic() < deadline:  # an agent may still be dying
        assert ringfence("run", "true").returncode == 0
    assert leftovers.left(before, home) == []
