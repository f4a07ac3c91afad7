"""Sandboxes with gVisor's kernel that live on, are spoken to, stopped, removed, or killed piece by piece."""

import json
import os
import random
import re
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise
from pathlib import Path

import pytest

from commands import remains
from detached import WAIT_S, Cli, agent_of, command_of, layout, processes, until
from ringfence.cgroup.group import leftovers as groups_below
from ringfence.host import places
from ringfence.linux.syscalls import all_names
from ringfence.sandbox import store
from ringfence.sandbox.attach import connect
from terminals import Terminal

pytestmark = pytest.mark.requires("root", "userns", "crun", "runsc", "image:base")

PARTS = ("runsc-sandbox", "runsc-gofer", "door")


def part_of(sandbox: str, part: str) -> int:
    """Return the host's id of a sandbox's sentry, gofer or door."""
    if part == "door":
        return agent_of(sandbox)
    found = [pid for pid in processes(sandbox) if command_of(pid).split(b"\0")[0] == part.encode()]
    (pid,) = found
    return pid


def the_only_one(cli: Cli) -> str:
    (sandbox,) = os.listdir(cli.home / "sandboxes")
    return sandbox


def ended(cli: Cli, name: str = "box") -> dict[str, object]:
    return until(lambda: found if (found := cli.ps()[name])["state"] != "running" else None)


# Detached: run -d, ps, logs


def test_a_detached_sandbox_keeps_its_output_and_status(gvisor: Cli) -> None:
    """After the end, `logs` has both streams apart and unchanged, `ps --all` the status and usage, until `rm`."""
    data = bytes(range(256)) * 9
    script = (
        "import sys; sys.stdout.buffer.write(bytes(range(256)) * 9); sys.stderr.write('oops'); sys.exit(3)"
    )
    sandbox = gvisor.detached("python3", "-c", script)
    followed = gvisor("logs", "--follow", "box")
    assert (followed.stdout, followed.stderr) == (data, b"oops")
    facts = ended(gvisor)
    assert (facts["state"], facts["exit_status"], facts["oom_killed"]) == ("exited", 3, False)
    assert facts["usage"]["memory_peak_bytes"] > 1 << 20  # type: ignore[index]
    assert facts["usage"]["cpu_s"] > 0  # type: ignore[index]
    assert re.search(
        rb"box +exited \(3\) \d+ s ago +base:latest +gvisor +python3 -c", gvisor("ps", "--all").stdout
    )
    assert gvisor("logs", "box").stdout == data
    assert sorted(os.listdir(gvisor.home / "sandboxes" / sandbox)) == ["ended.json", "record.json", "started"]
    assert sandbox not in groups_below(layout())
    assert gvisor("rm", "box").stdout == b"box\n"
    assert gvisor.ps() == {}
    assert not gvisor.log_file(sandbox).exists()


def test_a_detached_sandbox_keeps_no_process_of_ours(gvisor: Cli) -> None:
    """Once `run -d` has returned there are the door and gVisor's processes: no Python, no crun, no launching runsc."""
    sandbox = gvisor.detached("sleep", "50")
    names = {command_of(pid).split(b"\0")[0] for pid in processes(sandbox)}
    # What stands for the job's processes on the host has no command line.
    assert names - {b""} == {b"/.ringfence", b"runsc-sandbox", b"runsc-gofer"}
    marker = f"RINGFENCE_RUN_DIR={gvisor.home}".encode()
    for process in Path("/proc").glob("[0-9]*"):
        try:
            ours = marker in (process / "environ").read_bytes().split(b"\0")
            assert not ours or int(process.name) == os.getpid(), (process / "cmdline").read_bytes()
        except OSError:
            continue


def test_a_detached_job_has_its_time_limit(gvisor: Cli) -> None:
    """The agent keeps the time limit when nobody else is there: status 124, and nothing runs on."""
    gvisor.run("-d", "--name", "box", "--timeout", "0.2", "--", "sleep", "50")
    gvisor("logs", "-f", "box")
    facts = ended(gvisor)
    assert (facts["exit_status"], facts["timed_out"]) == (124, True)
    assert b"exited (124, time limit)" in gvisor("ps", "--all").stdout


