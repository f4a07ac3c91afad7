"""Machines that live on, are spoken to, stopped, removed, or killed piece by piece."""

import json
import os
import random
import re
import signal
import subprocess
import time
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise
from pathlib import Path

import pytest

from commands import remains
from detached import WAIT_S, Cli, agent_of, command_of, layout, processes, until
from ringfence.cgroup.group import leftovers as groups_below
from ringfence.sandbox import store
from terminals import Terminal

pytestmark = pytest.mark.requires("root", "userns", "crun", "qemu", "kernel", "mkfs.erofs", "image:base")

PARTS = ("qemu", "bridge")


def part_of(sandbox: str, part: str) -> int:
    """Return the host's id of a sandbox's VMM or bridge."""
    if part == "bridge":
        return agent_of(sandbox)
    (pid,) = [pid for pid in processes(sandbox) if b"qemu" in command_of(pid).split(b"\0")[0]]
    return pid


def the_only_one(cli: Cli) -> str:
    (sandbox,) = os.listdir(cli.home / "sandboxes")
    return sandbox


def ended(cli: Cli, name: str = "box") -> dict[str, object]:
    return until(lambda: found if (found := cli.ps()[name])["state"] != "running" else None, 40)


# Detached: run -d, ps, logs


def test_a_detached_sandbox_keeps_its_output_and_status(microvm: Cli) -> None:
    """After the end, `logs` has both streams apart and unchanged, `ps --all` the status and usage, until `rm`."""
    data = bytes(range(256)) * 9
    script = (
        "import sys; sys.stdout.buffer.write(bytes(range(256)) * 9); sys.stderr.write('oops'); sys.exit(3)"
    )
    sandbox = microvm.detached("python3", "-c", script)
    taken = microvm.run("-d", "--name", "box", "--", "true", status=125)
    assert b"there is a sandbox called 'box'" in taken.stderr
    followed = microvm("logs", "--follow", "box")
    assert (followed.stdout, followed.stderr) == (data, b"oops")
    facts = ended(microvm)
    assert (facts["state"], facts["exit_status"], facts["oom_killed"]) == ("exited", 3, False)
    assert facts["usage"]["memory_peak_bytes"] > 1 << 20  # type: ignore[index]
    assert facts["usage"]["cpu_s"] > 0  # type: ignore[index]
    assert re.search(
        rb"box +exited \(3\) \d+ s ago +base:latest +microvm +python3 -c", microvm("ps", "--all").stdout
    )
    assert microvm("logs", "box").stdout == data
    assert sorted(os.listdir(microvm.home / "sandboxes" / sandbox)) == [
        "ended.json",
        "record.json",
        "started",
    ]
    assert sandbox not in groups_below(layout())
    assert microvm("rm", "box").stdout == b"box\n"
    assert microvm.ps() == {}
    assert not microvm.log_file(sandbox).exists()


def test_a_detached_job_has_its_time_limit_and_keeps_no_process_of_ours(microvm: Cli) -> None:
    """The agent keeps the limit when nobody else is there: 124; meanwhile there are the bridge and the VMM alone."""
    sandbox = (
        microvm.run("-d", "--name", "box", "--timeout", "2", "--", "sleep", "50").stdout.decode().strip()
    )
    names = {os.path.basename(command_of(pid).split(b"\0")[0]) for pid in processes(sandbox)}
    assert names <= {b".ringfence", b"qemu-system-x86_64", b""}
    marker = f"RINGFENCE_RUN_DIR={microvm.home}".encode()
    for process in Path("/proc").glob("[0-9]*"):
        try:
            ours = marker in (process / "environ").read_bytes().split(b"\0")
            assert not ours or int(process.name) == os.getpid(), (process / "cmdline").read_bytes()
        except OSError:
            continue
    microvm("logs", "-f", "box")
    facts = ended(microvm)
    assert (facts["exit_status"], facts["timed_out"]) == (124, True)
    assert b"exited (124, time limit)" in microvm("ps", "--all").stdout


