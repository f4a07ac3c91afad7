"""A job's streams, terminal and signals when it runs in a machine: the same as on the linux tier, byte for byte.

Most is asked of one machine that is booted once, through ``exec``, whose streams take the same way as those of ``run``.
"""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from hashlib import sha256
from pathlib import Path

import pytest

from boxes import Sandboxes
from commands import RINGFENCE, run
from detached import Cli, command_of, processes, until
from terminals import Terminal

pytestmark = pytest.mark.requires(
    "root", "crun", "qemu", "kernel", "mkfs.erofs", "image:base", "userns", "compiler"
)

TIER = ("--isolation", "microvm", "--allow-emulation")
EVERY = bytes(range(256))
MIB = 1 << 20


def shell(command: str, **more: object) -> subprocess.CompletedProcess[bytes]:
    """Run a line of bash in which $RF is ``ringfence exec box --``; a pipe's status is its first failure."""
    options = {"stdin": subprocess.DEVNULL, "capture_output": True, "timeout": 60, **more}
    env = {**os.environ, "RF": f"{RINGFENCE} exec box --", "RUN": f"{RINGFENCE} run {' '.join(TIER)}"}
    return subprocess.run(["bash", "-c", f"set -o pipefail; {command}"], env=env, **options)  # type: ignore[call-overload,no-any-return]


# Bytes


def test_bytes_pass_unchanged(machines: Sandboxes) -> None:
    """Every byte value, in input, arguments and both outputs, which are kept apart."""
    echo = (
        "import os, sys\nd = sys.stdin.buffer.read()\nos.write(1, os.fsencode(sys.argv[1])); os.write(2, d)"
    )
    result = machines.run(["python3", "-c", echo, EVERY[1:]], stdin=EVERY * 100, timeout=60)
    assert (result.stdout, result.stderr) == (EVERY[1:], EVERY * 100)


class Watch:
    """The most memory that any process of a kind had meanwhile, in KiB."""

    def __init__(self, sandbox: str) -> None:
        self.peak = {"bridge": 0, "qemu": 0}
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._look, args=(sandbox,))
        self._thread.start()

    def _look(self, sandbox: str) -> None:
        while not self._over.wait(0.1):
            for pid in processes(sandbox):
                kind = "qemu" if b"qemu" in command_of(pid).split(b"\0")[0] else "bridge"
                try:
                    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
                except OSError:
                    continue
                size = next((int(line.split()[1]) for line in lines if line.startswith("VmRSS")), 0)
                self.peak[kind] = max(self.peak[kind], size)

    def stop(self) -> dict[str, int]:
        self._over.set()
        self._thread.join()
        return self.peak


def test_a_hundred_megabytes_pass_in_bounded_memory(booted: Cli) -> None:
    """In and out again, unchanged, while `ringfence`, the bridge and the VMM stay as small as they were."""
    block, count = os.urandom(MIB), 100
    (sandbox,) = os.listdir(booted.home / "sandboxes")
    before = Watch(sandbox)
    time.sleep(0.5)
    sizes = before.stop()
    code = (
        "import os, resource, subprocess, sys\n"
        f"status = subprocess.call({[RINGFENCE, 'exec', 'box', '--', 'cat']!r})\n"
        "peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss\n"
        "print(status, peak, file=sys.stderr)"
    )
    watch = Watch(sandbox)
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    with subprocess.Popen([sys.executable, "-c", code], **pipes) as process:  # type: ignore[call-overload]

        def feed() -> None:
            for _ in range(count):
                process.stdin.write(block)
            process.stdin.close()

        feeder = threading.Thread(target=feed)
        feeder.start()
        digest, size = sha256(), 0
        while data := process.stdout.read(MIB):
            digest.update(data)
            size += len(data)
        status, peak_kib = process.stderr.read().split()
        feeder.join()
    peak = watch.stop()
    assert (int(status), size) == (0, count * MIB)
    assert digest.digest() == sha256(block * count).digest()
    assert int(peak_kib) < 64 << 10
    assert 0 < peak["bridge"] < 16 << 10
    assert peak["qemu"] < sizes["qemu"] + (80 << 10)  # the guest's own caches, and translated code