def test_time_is_kept_when_nobody_inside_keeps_it(gvisor: Cli) -> None:
    """With the sentry stopped, and no launcher, the door ends the sandbox: 124, and what was said is kept."""
    started = time.monotonic()
    done = gvisor.run("-d", "--name", "box", "--timeout", "3", "--", "sh", "-c", "echo up; exec sleep 50")
    sandbox = done.stdout.decode().strip()
    gvisor.wait_for_log("box", b"up")
    pids = processes(sandbox)
    os.kill(part_of(sandbox, "runsc-sandbox"), signal.SIGSTOP)
    until(lambda: not [pid for pid in pids if command_of(pid)])
    assert 4.5 < time.monotonic() - started < 12
    facts = ended(gvisor)
    assert (facts["state"], facts["exit_status"], facts["timed_out"]) == ("exited", 124, True)
    assert facts["ended"] is not None
    assert b"exited (124, time limit)" in gvisor("ps", "--all").stdout
    logged = gvisor("logs", "box")
    assert logged.stdout == b"up\n"
    assert b"killed (its time limit had passed" in logged.stderr
    assert logged.stderr.count(b"\n") == 1
    assert sandbox not in groups_below(layout())


# A descriptor of its own that sends process 1 a signal for what comes in: fcntl(2), F_SETOWN and F_SETSIG.
SIGNAL_BY_DESCRIPTOR = """
import errno, fcntl, os, signal, socket, sys
ours, theirs = socket.socketpair()
sys.stdout.write(str(fcntl.fcntl(ours, fcntl.F_GETFD)) + '\\n')
fcntl.fcntl(ours, fcntl.F_SETOWN, 1)
try:
    fcntl.fcntl(ours, fcntl.F_SETSIG, signal.SIGSTOP)
    print('set')
except OSError as error:
    print(errno.errorcode[error.errno])
fcntl.fcntl(ours, fcntl.F_SETFL, os.O_ASYNC | os.O_NONBLOCK)
theirs.send(b'x')
signal.signal(signal.SIGTERM, lambda *_: sys.exit(6))
sys.stdout.flush()
while True: signal.pause()
"""


@pytest.mark.parametrize("profile", ["ours", "a user's"])
def test_a_detached_job_cannot_stop_the_agent_by_a_descriptor(
    gvisor: Cli, tmp_path: Path, profile: str
) -> None:
    """The signal of a descriptor cannot be chosen, whatever profile allows fcntl: the agent goes on."""
    options: tuple[str, ...] = ()
    if profile != "ours":
        file = tmp_path / "seccomp.json"
        every = {"names": list(all_names(os.uname().machine)), "action": "SCMP_ACT_ALLOW"}
        file.write_text(json.dumps({"defaultAction": "SCMP_ACT_ERRNO", "syscalls": [every]}))
        options = ("--security-opt", f"seccomp={file}")
    gvisor.detached("python3", "-c", SIGNAL_BY_DESCRIPTOR, options=options)
    assert gvisor.wait_for_log("box", b"\nE") == b"1\nEPERM\n"
    assert gvisor("exec", "box", "--", "echo", "alive").stdout == b"alive\n"
    gvisor("stop", "box")
    assert gvisor.ps()["box"]["exit_status"] == 6


def test_the_log_of_a_detached_job_is_bounded(gvisor: Cli) -> None:
    """More output than limits.output is dropped, counted and said to be; what is kept is the beginning."""
    script = "import sys\nfor i in range(40000): print(i)"
    sandbox = gvisor.detached("python3", "-c", script, options=("--set", "limits.output=64KiB"))
    followed = gvisor("logs", "-f", "box")
    whole = "".join(f"{i}\n" for i in range(40000)).encode()
    assert whole.startswith(followed.stdout)
    assert 55_000 < len(followed.stdout) <= 65536
    assert b"bytes dropped" in followed.stderr
    assert gvisor.log_file(sandbox).stat().st_size <= 65536 + 64
    assert ended(gvisor)["output_truncated"]