def test_the_log_of_a_detached_job_is_bounded(microvm: Cli) -> None:
    """More output than limits.output is dropped, counted and said to be; what is kept is the beginning."""
    sandbox = microvm.detached("seq", "40000", options=("--set", "limits.output=64KiB"))
    followed = microvm("logs", "-f", "box")
    whole = "".join(f"{i}\n" for i in range(1, 40001)).encode()
    assert whole.startswith(followed.stdout)
    assert 55_000 < len(followed.stdout) <= 65536
    assert b"bytes dropped" in followed.stderr
    assert microvm.log_file(sandbox).stat().st_size <= 65536 + 64
    assert ended(microvm)["output_truncated"]


def test_a_detached_job_with_a_terminal_and_logs_as_json(microvm: Cli) -> None:
    """-dt: the job has a terminal, whose output is the log; --json keeps every byte, --timestamps stamps lines."""
    script = r"test -t 0 && test -t 1 && tty; printf 'err\377\n' >&2; exit 3"
    microvm.detached("sh", "-c", script, options=("-t",))
    assert microvm("logs", "-f", "box").stdout == b"/dev/pts/0\r\nerr\xff\r\n"
    assert ended(microvm)["exit_status"] == 3
    pieces = [json.loads(line) for line in microvm("logs", "--json", "box").stdout.splitlines()]
    assert {piece["stream"] for piece in pieces} == {"stdout"}
    assert re.match(
        rb"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z /dev/pts/0", microvm("logs", "-t", "box").stdout
    )


HOG = "data = []\nwhile True: data.append(b'x' * (1 << 20))"


def test_a_detached_job_that_is_out_of_memory(microvm: Cli) -> None:
    """A machine that nobody attends has the status of what was killed in it."""
    microvm.detached("python3", "-c", HOG, options=("--memory", "48MiB"))
    assert ended(microvm)["exit_status"] == 137


# exec, stop: one machine