def test_a_slow_reader_holds_the_job_and_nothing_piles_up(booted: Cli) -> None:
    """Back-pressure reaches the job: while nobody reads, it is a few hundred kilobytes ahead and no more."""
    script = "i=0; while :; do head -c 65536 /dev/zero; i=$((i+1)); echo $i > /tmp/written; done"
    client = booted.start("exec", "box", "--", "sh", "-c", script, stdout=subprocess.PIPE)
    assert client.stdout is not None
    client.stdout.read(1)

    def written() -> int:
        return int(booted("exec", "box", "--", "sh", "-c", "cat /tmp/written || echo 0").stdout or 0)

    last, still = -1, 0
    deadline = time.monotonic() + 40
    while still < 2:
        assert time.monotonic() < deadline
        now = written()
        still = still + 1 if now == last else 0
        last = now
    assert last * 65536 < 2 * MIB
    client.kill()
    client.wait()
    client.stdout.close()


def test_standard_streams_can_be_opened_by_name(booted: Cli) -> None:
    """/dev/stdin, /dev/stdout and /dev/stderr work, as scripts expect."""
    script = "cat < /dev/stdin; echo o > /dev/stdout; echo e > /dev/stderr"
    done = booted("exec", "box", "--", "sh", "-c", script, stdin=b"i\n")
    assert (done.stdout, done.stderr) == (b"i\no\n", b"e\n")


@pytest.mark.parametrize(
    ("command", "status", "stdout", "stderr"),
    [
        ("$RF cat <&-", 0, b"", b""),
        ("$RF sh -c 'echo out; echo err >&2; exit 3' >&-", 3, b"", b"err\n"),
        ("$RF sh -c 'echo out; echo err >&2; exit 3' 2>&-", 3, b"out\n", b""),
        ("$RF sh -c 'echo out; exit 3' <&- >&- 2>&-", 3, b"", b""),
        ("$RF nosuchcommand 2>&-", 127, b"", b""),
        ("$RUN sh -c 'echo out; exit 3' <&- 2>&-", 3, b"out\n", b""),
    ],
)
def test_standard_streams_that_are_closed(
    booted: Cli, command: str, status: int, stdout: bytes, stderr: bytes
) -> None:
    """A closed stream is an empty one; nothing of another stream, and no descriptor of ours, takes its place."""
    del booted
    done = shell(command)
    assert (done.returncode, done.stdout, done.stderr) == (status, stdout, stderr)


def test_a_reader_that_goes_away_ends_the_job(booted: Cli) -> None:
    """As with any program: the job gets SIGPIPE and so the status is 141; one that ignores it gets EPIPE."""
    del booted
    done = shell("$RF sh -c 'while :; do echo y; done' | head -1")
    assert (done.returncode, done.stdout, done.stderr) == (141, b"y\n", b"")
    done = shell("$RF sh -c 'trap \"\" PIPE; while echo y 2> /dev/null; do :; done; exit 9' | head -1")
    assert (done.returncode, done.stdout) == (9, b"y\n")
    done = shell("$RUN sh -c 'while :; do echo y; done' | head -1")
    assert (done.returncode, done.stdout, done.stderr) == (141, b"y\n", b"")


def test_a_flood_is_cut_at_its_limit_and_time() -> None:
    """Output beyond limits.output is dropped and counted; two lines say what ended the job and what is missing."""
    done = run(*TIER, "--timeout", "2s", "--set", "limits.output=1000", "--", "yes")
    assert (done.returncode, len(done.stdout)) == (124, 1000)
    time_line, output_line = done.stderr.decode().splitlines()
    assert "time limit of 2 s reached" in time_line
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
    done = run(*TIER, "--timeout", "90", "--", "sh", "-c", "setsid sleep 1000 & sleep 1000 & exit 4")
    assert (done.returncode, done.stderr) == (4, b"")
    assert time.monotonic() - started < 40