def test_logs_of_one_stream_with_times_and_as_json(gvisor: Cli) -> None:
    """--stderr-only leaves out the other, --timestamps stamps each line once, --json keeps every byte."""
    script = r"printf 'one\ntw'; sleep 0.1; printf 'o\n'; sleep 0.1; printf 'err\377\n' >&2; sleep 0.1; printf 'three'"
    gvisor.detached("sh", "-c", script)
    gvisor("logs", "-f", "box")
    only = gvisor("logs", "--stderr-only", "box")
    assert (only.stdout, only.stderr) == (b"", b"err\xff\n")
    assert gvisor("logs", "--stdout-only", "box").stdout == b"one\ntwo\nthree"
    stamp = rb"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z "
    stamped = gvisor("logs", "-t", "box").stdout
    assert re.fullmatch(stamp + rb"one\n" + stamp + rb"two\n" + stamp + rb"three", stamped), stamped
    pieces = [json.loads(line) for line in gvisor("logs", "--json", "box").stdout.splitlines()]
    assert [piece["base64"] for piece in pieces if piece["stream"] == "stderr"] == ["ZXJy/wo="]


def test_a_detached_job_with_a_terminal(gvisor: Cli) -> None:
    """-dt: the job has a terminal, whose output is the log, however soon it comes and however short the job is."""
    for name in "abcd":
        gvisor.detached("sh", "-c", "test -t 0 && test -t 1 && tty; exit 3", name=name, options=("-t",))
        assert gvisor("logs", "-f", name).stdout == b"/dev/pts/0\r\n"
        assert ended(gvisor, name)["exit_status"] == 3


def test_a_name_is_taken_once(gvisor: Cli) -> None:
    """A second sandbox of a name is refused in one line, and free again after `rm`."""
    gvisor.detached("true")
    taken = gvisor.run("-d", "--name", "box", "--", "true", status=125)
    assert b"there is a sandbox called 'box'" in taken.stderr
    assert len(taken.stderr.splitlines()) == 1
    ended(gvisor)
    gvisor("rm", "box")
    gvisor.detached("true")


# exec


def test_exec_is_under_everything_that_the_first_job_is_under(gvisor: Cli) -> None:
    """Ids, capabilities, filter, limits, environment and mounts are the same, as the kernel inside says."""
    script = (
        "grep -E '^(Uid|Gid|Groups|Cap|NoNewPrivs|Seccomp)' /proc/self/status; cat /proc/self/mountinfo;"
        " ulimit -a; umask; env | sort; pwd; cat /proc/version; hostname"
    )
    gvisor.detached("sh", "-c", f"{script}; echo end >&2; sleep 50")
    until(lambda: b"end" in gvisor("logs", "--stderr-only", "box").stderr)
    first = gvisor("logs", "--stdout-only", "box").stdout
    assert b"CapBnd:\t0000000000000000\n" in first
    assert b"Seccomp:\t2\n" in first
    assert gvisor("exec", "box", "--", "sh", "-c", script).stdout == first


def test_exec_adds_to_the_environment_what_is_named_and_nothing_else(gvisor: Cli) -> None:
    """--env NAME=VALUE and --env NAME get in, the caller's other variables do not; --workdir is the directory."""
    gvisor.detached("sleep", "50", options=("-e", "FIRST=1"))
    env = {**os.environ, "NAMED": "yes", "SECRET": "no"}
    words = ["exec", "-e", "NAMED", "-e", "OWN=a=b", "-w", "/tmp", "box", "--", "sh", "-c", "env; pwd"]
    lines = gvisor(*words, env=env).stdout.splitlines()
    assert {b"FIRST=1", b"NAMED=yes", b"OWN=a=b", b"/tmp"} <= set(lines)
    assert not [line for line in lines if b"SECRET" in line or b"RINGFENCE" in line]


