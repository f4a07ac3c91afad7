"""A job's streams, terminal and signals when its kernel is gVisor's: the same as on the linux tier, byte for byte."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from hashlib import sha256
from pathlib import Path

import pytest

from boxes import Sandboxes
from commands import RINGFENCE, refused, remains, run
from detached import Cli
from terminals import Terminal

pytestmark = pytest.mark.requires("root", "crun", "runsc", "image:base", "userns", "compiler")

TIER = ("--isolation", "gvisor")
EVERY = bytes(range(256))
MIB = 1 << 20


@pytest.fixture(autouse=True)
def nothing_of_this_test_left(home: Path) -> Iterator[None]:
    """After each test no sandbox, id range or mount of it is there, at once and without a ``gc``."""
    yield
    assert remains(home) == []


def shell(command: str, **more: object) -> subprocess.CompletedProcess[bytes]:
    """Run a line of bash in which $RF is ``ringfence run`` at this tier; a pipe's status is its first failure."""
    options = {"stdin": subprocess.DEVNULL, "capture_output": True, "timeout": 60, **more}
    env = {**os.environ, "RF": f"{RINGFENCE} run {' '.join(TIER)}"}
    return subprocess.run(["bash", "-c", f"set -o pipefail; {command}"], env=env, **options)  # type: ignore[call-overload,no-any-return]


# Bytes


def test_bytes_pass_unchanged(guests: Sandboxes) -> None:
    """Every byte value, in input, arguments and both outputs, which are kept apart."""
    echo = (
        "import os, sys\nd = sys.stdin.buffer.read()\nos.write(1, os.fsencode(sys.argv[1])); os.write(2, d)"
    )
    result = guests.run(["python3", "-c", echo, EVERY[1:]], stdin=EVERY * 100)
    assert (result.stdout, result.stderr) == (EVERY[1:], EVERY * 100)


def test_a_hundred_megabytes_pass_in_bounded_memory() -> None:
    """Through both pipes and the kernel between them, unchanged, while `ringfence` itself stays small."""
    block, count = os.urandom(MIB), 100
    words = ("run", *TIER, "--timeout", "90s", "--set", "limits.output=200MiB", "--", "cat")
    code = (
        "import os, resource, subprocess, sys\n"
        f"status = subprocess.call({[RINGFENCE, *words]!r})\n"
        "peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss\n"
        "print(status, peak, file=sys.stderr)"
    )
    command = [sys.executable, "-c", code]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    # A regular file as input would not be handed to the job as it is: this way both directions are carried.
    with subprocess.Popen(command, **pipes) as process:  # type: ignore[call-overload]
        feeder = subprocess.Popen(
            [
                sys.executable,
                "-c",
                f"import sys\nb = sys.stdin.buffer.read()\nfor _ in range({count}): sys.stdout.buffer.write(b)",
            ],
            stdin=subprocess.PIPE,
            stdout=process.stdin,
        )
        process.stdin.close()
        feeder.stdin.write(block)
        feeder.stdin.close()
        digest, size = sha256(), 0
        while data := process.stdout.read(MIB):
            digest.update(data)
            size += len(data)
        status, peak_kib = process.stderr.read().split()
        feeder.wait()
    assert (int(status), size) == (0, count * MIB)
    assert digest.digest() == sha256(block * count).digest()
    assert int(peak_kib) < 64 << 10


def test_standard_streams_can_be_opened_by_name(guests: Sandboxes) -> None:
    """/dev/stdin, /dev/stdout and /dev/stderr work, as scripts expect."""
    script = "cat < /dev/stdin; echo o > /dev/stdout; echo e > /dev/stderr"
    result = guests.run(["sh", "-c", script], stdin=b"i\n")
    assert (result.stdout, result.stderr, result.exit_status) == (b"i\no\n", b"e\n", 0)


@pytest.mark.parametrize("tier", ["linux", "gvisor"])
def test_a_program_may_come_through_the_callers_pipe(tier: str) -> None:
    """ "... | ringfence run -- python3 /dev/stdin" works; the job may read that pipe by name, not write to it."""
    done = run("-i", tier, "--", "python3", "/dev/stdin", input=b"print(6 * 7)", stdin=None)
    assert (done.returncode, done.stdout, done.stderr) == (0, b"42\n", b"")
    done = run("-i", tier, "--", "sh", "-c", "echo x > /dev/stdin", input=b"", stdin=None)
    assert done.returncode == 2
    assert b"Permission denied" in done.stderr