@pytest.mark.parametrize("script", ["trap '' TERM INT HUP; sleep 100", "kill -STOP $$; sleep 9"])
def test_a_job_past_its_time_is_ended_whatever_it_does(script: str) -> None:
    """Ignoring signals or stopping itself gains a job nothing; one line says why it ended."""
    done = run(*TIER, "--timeout", "700ms", "--json", "--", "sh", "-c", script)
    shown = json.loads(done.stdout)
    assert (done.returncode, shown["timed_out"], shown["notes"]) == (124, True, [])
    assert shown["usage"]["wall_s"] < 6
    assert done.stderr == b"ringfence: time limit of 0.7 s reached (limits.time, --timeout)\n"


# Signals


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_is_passed_on_to_the_job(home: Path, number: int) -> None:
    """A job that handles it decides for itself."""
    name = signal.Signals(number).name[3:]
    cli = Cli(home, isolation="microvm")
    script = f"trap 'echo caught; exit 7' {name}; echo -n .; while :; do sleep 0.05; done"
    process = cli.running("--", "sh", "-c", script)
    process.send_signal(number)
    assert process.communicate(timeout=20) == (b"caught\n", b"")
    assert process.returncode == 7


def test_three_signals_end_a_job_that_ignores_them(home: Path) -> None:
    """Who asks three times means it, and nothing is said of a crash."""
    process = Cli(home, isolation="microvm").running("--", "sh", "-c", "trap '' INT; echo -n .; sleep 60")
    for _ in range(3):
        assert process.poll() is None
        process.send_signal(signal.SIGINT)
        time.sleep(0.2)
    assert process.communicate(timeout=20) == (b"", b"")
    assert process.returncode == 137


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_at_any_moment_of_the_start(home: Path, number: int) -> None:
    """Before and during a boot: dead of the signal, soon and in silence; no machine stays."""
    before = set(os.listdir(home / "sandboxes")) if (home / "sandboxes").exists() else set()
    for step in range(8):
        process = subprocess.Popen(
            [RINGFENCE, "run", *TIER, "--", "sleep", "20"],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
        )
        time.sleep(0.15 + step * 0.2)
        process.send_signal(number)
        started = time.monotonic()
        stdout, stderr = process.communicate(timeout=20)
        assert time.monotonic() - started < 8
        assert process.returncode in (-number, 128 + number), (step, stderr)
        assert (stdout, stderr) == (b"", b"")
    until(lambda: set(os.listdir(home / "sandboxes")) <= before)


# The command line


def test_json_has_both_streams_the_usage_and_the_verdict() -> None:
    """`--json` is one object; what is not text is base64."""
    done = run(*TIER, "--json", "--", "sh", "-c", r"echo out; printf '\377' >&2; exit 3")
    assert (done.returncode, done.stderr) == (3, b"")
    shown = json.loads(done.stdout)
    assert (shown["exit_status"], shown["stdout"], shown["stderr_base64"]) == (3, "out\n", "/w==")
    assert shown["proof"]["holds"] is True
    assert shown["usage"]["cpu_s"] > 0
    assert shown["notes"] == []


# Terminals: the pty is the guest's own, and its bytes are carried


def terminal(*words: str) -> Terminal:
    return Terminal("-it", "box", "--", *words, verb="exec")


def test_the_job_has_a_terminal_whose_size_follows(booted: Cli) -> None:
    """All three streams, 33 rows and 77 columns; /dev/pts is the guest's own; a new size comes with SIGWINCH."""
    del booted
    code = (
        "import os, signal\nsignal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGWINCH])\n"
        "print([os.isatty(fd) for fd in (0, 1, 2)], *os.get_terminal_size(), os.ttyname(0),"
        " os.tcgetpgrp(0) == os.getpgrp() == os.getsid(0) == os.getpid(), flush=True)\n"
        "signal.sigwait([signal.SIGWINCH])\nprint('now', *os.get_terminal_size(0), flush=True)\nexit(6)"
    )
    shown = terminal("python3", "-c", code)
    shown.wait_for(b"[True, True, True] 77 33 /dev/pts/0 True\r\n", 30)
    shown.resize(12, 140)
    shown.wait_for(b"now 140 12", 20)
    assert shown.end(30) == 6