def test_bytes_pass_exec_unchanged_both_ways(gvisor: Cli) -> None:
    """3 MB of random bytes go in and come out the same, also through streams opened by name."""
    gvisor.detached("sleep", "50")
    data = random.Random(1).randbytes(3_000_000)
    assert gvisor("exec", "box", "--", "cat", stdin=data).stdout == data
    by_name = gvisor("exec", "box", "--", "sh", "-c", "cat < /dev/stdin > /dev/stderr", stdin=data)
    assert (by_name.stdout, by_name.stderr) == (b"", data)


def test_the_exit_status_of_exec(gvisor: Cli) -> None:
    """The command's own; 126 and 127 when it cannot be executed; 128+N; and one line where it needs one."""
    gvisor.detached("sleep", "50")
    for words, status, says in (
        (("sh", "-c", "exit 7"), 7, b""),
        (("sh", "-c", "kill -TERM $$"), 143, b""),
        (("no-such-program",), 127, b"'no-such-program': No such file"),
        (("/etc",), 126, b"'/etc': Permission denied"),
        (("/etc/passwd",), 126, b"'/etc/passwd': Permission denied"),
    ):
        done = gvisor("exec", "box", "--", *words, status=status)
        assert says in done.stderr
        assert len(done.stderr.splitlines()) == bool(says)


def test_a_reader_of_exec_that_goes_away_ends_its_job(gvisor: Cli) -> None:
    """As of `run`: SIGPIPE, and the sandbox lives on."""
    gvisor.detached("sleep", "50")
    client = gvisor.start(
        "exec", "box", "--", "sh", "-c", "while :; do echo y; done", stdout=-1, stderr=subprocess.PIPE
    )
    assert client.stdout is not None
    client.stdout.read(1)
    client.stdout.close()
    assert client.wait(WAIT_S) == 141
    assert client.stderr is not None
    assert client.stderr.read() == b""
    client.stdout = None
    assert gvisor.ps()["box"]["state"] == "running"


def test_exec_after_the_end_is_125_and_one_line(gvisor: Cli) -> None:
    """Nothing is run in what has ended."""
    gvisor.detached("true")
    ended(gvisor)
    done = gvisor("exec", "box", "--", "true", status=125)
    assert b"is not running" in done.stderr
    assert len(done.stderr.splitlines()) == 1


def test_exec_with_a_terminal(gvisor: Cli) -> None:
    """-it: a terminal of the sandbox's own, our window's size and its changes, raw keys, our terminal put back."""
    gvisor.detached("sleep", "50")
    code = (
        "import os, signal\nsignal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGWINCH])\n"
        "print(os.ttyname(0), *os.get_terminal_size(0))\nprint('ready', flush=True)\n"
        "signal.sigwait([signal.SIGWINCH])\nprint('now', *os.get_terminal_size(0), flush=True)\n"
        "print('got', input())\nexit(6)"
    )
    terminal = Terminal("-it", "box", "--", "python3", "-c", code, verb="exec")
    terminal.wait_for(b"ready")
    assert b"/dev/pts/0 77 33\r\n" in terminal.shown
    terminal.resize(44, 120)
    terminal.wait_for(b"now 120 44\r\n")
    terminal.type(b"x\x7fhello\r")  # the key that deletes works in there: the terminal in between is raw
    terminal.wait_for(b"hello\r\n")
    assert terminal.end() == 6
    assert b"got" in terminal.shown


@pytest.mark.parametrize("tier", ["linux", "gvisor"])
def test_an_exec_as_early_as_can_be(home: Path, tier: str) -> None:
    """An exec that connects before the sandbox has its limits and its proof is answered once the job is let go."""
    cli = Cli(home, isolation=tier)
    before = {entry.id for entry in store.entries()}
    run = cli.start("run", *cli.tier, "--name", "early", "--", "sleep", "2", stderr=subprocess.PIPE)

    def new() -> store.Entry | None:
        found = [entry for entry in store.entries() if entry.id not in before]
        return found[0] if found and os.path.exists(found[0].path("control.sock")) else None

    entry = until(new)
    assert not entry.started()
    connection, _ = connect(entry)
    assert entry.started()
    connection.close()
    assert run.communicate(timeout=WAIT_S)[1] == b""
    assert run.returncode == 0
    assert remains(home) == []