def test_a_pipe_with_a_name_keeps_its_mode(shared: Path) -> None:
    """A FIFO of the caller's is read, and nothing is changed about it."""
    fifo = shared / "fifo"
    os.mkfifo(fifo, 0o600)
    with subprocess.Popen(["sh", "-c", f"echo hi > {fifo}"]):
        done = shell(f"$RF cat < {fifo}")
    assert (done.returncode, done.stdout) == (0, b"hi\n")
    assert fifo.stat().st_mode & 0o777 == 0o600


@pytest.mark.parametrize(
    ("command", "status", "stdout", "stderr"),
    [
        ("$RF cat <&-", 0, b"", b""),
        ("$RF sh -c 'echo out; echo err >&2; exit 3' >&-", 3, b"", b"err\n"),
        ("$RF sh -c 'echo out; echo err >&2; exit 3' 2>&-", 3, b"out\n", b""),
        ("$RF sh -c 'echo out; exit 3' <&- >&- 2>&-", 3, b"", b""),
        ("$RF nosuchcommand 2>&-", 127, b"", b""),
    ],
)
def test_standard_streams_that_are_closed(command: str, status: int, stdout: bytes, stderr: bytes) -> None:
    """A closed stream is an empty one; nothing of another stream, and no descriptor of ours, takes its place."""
    done = shell(command)
    assert (done.returncode, done.stdout, done.stderr) == (status, stdout, stderr)


def test_a_reader_that_goes_away_ends_the_job() -> None:
    """As with any program: the job gets SIGPIPE and so the status is 141, long before the time limit."""
    done = shell("$RF sh -c 'while :; do echo y; done' | head -1")
    assert (done.returncode, done.stdout, done.stderr) == (141, b"y\n", b"")
    done = shell("$RF sh -c 'trap \"\" PIPE; while echo y 2> /dev/null; do :; done; exit 9' | head -1")
    assert (done.returncode, done.stdout) == (9, b"y\n")
    done = shell("$RF sh -c 'while :; do echo y >&2; done' 2>&1 > /dev/null | head -1")
    assert (done.returncode, done.stdout) == (141, b"y\n")


def test_a_job_that_writes_no_more_does_not_miss_its_reader() -> None:
    """The signal comes with a write into the broken pipe, as on Linux, and not because the reader has gone."""
    done = shell("$RF sh -c 'echo one; sleep 0.3; echo two; sleep 0.3; exit 4' | head -1")
    assert (done.returncode, done.stdout, done.stderr) == (4, b"one\n", b"")


def test_a_flood_is_cut_at_its_limit_and_time() -> None:
    """Output beyond limits.output is dropped and counted; two lines say what ended the job and what is missing."""
    done = run(*TIER, "--timeout", "1s", "--set", "limits.output=1000", "--", "yes")
    assert (done.returncode, len(done.stdout)) == (124, 1000)
    time_line, output_line = done.stderr.decode().splitlines()
    assert "time limit of 1 s reached" in time_line
    assert "output limit of 1000 bytes reached" in output_line


def test_output_that_cannot_be_written() -> None:
    """A full disk under our own standard output is an error of ours, and nothing goes on running."""
    with open("/dev/full", "wb") as full:
        done = run(*TIER, "--", "sh", "-c", "echo x; sleep 20", stdout=full, stderr=-1, capture_output=False)
    assert done.returncode == 125
    assert done.stderr.count(b"\n") == 1
    assert b"No space left on device" in done.stderr


def test_children_that_hold_the_streams_do_not_hold_the_run() -> None:
    """The run ends with its command; what that left in the background is killed."""
    started = time.monotonic()
    done = run(*TIER, "--", "sh", "-c", "setsid sleep 1000 & sleep 1000 & exit 4")
    assert (done.returncode, done.stderr) == (4, b"")
    assert time.monotonic() - started < 10


@pytest.mark.parametrize("script", ["trap '' TERM INT HUP; sleep 100", "sleep 100", "kill -STOP $$; sleep 9"])
def test_a_job_past_its_time_is_ended_whatever_it_does(script: str) -> None:
    """Ignoring signals, sleeping or stopping itself gains a job nothing; one line says why it ended."""
    started = time.monotonic()
    refused(run(*TIER, "--timeout", "700ms", "--", "sh", "-c", script), 124, "time limit of 0.7 s reached")
    assert time.monotonic() - started < 5


# Signals