RAW = (
    "import os, sys, tty\ntty.setraw(0)\nprint('ready', end='', flush=True)\ndata = b''\n"
    "while len(data) < 7: data += os.read(0, 10)\nprint(repr(data), end='', flush=True)"
)


def test_keys_arrive_one_by_one_and_unchanged(booted: Cli) -> None:
    """The outer terminal is raw meanwhile: no echo of its own, no key kept, none that means a signal."""
    del booted
    shown = terminal("python3", "-c", RAW)
    shown.wait_for(b"ready", 30)
    for key in (b"a", b"\x04", b"\x7f", b"\x1a", b"\x1c", b"\x03", b"\r"):
        shown.type(key)
    assert shown.end(30) == 0
    assert shown.shown == rb"readyb'a\x04\x7f\x1a\x1c\x03\r'"


def test_a_shell_with_job_control(booted: Cli) -> None:
    """A session as people have one: a prompt, Ctrl-C, Ctrl-Z, bg and fg, Ctrl-D, and the status of the last command."""
    del booted
    shown = Terminal("-it", "-e", "PS1=box> ", "box", "--", "bash", "--norc", "-i", verb="exec")
    shown.wait_for(b"box> ", 30)
    shown.type(b"echo $((6*7)); tty\n")
    shown.wait_for(b"42\r\n/dev/pts/0\r\n", 20)
    shown.type(b"echo here; sleep 100\n")
    shown.wait_for(b"\r\nhere\r\n", 20)
    time.sleep(0.5)
    shown.type(b"\x03")
    shown.wait_for(b"^C", 20)
    shown.type(b"echo status $?\n")
    shown.wait_for(b"status 130\r\n", 20)
    shown.type(b"echo there; sleep 100\n")
    shown.wait_for(b"\r\nthere\r\n", 20)
    time.sleep(0.5)
    shown.type(b"\x1a")
    shown.wait_for(b"Stopped", 20)
    shown.type(b"bg; kill %1; wait %1; echo waited $?; jobs; echo over\n")
    shown.wait_for(b"waited 143\r\n", 20)
    shown.wait_for(b"\r\nover\r\n", 20)
    # Each key when the shell waits for it: what comes while it is not, a terminal reads by other rules.
    shown.wait_for(b"over\r\nbox> ", 20)
    shown.type(b"(exit 9)\n")
    shown.wait_for(b"(exit 9)\r\nbox> ", 20)
    shown.type(b"\x04")
    assert shown.end(20) == 9


@pytest.mark.parametrize("ending", ["exit", "kill", "time"])
def test_the_terminal_is_put_back_however_it_ends(ending: str) -> None:
    """Of `run -it` too: when the job left it raw, the time ran out, or ringfence was told to end."""
    words = ["--timeout", "3s"] if ending == "time" else ["--timeout", "60s"]
    command = "stty raw -echo; echo ready; " + {"exit": "exit 3"}.get(ending, "sleep 60")
    shown = Terminal(*TIER, "-it", *words, "--", "sh", "-c", command)
    shown.wait_for(b"ready", 40)
    if ending == "kill":
        shown.process.terminate()
    assert shown.end(20) == {"exit": 3, "kill": 143, "time": 124}[ending]


def test_a_terminal_for_output_alone() -> None:
    """-t without -i and without a terminal here: the usual size, lines as a terminal ends them, all of the output."""
    script = "stty size; seq 20000"
    done = run(*TIER, "-t", "--timeout", "60", "--", "sh", "-c", script)
    numbers = b"".join(b"%d\r\n" % i for i in range(1, 20001))
    assert (done.returncode, done.stdout) == (0, b"24 80\r\n" + numbers)