def test_many_execs_at_once(gvisor: Cli) -> None:
    """Eight at the same time each have their own streams and status."""
    gvisor.detached("sleep", "50")

    def one(number: int) -> tuple[int, bytes]:
        data = bytes([number]) * 100_000
        done = gvisor("exec", "box", "--", "sh", "-c", f"cat; exit {number}", stdin=data, status=None)
        return done.returncode, done.stdout

    with ThreadPoolExecutor(8) as pool:
        answers = list(pool.map(one, range(1, 9)))
    assert answers == [(number, bytes([number]) * 100_000) for number in range(1, 9)]


def test_a_killed_exec_takes_its_job_along(gvisor: Cli) -> None:
    """kill -9 of the client ends the job in the sandbox, and nothing else there."""
    gvisor.detached("sleep", "50")
    client = gvisor.start("exec", "box", "--", "sh", "-c", "echo up; sleep 49; :", stdout=subprocess.PIPE)
    assert client.stdout is not None
    assert client.stdout.readline() == b"up\n"
    client.kill()
    client.wait()

    def others() -> bytes:
        return gvisor("exec", "box", "--", "sh", "-c", "cat /proc/[0-9]*/cmdline").stdout

    until(lambda: b"sleep\x0049" not in others())
    assert b"sleep\x0050" in others()


# stop, rm


def test_stop_lets_a_job_end_in_its_own_way(gvisor: Cli) -> None:
    """SIGTERM comes first: a job that handles it has its own status and its last words in the log."""
    script = "trap 'echo bye; exit 5' TERM; echo up; while :; do sleep 0.05; done"
    sandbox = gvisor.detached("sh", "-c", script)
    gvisor.wait_for_log("box", b"up")
    started = time.monotonic()
    assert gvisor("stop", "box").stdout == b"box\n"
    assert time.monotonic() - started < 5
    assert processes(sandbox) == []
    assert gvisor("logs", "box").stdout == b"up\nbye\n"
    assert gvisor.ps()["box"]["exit_status"] == 5
    assert gvisor("stop", "box").stdout == b"box (had ended)\n"


def test_stop_kills_what_ignores_it(gvisor: Cli) -> None:
    """After --time everything is dead, also what left its session; several get that time together."""
    script = "trap '' TERM; setsid sleep 49 & echo up; while :; do sleep 0.05; done"
    boxes = {name: gvisor.detached("sh", "-c", script, name=name) for name in "ab"}
    for name in boxes:
        gvisor.wait_for_log(name, b"up")
    started = time.monotonic()
    assert gvisor("stop", "--time", "0.6", *boxes).stdout == b"a\nb\n"
    assert 0.6 < time.monotonic() - started < 5
    assert [processes(sandbox) for sandbox in boxes.values()] == [[], []]
    assert {facts["exit_status"] for facts in gvisor.ps().values()} == {137}


@pytest.mark.parametrize("part", PARTS)
def test_stop_reaches_a_sandbox_that_does_not_answer(gvisor: Cli, part: str) -> None:
    """With any of its parts stopped, a sandbox is killed through its cgroup."""
    sandbox = gvisor.detached("sleep", "50")
    os.kill(part_of(sandbox, part), signal.SIGSTOP)
    assert gvisor("stop", "--time", "0", "box").stdout == b"box\n"
    assert processes(sandbox) == []
    assert gvisor.ps()["box"]["state"] in ("killed", "exited")


def test_stop_and_rm_of_a_foreground_sandbox(gvisor: Cli) -> None:
    """A sandbox of another terminal is stopped as well; its `run` reports the end, in silence, and cleans up."""
    for words, status in ((("stop", "front"), 143), (("rm", "--force", "front"), 137)):
        front = gvisor.running("--name", "front", "--", "sh", "-c", "echo -n .; exec sleep 50")
        assert gvisor(*words).stdout == b"front\n"
        assert front.communicate(timeout=WAIT_S) == (b"", b"")
        assert front.returncode == status
        assert gvisor.ps() == {}