def test_exec_in_all_its_ways(microvm: Cli) -> None:
    """Under everything the first job is under; its own environment, bytes, status, terminal; many at once; a crash."""
    script = (
        "grep -E '^(Uid|Gid|Groups|Cap|NoNewPrivs|Seccomp)' /proc/self/status; cat /proc/self/mountinfo;"
        " ulimit -a; umask; env | sort; pwd; cat /proc/version; hostname"
    )
    microvm.detached(
        "sh", "-c", f"{script}; echo end >&2; sleep 300", options=("-e", "FIRST=1", "--timeout", "300")
    )
    until(lambda: b"end" in microvm("logs", "--stderr-only", "box").stderr)
    first = microvm("logs", "--stdout-only", "box").stdout
    assert b"CapBnd:\t0000000000000000\n" in first
    assert b"Seccomp:\t2\n" in first
    assert microvm("exec", "box", "--", "sh", "-c", script).stdout == first

    env = {**os.environ, "NAMED": "yes", "SECRET": "no"}
    words = ["exec", "-e", "NAMED", "-e", "OWN=a=b", "-w", "/tmp", "box", "--", "sh", "-c", "env; pwd"]
    lines = microvm(*words, env=env).stdout.splitlines()
    assert {b"FIRST=1", b"NAMED=yes", b"OWN=a=b", b"/tmp"} <= set(lines)
    assert not [line for line in lines if b"SECRET" in line or b"RINGFENCE" in line]

    data = random.Random(1).randbytes(3_000_000)
    by_name = microvm("exec", "box", "--", "sh", "-c", "cat < /dev/stdin > /dev/stderr", stdin=data)
    assert (by_name.stdout, by_name.stderr) == (b"", data)

    terminal = Terminal(
        "-it", "box", "--", "sh", "-c", "tty; stty size; read x; echo got $x; exit 6", verb="exec"
    )
    terminal.wait_for(b"/dev/pts/0\r\n33 77\r\n", 20)
    terminal.type(b"x\x7fhello\r")
    terminal.wait_for(b"got hello", 20)
    assert terminal.end(20) == 6

    def one(number: int) -> tuple[int, bytes]:
        data = bytes([number]) * 100_000
        done = microvm("exec", "box", "--", "sh", "-c", f"cat; exit {number}", stdin=data, status=None)
        return done.returncode, done.stdout

    with ThreadPoolExecutor(8) as pool:
        answers = list(pool.map(one, range(1, 9)))
    assert answers == [(number, bytes([number]) * 100_000) for number in range(1, 9)]

    client = microvm.start("exec", "box", "--", "sh", "-c", "echo up; sleep 49; :", stdout=subprocess.PIPE)
    assert client.stdout is not None
    assert client.stdout.readline() == b"up\n"
    client.kill()
    client.wait()

    def others() -> bytes:
        return microvm("exec", "box", "--", "sh", "-c", "cat /proc/[0-9]*/cmdline").stdout

    until(lambda: b"sleep\x0049" not in others())
    assert b"sleep\x00300" in others()

    words = ["exec", "box", "--", "sh", "-c", "echo up; exec sleep 49"]
    client = microvm.start(*words, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert client.stdout is not None
    assert client.stdout.readline() == b"up\n"
    os.kill(part_of(the_only_one(microvm), "qemu"), signal.SIGKILL)
    said = client.communicate(timeout=WAIT_S)[1]
    assert (client.returncode, said) == (137, b"ringfence: the sandbox ended while the command ran\n")
    ended(microvm)
    done = microvm("exec", "box", "--", "true", status=125)
    assert b"is not running" in done.stderr
    assert len(done.stderr.splitlines()) == 1


def test_stop_lets_a_job_end_in_its_own_way(microvm: Cli) -> None:
    """SIGTERM comes first: a job that handles it has its own status and its last words in the log."""
    script = "trap 'echo bye; exit 5' TERM; echo up; while :; do sleep 0.05; done"
    sandbox = microvm.detached("sh", "-c", script)
    microvm.wait_for_log("box", b"up")
    assert microvm("stop", "box").stdout == b"box\n"
    assert processes(sandbox) == []
    assert microvm("logs", "box").stdout == b"up\nbye\n"
    assert microvm.ps()["box"]["exit_status"] == 5
    assert microvm("stop", "box").stdout == b"box (had ended)\n"


def test_stop_kills_what_ignores_it(microvm: Cli) -> None:
    """After --time everything is dead, also what left its session."""
    script = "trap '' TERM; setsid sleep 49 & echo up; while :; do sleep 0.05; done"
    sandbox = microvm.detached("sh", "-c", script)
    microvm.wait_for_log("box", b"up")
    started = time.monotonic()
    assert microvm("stop", "--time", "0.6", "box").stdout == b"box\n"
    assert 0.6 < time.monotonic() - started < 10
    assert processes(sandbox) == []
    assert microvm.ps()["box"]["exit_status"] == 137


@pytest.mark.parametrize("part", PARTS)
def test_stop_reaches_a_sandbox_that_does_not_answer(microvm: Cli, part: str) -> None:
    """With any of its parts stopped, a sandbox is killed through its cgroup."""
    sandbox = microvm.detached("sleep", "50")
    os.kill(part_of(sandbox, part), signal.SIGSTOP)
    assert microvm("stop", "--time", "0", "box").stdout == b"box\n"
    assert processes(sandbox) == []
    assert microvm.ps()["box"]["state"] in ("killed", "exited")


def test_stop_and_rm_of_a_foreground_sandbox(microvm: Cli) -> None:
    """A sandbox of another terminal is stopped as well; its `run` reports the end, in silence, and cleans up."""
    for words, status in ((("stop", "front"), 143), (("rm", "--force", "front"), 137)):
        front = microvm.running("--name", "front", "--", "sh", "-c", "echo -n .; exec sleep 50")
        assert microvm(*words).stdout == b"front\n"
        assert front.communicate(timeout=WAIT_S) == (b"", b"")
        assert front.returncode == status
        assert microvm.ps() == {}


# Crashes


@pytest.mark.parametrize("part", PARTS)
def test_a_killed_part_ends_a_run(microvm: Cli, part: str) -> None:
    """kill -9 of the VMM or the bridge: 137, words that say so, and nothing is left."""
    run = microvm.running("--", "sh", "-c", "echo -n .; exec sleep 50")
    sandbox = the_only_one(microvm)
    pids = processes(sandbox)
    os.kill(part_of(sandbox, part), signal.SIGKILL)
    stdout, stderr = run.communicate(timeout=WAIT_S)
    assert (run.returncode, stdout) == (137, b"")
    assert stderr.startswith(b"ringfence: the microVM ")
    assert [pid for pid in pids if command_of(pid)] == []
    assert remains(microvm.home) == []
    assert sandbox not in groups_below(layout())


@pytest.mark.parametrize("part", PARTS)
def test_a_killed_part_ends_a_detached_sandbox(microvm: Cli, part: str) -> None:
    """Everything inside dies; `ps` says killed, `logs` that there is no end, and cgroup and ids are given back."""
    sandbox = microvm.detached("sh", "-c", "echo up; exec sleep 49")
    microvm.wait_for_log("box", b"up")
    pids = processes(sandbox)
    os.kill(part_of(sandbox, part), signal.SIGKILL)
    until(lambda: not [pid for pid in pids if command_of(pid)])
    until(lambda: not any(entry.alive() for entry in store.entries()))
    assert microvm.ps()["box"]["state"] == "killed"
    assert sandbox not in groups_below(layout())
    done = microvm("logs", "box")
    assert done.stdout == b"up\n"
    assert done.stderr == b"ringfence: the log has no end: the sandbox was killed\n"
    assert microvm("gc").stdout == b"nothing to clean up\n"


def test_a_killed_launcher_takes_its_sandbox_along(microvm: Cli) -> None:
    """kill -9 of a foreground `run`: its machine ends by itself, and the next command clears up what is left."""
    run = microvm.running("--", "sh", "-c", "echo -n .; exec sleep 50")
    sandbox = the_only_one(microvm)
    run.kill()
    run.communicate()
    until(lambda: processes(sandbox) == [])
    microvm("gc")
    assert microvm.remains() == []


@pytest.mark.parametrize("options", [(), ("-d",)], ids=["foreground", "detached"])
def test_nothing_is_left_of_launchers_killed_at_any_moment(microvm: Cli, options: tuple[str, ...]) -> None:
    """kill -9 of `run` at ten moments from its start to after the job's: one `gc`, and nothing is left at all."""
    started = time.monotonic()
    microvm.run(*options, "--", "true")
    whole_way_s = time.monotonic() - started
    chance = random.Random()
    for turn in range(10):
        job = ("sleep", "50") if turn % 2 else ("true",)  # with the latter, also while it cleans up
        launcher = microvm.start("run", *microvm.tier, *options, "--", *job, stdout=subprocess.DEVNULL)
        time.sleep((turn + chance.random()) / 10 * whole_way_s)
        launcher.kill()
        launcher.wait()
        microvm.look()
    assert len(microvm.seen) >= 3
    if options:
        microvm("rm", "--all", "--force", status=None)
    until(lambda: not any(entry.alive() for entry in store.entries()))
    microvm("gc")
    if options:
        microvm("rm", "--all")
    assert microvm.remains() == []


def test_four_at_the_same_time(microvm: Cli) -> None:
    """Started at once, each has ids and a name of its own and answers; all stop together."""
    starts = [
        microvm.start("run", *microvm.tier, "-d", "--", "sleep", "90", stdout=subprocess.PIPE)
        for _ in range(4)
    ]
    boxes = [start.communicate(timeout=60)[0].decode().strip() for start in starts]
    assert [start.returncode for start in starts] == [0] * 4
    ranges = []
    for sandbox in boxes:
        inside, outside, count = map(int, Path(f"/proc/{agent_of(sandbox)}/uid_map").read_text().split())
        assert (inside, count) == (0, 65536)
        ranges.append((outside, outside + count))
    ranges.sort()
    assert all(end <= start for (_, end), (start, _) in pairwise(ranges))
    assert [microvm("exec", box, "--", "hostname").stdout.decode().strip() for box in boxes] == boxes
    microvm("stop", "--time", "1", *boxes)
    assert [processes(sandbox) for sandbox in boxes] == [[]] * 4