@pytest.mark.parametrize(
    ("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGHUP, 129)]
)
def test_a_signal_is_passed_on_to_the_job(gvisor: Cli, number: int, status: int) -> None:
    """The job dies of it, and so does the run; a job that handles it decides for itself."""
    process = gvisor.running("--", "python3", "-c", "print(end='.', flush=True)\nimport time; time.sleep(20)")
    process.send_signal(number)
    process.communicate(timeout=10)
    assert process.returncode == status
    name = signal.Signals(number).name[3:]
    process = gvisor.running(
        "--", "sh", "-c", f"trap 'echo caught; exit 7' {name}; echo -n .; while :; do sleep 0.05; done"
    )
    process.send_signal(number)
    assert process.communicate(timeout=10)[0] == b"caught\n"
    assert process.returncode == 7


def test_three_signals_end_a_job_that_ignores_them(gvisor: Cli) -> None:
    """Who asks three times means it, and nothing is said of a crash."""
    process = gvisor.running("--", "sh", "-c", "trap '' INT; echo -n .; sleep 60")
    for _ in range(3):
        assert process.poll() is None
        process.send_signal(signal.SIGINT)
        time.sleep(0.2)
    assert process.communicate(timeout=10) == (b"", b"")
    assert process.returncode == 137


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_at_any_moment_of_the_start(number: int) -> None:
    """Before, during and after the start: dead of the signal or with its status, in silence."""
    for step in range(12):
        process = subprocess.Popen(
            [RINGFENCE, "run", *TIER, "--", "sleep", "20"],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
        )
        time.sleep(0.12 + step * 0.035)  # the interpreter's own start is before this
        process.send_signal(number)
        started = time.monotonic()
        stdout, stderr = process.communicate(timeout=10)
        assert time.monotonic() - started < 5
        assert process.returncode in (-number, 128 + number), (step, stderr)
        assert (stdout, stderr) == (b"", b"")


# The command line


def test_json_has_both_streams_the_usage_and_the_verdict() -> None:
    """`--json` is one object; what is not text is base64."""
    import json

    done = run(*TIER, "--json", "--", "sh", "-c", r"echo out; printf '\377' >&2; exit 3")
    assert (done.returncode, done.stderr) == (3, b"")
    shown = json.loads(done.stdout)
    assert (shown["exit_status"], shown["stdout"], shown["stderr_base64"]) == (3, "out\n", "/w==")
    assert shown["proof"]["holds"] is True
    assert shown["usage"]["cpu_s"] > 0


def test_a_terminal_is_not_for_programs() -> None:
    """--json has streams of its own, and a terminal has one for both."""
    refused(run(*TIER, "--json", "-it", "--", "true"), 2, "--json goes with neither --tty nor --detach")


def test_usage_in_words() -> None:
    """`--usage` says on stderr what the whole sandbox used, gVisor's kernel included."""
    done = run(*TIER, "--usage", "--", "true")
    assert done.returncode == 0
    assert done.stderr.startswith(b"ringfence: used 0.")
    assert b" s of CPU, at most " in done.stderr
    assert done.stderr.count(b"\n") == 1


# Terminals: the pty is the sandbox's own, and its bytes are carried


def terminal(*words: str, **more: int) -> Terminal:
    return Terminal(*TIER, *words, **more)


def test_the_job_has_a_terminal_of_the_same_size() -> None:
    """All three streams, 33 rows and 77 columns; /dev/pts is the sandbox's own, and the job its session's leader."""
    code = (
        "import os; print([os.isatty(fd) for fd in (0, 1, 2)], os.get_terminal_size(), os.ttyname(0),"
        " os.tcgetpgrp(0) == os.getpgrp() == os.getsid(0) == os.getpid())"
    )
    shown = terminal("-it", "--", "python3", "-c", code)
    assert shown.end() == 0
    expected = b"[True, True, True] os.terminal_size(columns=77, lines=33) /dev/pts/0 True"
    assert expected in shown.shown


def test_a_new_size_is_passed_on() -> None:
    """The kernel sends ringfence SIGWINCH; the job gets its own, with the size that the outer terminal has by then."""
    code = (
        "import os, signal, time\n"
        "def show(*_): print('now', *os.get_terminal_size(), flush=True)\n"
        "signal.signal(signal.SIGWINCH, show)\nprint('ready', flush=True)\nwhile True: time.sleep(0.05)"
    )
    shown = terminal("-it", "--", "python3", "-c", code)
    shown.wait_for(b"ready")
    shown.resize(12, 140)
    shown.wait_for(b"now 140 12")
    shown.type(b"\x03")
    assert shown.end() == 130


RAW = (
    "import os, sys, tty\ntty.setraw(0)\nprint('ready', end='', flush=True)\ndata = b''\n"
    "while len(data) < 5: data += os.read(0, 10)\nprint(repr(data), end='', flush=True)"
)


def typed(keys: tuple[bytes, ...]) -> tuple[int, bytes]:
    """Return the status and the words of a job that reads five keys from a raw terminal."""
    shown = terminal("-it", "--timeout", "4s", "--", "python3", "-c", RAW)
    shown.wait_for(b"ready")
    for key in keys:
        shown.type(key)
    return shown.end(), shown.shown


def test_keys_arrive_one_by_one_and_unchanged() -> None:
    """The outer terminal is raw meanwhile: no echo of its own, no line to be finished, no key kept."""
    assert typed((b"a", b"\x04", b"\x7f", b"\x11", b"\r")) == (0, rb"readyb'a\x04\x7f\x11\r'")


def test_keys_are_no_signals_in_a_raw_terminal() -> None:
    """An editor gets Ctrl-C, Ctrl-Z and Ctrl-\\ as keys."""
    assert typed((b"a", b"\x1a", b"\x1c", b"\x03", b"\r")) == (0, rb"readyb'a\x1a\x1c\x03\r'")


def test_a_shell_with_job_control() -> None:
    """A session as people have one: a prompt, Ctrl-C, Ctrl-Z, bg and fg, Ctrl-D, and the status of the last command."""
    shown = terminal("-it", "-e", "PS1=box> ", "--", "bash", "--norc", "-i")
    shown.wait_for(b"box> ")
    shown.type(b"echo $((6*7)); tty\n")
    shown.wait_for(b"42\r\n/dev/pts/0\r\n")
    shown.type(b"echo here; sleep 100\n")
    shown.wait_for(b"\r\nhere\r\n")
    time.sleep(0.3)
    shown.type(b"\x03")
    shown.wait_for(b"\x03\r\n")  # gVisor's terminal echoes the key and not "^C"
    shown.type(b"echo status $?\n")
    shown.wait_for(b"status 130\r\n")
    shown.type(b"echo there; sleep 100\n")
    shown.wait_for(b"\r\nthere\r\n")
    time.sleep(0.3)
    shown.type(b"\x1a")
    shown.wait_for(b"Stopped")
    shown.type(b"bg; kill %1; wait %1; echo waited $?; jobs; echo over\n")
    shown.wait_for(b"waited 143\r\n")
    shown.wait_for(b"\r\nover\r\n")
    shown.type(b"(exit 9)\n\x04")
    assert shown.end() == 9


@pytest.mark.parametrize("ending", ["exit", "kill", "time", "refusal"])
def test_the_terminal_is_put_back_however_it_ends(ending: str) -> None:
    """Also when the job left it raw, the time ran out, or ringfence was told to end."""
    if ending == "refusal":
        assert terminal("-it", "--memory", "4k", "--", "true").end() == 125
        return
    words = ["--timeout", "1s"] if ending == "time" else []
    command = "stty raw -echo; echo ready; " + {"exit": "exit 3"}.get(ending, "sleep 60")
    shown = terminal("-it", *words, "--", "sh", "-c", command)
    shown.wait_for(b"ready")
    if ending == "kill":
        shown.process.terminate()
    assert shown.end() == {"exit": 3, "kill": 143, "time": 124}[ending]


def test_a_pipe_into_a_terminal() -> None:
    """Input that is a pipe with -it: its lines are typed, and its end is Ctrl-D."""
    reader, writer = os.pipe()
    shown = terminal("-it", "--", "sh", "-c", "read line; echo got $line; cat; exit 8", stdin=reader)
    os.close(reader)
    os.write(writer, b"first\nrest\nunfinished")
    os.close(writer)
    assert shown.end() == 8
    assert b"got first" in shown.shown
    assert shown.shown.endswith(b"unfinished")


def test_a_terminal_for_output_alone() -> None:
    """-t without -i and without a terminal here: the usual size, lines as a terminal ends them, all of the output."""
    code = "import os\nprint(os.isatty(1), *os.get_terminal_size())\nfor i in range(20000): print(i)"
    done = run(*TIER, "-t", "--", "python3", "-c", code)
    numbers = b"".join(b"%d\r\n" % i for i in range(20000))
    assert (done.returncode, done.stdout) == (0, b"True 80 24\r\n" + numbers)