# Crashes


@pytest.mark.parametrize("part", PARTS)
def test_a_killed_part_ends_a_run(gvisor: Cli, part: str) -> None:
    """kill -9 of the sentry, the gofer or the door: 137, one line that says so, and nothing is left."""
    run = gvisor.running("--", "sh", "-c", "echo -n .; exec sleep 50")
    sandbox = the_only_one(gvisor)
    pids = processes(sandbox)
    os.kill(part_of(sandbox, part), signal.SIGKILL)
    stdout, stderr = run.communicate(timeout=WAIT_S)
    assert (run.returncode, stdout) == (137, b"")
    assert stderr.startswith(b"ringfence: gVisor's kernel was killed")
    assert stderr.count(b"\n") == 1
    assert [pid for pid in pids if command_of(pid)] == []
    assert remains(gvisor.home) == []
    assert sandbox not in groups_below(layout())


@pytest.mark.parametrize("part", PARTS)
def test_a_killed_part_ends_a_detached_sandbox(gvisor: Cli, part: str) -> None:
    """Everything inside dies; `ps` says killed, `logs` that there is no end, and cgroup and ids are given back."""
    sandbox = gvisor.detached("sh", "-c", "echo up; exec sleep 49")
    gvisor.wait_for_log("box", b"up")
    pids = processes(sandbox)
    os.kill(part_of(sandbox, part), signal.SIGKILL)
    until(lambda: not [pid for pid in pids if command_of(pid)])
    until(lambda: not any(entry.alive() for entry in store.entries()))
    assert gvisor.ps()["box"]["state"] == "killed"
    assert sandbox not in groups_below(layout())
    done = gvisor("logs", "box")
    assert done.stdout == b"up\n"
    assert done.stderr == b"ringfence: the log has no end: the sandbox was killed\n"
    assert gvisor("gc").stdout == b"nothing to clean up\n"


def test_a_killed_part_ends_an_exec(gvisor: Cli) -> None:
    """A command whose sandbox dies under it ends with 137 and one line."""
    sandbox = gvisor.detached("sleep", "50")
    words = ("exec", "box", "--", "sh", "-c", "echo up; exec sleep 49")
    client = gvisor.start(*words, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert client.stdout is not None
    assert client.stdout.readline() == b"up\n"
    os.kill(part_of(sandbox, "runsc-sandbox"), signal.SIGKILL)
    said = client.communicate(timeout=WAIT_S)[1]
    assert (client.returncode, said) == (137, b"ringfence: the sandbox ended while the command ran\n")


def test_a_killed_launcher_takes_its_sandbox_along(gvisor: Cli) -> None:
    """kill -9 of a foreground `run`: its sandbox ends by itself, and the next command clears up what is left."""
    run = gvisor.running("--", "sh", "-c", "echo -n .; exec sleep 50")
    sandbox = the_only_one(gvisor)
    run.kill()
    run.communicate()
    until(lambda: processes(sandbox) == [])
    gvisor("gc")
    assert gvisor.remains() == []


@pytest.mark.parametrize("options", [(), ("-d",)], ids=["foreground", "detached"])
def test_nothing_is_left_of_launchers_killed_at_any_moment(gvisor: Cli, options: tuple[str, ...]) -> None:
    """kill -9 of `run` at 24 moments from its start to after the job's: one `gc`, and nothing is left at all."""
    gvisor.run(*options, "--", "true")  # the plan is in the cache from now on
    started = time.monotonic()
    gvisor.run(*options, "--", "true")
    whole_way_s = time.monotonic() - started
    chance = random.Random()
    for turn in range(24):
        job = ("sleep", "50") if turn % 2 else ("true",)  # with the latter, also while it cleans up
        launcher = gvisor.start("run", *gvisor.tier, *options, "--", *job, stdout=subprocess.DEVNULL)
        # Once at least in every part of the way.
        time.sleep((turn + chance.random()) / 24 * whole_way_s)
        launcher.kill()
        launcher.wait()
        gvisor.look()
    assert len(gvisor.seen) >= 6
    if options:
        # Those that were let go live on, as they should.
        gvisor("rm", "--all", "--force", status=None)
    # What runs on for a moment, a runtime or a door, holds the locks.
    until(lambda: not any(entry.alive() for entry in store.entries()))
    gvisor("gc")
    if options:
        gvisor("rm", "--all")
    assert gvisor.remains() == []


# crun as it may be on a busy machine: what it has to say comes when everything inside is long up.
SLOW = """#!/bin/sh
for word; do
  shift
  [ "$before" = --pid-file ] && file=$word && word=$word.late
  before=$word
  set -- "$@" "$word"
done
"$REAL" "$@" || exit
[ -z "$file" ] && exit
sleep 1.5
mv "$file.late" "$file"
"""


def test_an_outer_runtime_may_be_slow_to_say_what_it_started(gvisor: Cli, shared: Path) -> None:
    """The door's process id is waited for, however soon the agent inside speaks."""
    crun = shared / "crun"
    crun.write_text(SLOW.replace("$REAL", places.find("crun")))
    crun.chmod(0o755)
    started = time.monotonic()
    done = gvisor.run("--", "echo", "up", env={**os.environ, "PATH": f"{shared}:{os.environ['PATH']}"})
    assert (done.stdout, done.stderr) == (b"up\n", b"")
    assert time.monotonic() - started > 1.5


# crun that is killed some time after its start, and its caller with it. What it is asked about itself it answers. No
# shell: it would give a program in the background the host's /dev/null, and crun that to the sandbox's user.
KILLED = """#!/usr/bin/python3
import os, sys, time
if sys.argv[1] != "--root":
    os.execv(REAL, [REAL, *sys.argv[1:]])
pid = os.posix_spawn(REAL, [REAL, *sys.argv[1:]], os.environ)
time.sleep(DELAY)
os.kill(pid, 9)
os.kill(os.getpid(), 9)
"""


@pytest.mark.parametrize("delay", ["0", "0.004", "0.01", "0.02", "0.05", "0.2"])
def test_an_outer_runtime_killed_while_it_starts_the_ring(gvisor: Cli, shared: Path, delay: str) -> None:
    """kill -9 of crun: one line and 125, or, once its work is done, no harm; and nothing is left."""
    crun = shared / "crun"
    real = repr(places.find("crun"))
    crun.write_text(
        KILLED.replace("/usr/bin/python3", sys.executable).replace("REAL", real).replace("DELAY", delay)
    )
    crun.chmod(0o755)
    env = {**os.environ, "PATH": f"{shared}:{os.environ['PATH']}"}
    done = gvisor.run("--", "echo", "up", env=env, status=None)
    if done.returncode:
        assert (done.returncode, done.stdout) == (125, b"")
        assert done.stderr.startswith(b"ringfence: ")
        assert done.stderr.count(b"\n") == 1
    else:
        assert (done.stdout, done.stderr) == (b"up\n", b"")
        assert delay != "0"
    assert remains(gvisor.home) == []


def test_eight_at_the_same_time(gvisor: Cli) -> None:
    """Started at once, each has ids of its own and answers; all stop together."""
    starts = [
        gvisor.start("run", *gvisor.tier, "-d", "--", "sleep", "50", stdout=subprocess.PIPE) for _ in range(8)
    ]
    boxes = [start.communicate(timeout=WAIT_S * 2)[0].decode().strip() for start in starts]
    assert [start.returncode for start in starts] == [0] * 8
    ranges = []
    for sandbox in boxes:
        inside, outside, count = map(int, Path(f"/proc/{agent_of(sandbox)}/uid_map").read_text().split())
        assert (inside, count) == (0, 65536)
        ranges.append((outside, outside + count))
    ranges.sort()
    assert all(end <= start for (_, end), (start, _) in pairwise(ranges))
    assert [gvisor("exec", sandbox, "--", "hostname").stdout.decode().strip() for sandbox in boxes] == boxes
    gvisor("stop", "--time", "1", *boxes)
    assert [processes(sandbox) for sandbox in boxes] == [[]] * 8
