"""The verbs around `run`, on real sandboxes: what is inherited, kept, ended and removed."""

import fcntl
import json
import os
import pty
import random
import re
import select
import signal
import struct
import subprocess
import sys
import termios
import time
from itertools import pairwise
from pathlib import Path

import pytest

import leftovers
from detached import CLI, WAIT_S, Cli, agent_of, command_of, layout, name_of, processes, until
from ringfence.cgroup.group import Cgroup
from ringfence.cgroup.group import leftovers as groups_below
from ringfence.sandbox import reap, store

pytestmark = pytest.mark.requires("root", "userns", "crun", "runc", "image:base")

# Everything that the kernel says of a process and that is the same for all processes of a sandbox.
SHOW_ITSELF = r"""
grep -E '^(Uid|Gid|Groups|Cap|NoNewPrivs|Seccomp|Cpus_allowed_list|Mems_allowed_list)' /proc/self/status
readlink /proc/self/ns/cgroup /proc/self/ns/ipc /proc/self/ns/mnt /proc/self/ns/net /proc/self/ns/pid \
  /proc/self/ns/user /proc/self/ns/uts /proc/self/root
cat /proc/self/uid_map /proc/self/gid_map /proc/self/setgroups /proc/self/cgroup /proc/self/limits
cat /proc/self/oom_score_adj; umask; env | sort; pwd
"""
AT_A_TERMINAL = """
import os, signal
signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGWINCH])
print(os.ttyname(0), *os.get_terminal_size(0))
print("ready", flush=True)
signal.sigwait([signal.SIGWINCH])
print("now", *os.get_terminal_size(0), flush=True)
print("got", input())
exit(6)
"""


# Detached: run -d, ps, logs


def test_a_detached_sandbox_keeps_its_output_and_status(cli: Cli, runtime: str) -> None:
    """After the end, `logs` has both streams apart and unchanged, `ps --all` the status, until `rm`."""
    data = bytes(range(256)) * 9
    script = (
        f"import sys; sys.stdout.buffer.write(bytes(range(256)) * 9); sys.stderr.write('oops'); sys.exit({3})"
    )
    sandbox = cli.detached("python3", "-c", script, options=("--runtime", runtime))
    followed = cli("logs", "--follow", "box")
    assert (followed.stdout, followed.stderr) == (data, b"oops")
    facts = until(lambda: found if (found := cli.ps()["box"])["state"] != "running" else None)
    assert (facts["state"], facts["exit_status"], facts["oom_killed"]) == ("exited", 3, False)
    assert facts["usage"]["memory_peak_bytes"] > 1 << 20
    assert b"box" not in cli("ps").stdout
    assert re.search(
        rb"box +exited \(3\) \d+ s ago +base:latest +linux +python3 -c", cli("ps", "--all").stdout
    )
    assert cli("logs", "box").stdout == data
    assert cli("rm", "box").stdout == b"box\n"
    assert cli.ps() == {}
    assert not cli.log_file(sandbox).exists()


def test_an_ended_sandbox_holds_nothing_but_its_record(cli: Cli) -> None:
    """What only a living sandbox needs (cgroup, ids, socket, bundle) goes as soon as somebody notices the end."""
    sandbox = cli.detached("true")
    until(lambda: cli.ps()["box"]["state"] == "exited")
    assert sorted(os.listdir(cli.home / "sandboxes" / sandbox)) == ["ended.json", "record.json", "started"]
    assert sandbox not in groups_below(layout())
    assert not [path for path, name in leftovers._ranges(cli.home) if name == sandbox]


def test_a_detached_sandbox_keeps_no_process_of_ours(cli: Cli) -> None:
    """Once `run -d` has returned there is the agent and the job: no Python, no runtime."""
    sandbox = cli.detached("sleep", "50")
    until(lambda: sorted(map(name_of, processes(sandbox))) == [".ringfence", "sleep"])
    marker = f"RINGFENCE_RUN_DIR={cli.home}".encode()
    others = []
    for process in Path("/proc").glob("[0-9]*"):
        try:
            if int(process.name) != os.getpid() and marker in (process / "environ").read_bytes().split(b"\0"):
                others.append((process / "cmdline").read_bytes())
        except OSError:
            continue
    assert others == []


def test_a_detached_job_has_its_time_limit(cli: Cli) -> None:
    """The agent keeps the time limit when nobody else is there: status 124."""
    cli("run", "-d", "--name", "box", "--timeout", "0.2", "--", "sleep", "50")
    cli("logs", "-f", "box")
    facts = until(lambda: found if (found := cli.ps()["box"])["state"] == "exited" else None)
    assert (facts["exit_status"], facts["timed_out"]) == (124, True)
    assert b"exited (124, time limit)" in cli("ps", "--all").stdout


def test_the_log_of_a_detached_job_is_bounded(cli: Cli) -> None:
    """More output than limits.output is dropped, counted and said to be; what is kept is the beginning."""
    script = "import sys\nfor i in range(40000): print(i)"
    sandbox = cli.detached("python3", "-c", script, options=("--set", "limits.output=64KiB"))
    followed = cli("logs", "-f", "box")
    whole = "".join(f"{i}\n" for i in range(40000)).encode()
    assert whole.startswith(followed.stdout)
    assert 60_000 < len(followed.stdout) <= 65536
    dropped = len(whole) - len(followed.stdout)
    assert f"{dropped} bytes dropped".encode() in followed.stderr
    assert cli.log_file(sandbox).stat().st_size <= 65536 + 40
    assert until(lambda: found if (found := cli.ps()["box"])["state"] == "exited" else None)[
        "output_truncated"
    ]


def test_logs_of_one_stream_with_times_and_as_json(cli: Cli) -> None:
    """--stderr-only leaves out the other, --timestamps stamps each line once, --json keeps every byte."""
    script = r"printf 'one\ntw'; sleep 0.1; printf 'o\n'; sleep 0.1; printf 'err\377\n' >&2; sleep 0.1; printf 'three'"
    cli.detached("sh", "-c", script)
    cli("logs", "-f", "box")
    only = cli("logs", "--stderr-only", "box")
    assert (only.stdout, only.stderr) == (b"", b"err\xff\n")
    assert cli("logs", "--stdout-only", "box").stdout == b"one\ntwo\nthree"
    stamp = rb"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z "
    stamped = cli("logs", "-t", "box").stdout
    assert re.fullmatch(stamp + rb"one\n" + stamp + rb"two\n" + stamp + rb"three", stamped), stamped
    pieces = [json.loads(line) for line in cli("logs", "--json", "box").stdout.splitlines()]
    assert "".join(piece["text"] for piece in pieces if piece["stream"] == "stdout") == "one\ntwo\nthree"
    assert [piece["base64"] for piece in pieces if piece["stream"] == "stderr"] == ["ZXJy/wo="]


def test_ctrl_c_ends_the_reader_of_a_log_and_not_the_sandbox(cli: Cli) -> None:
    """`logs -f` ends with 130 on SIGINT; the sandbox runs on."""
    sandbox = cli.detached("sh", "-c", "echo here; sleep 50")
    reader = cli.start("logs", "-f", "box", stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert reader.stdout is not None
    assert reader.stdout.readline() == b"here\n"
    reader.send_signal(signal.SIGINT)
    assert (reader.communicate(timeout=WAIT_S), reader.returncode) == ((b"", b""), 130)
    assert len(processes(sandbox)) == 3


def test_a_foreground_sandbox_has_no_log(cli: Cli) -> None:
    """`logs` of one says where its output is instead of printing nothing."""
    front = cli.start("run", "--name", "front", "--", "sleep", "50", stderr=subprocess.DEVNULL)
    until(lambda: cli.ps().get("front", {}).get("state") == "running")
    assert b"has no log" in cli("logs", "front", status=125).stderr
    cli("stop", "--time", "0", "front")
    front.wait(WAIT_S)


def test_hostile_words_cannot_forge_a_line_of_ps(cli: Cli) -> None:
    """Control characters and bytes that are no text are made visible; a sandbox is one line."""
    cli("run", "-d", "--name", "box", "--", "sleep", b"50\n\x1b[2Jabc\xff\xe2\x80\xae", status=None)
    done = cli("ps", "--all").stdout
    assert len(done.splitlines()) == 2
    assert rb"sleep 50\n\x1b[2Jabc" in done
    assert all(31 < byte < 127 or byte == 10 for byte in done)
    assert json.loads(cli("ps", "--all", "--json").stdout)[0]["argv"][0] == "sleep"


# exec


def test_exec_is_under_everything_that_the_first_job_is_under(cli: Cli, runtime: str) -> None:
    """Ids, capabilities, seccomp, namespaces, maps, limits, cgroup and environment are the same, as the kernel says."""
    script = f"{SHOW_ITSELF}\necho end >&2; sleep 50"
    sandbox = cli.detached("sh", "-c", script, options=("--runtime", runtime))
    until(lambda: b"end" in cli("logs", "--stderr-only", "box").stderr)
    first = cli("logs", "--stdout-only", "box").stdout
    assert re.search(rb"CapBnd:\t0+\n", first)
    assert re.search(rb"Seccomp:\t2\n", first)
    assert re.search(rb"NoNewPrivs:\t1\n", first)
    assert cli("exec", "box", "--", "sh", "-c", SHOW_ITSELF).stdout == first
    second = cli.start("exec", "box", "--", "sleep", "49")
    host = until(lambda: [pid for pid in processes(sandbox) if b"49" in command_of(pid).split(b"\0")])
    agent = agent_of(sandbox)
    assert Path(f"/proc/{host[0]}/cgroup").read_text() == Path(f"/proc/{agent}/cgroup").read_text()
    second.kill()
    second.wait()


def test_exec_adds_to_the_environment_what_is_named_and_nothing_else(cli: Cli) -> None:
    """--env NAME=VALUE and --env NAME get in, the caller's other variables do not; --workdir is the directory."""
    cli.detached("sleep", "50")
    env = {**os.environ, "NAMED": "yes", "SECRET": "no"}
    words = ["exec", "-e", "NAMED", "-e", "OWN=a=b", "-w", "/tmp", "box", "--", "sh", "-c", "env; pwd"]
    lines = cli(*words, env=env).stdout.splitlines()
    assert {b"NAMED=yes", b"OWN=a=b", b"/tmp"} <= set(lines)
    assert not [line for line in lines if b"SECRET" in line or b"RINGFENCE" in line]


def test_bytes_pass_exec_unchanged_both_ways(cli: Cli) -> None:
    """3 MB of random bytes go in and come out the same; the end of input is the end of input."""
    cli.detached("sleep", "50")
    data = random.Random(1).randbytes(3_000_000)
    assert cli("exec", "box", "--", "cat", stdin=data).stdout == data
    assert cli("exec", "box", "--", "sh", "-c", "cat >&2", stdin=data).stderr == data


@pytest.mark.parametrize(
    ("words", "status", "says"),
    [
        (("sh", "-c", "exit 7"), 7, b""),
        (("sh", "-c", "kill -TERM $$"), 143, b""),
        (("no-such-program",), 127, b"'no-such-program': No such file"),
        (("/etc",), 126, b"'/etc': Permission denied"),
        (("/etc/passwd",), 126, b"'/etc/passwd': Permission denied"),
        (("python3", "-c", "bytearray(1 << 30)"), 137, b"out of memory"),
    ],
)
def test_the_exit_status_of_exec(cli: Cli, words: tuple[str, ...], status: int, says: bytes) -> None:
    """The command's own; 126 and 127 when it cannot be executed; 128+N; 137 for memory, and it is said."""
    cli.detached("sleep", "50")
    done = cli("exec", "box", "--", *words, status=status)
    assert says in done.stderr
    assert len(done.stderr.splitlines()) == bool(says)


def test_exec_where_nothing_runs_is_125_and_one_line(cli: Cli) -> None:
    """No such sandbox, an ended one, the beginning of two ids, no command: nothing is run."""
    cli.detached("true")
    until(lambda: cli.ps()["box"]["state"] == "exited")
    for name, says in (("box", b"is not running"), ("nobody", b"no sandbox 'nobody'")):
        done = cli("exec", name, "--", "true", status=125)
        assert says in done.stderr
        assert len(done.stderr.splitlines()) == 1
    for ending in ("1", "2"):
        (cli.home / "sandboxes" / f"abcdef00000{ending}").mkdir()
        (cli.home / "sandboxes" / f"abcdef00000{ending}" / "lock").touch()
    assert b"is the beginning of 2 ids" in cli("exec", "abcd", "--", "true", status=125).stderr
    assert b"no command was given" in cli("exec", "box", status=2).stderr


def test_exec_without_room_for_a_process(cli: Cli) -> None:
    """A sandbox that has used up its processes takes no other: 125, and the limit is named."""
    script = "import os, time\ntry:\n while os.fork(): pass\nexcept OSError: print('full', flush=True)\ntime.sleep(50)"
    cli.detached("python3", "-c", script, options=("--pids-limit", "24"))
    cli.wait_for_log("box", b"full")
    assert b"limits.pids" in cli("exec", "box", "--", "true", status=125).stderr


def test_exec_with_a_terminal(cli: Cli, runtime: str) -> None:
    """-it: a terminal of the sandbox's own, our window's size and its changes, raw keys, our terminal put back."""
    cli.detached("sleep", "50", options=("--runtime", runtime))
    ours, theirs = pty.openpty()
    resize(ours, 33, 101)
    before = termios.tcgetattr(theirs)
    client = cli.start(
        "exec", "-it", "box", "--", "python3", "-c", AT_A_TERMINAL, stdin=theirs, stdout=theirs, stderr=theirs
    )
    assert b"/dev/pts/0 101 33\r\n" in read_until(ours, b"ready")
    resize(ours, 44, 120)
    client.send_signal(signal.SIGWINCH)
    read_until(ours, b"now 120 44\r\n")
    os.write(ours, b"x\x7fhello\r")  # the key that deletes works in there: the terminal in between is raw
    read_until(ours, b"got hello\r\n")
    assert client.wait(WAIT_S) == 6
    assert termios.tcgetattr(theirs) == before
    os.close(ours)
    os.close(theirs)


def resize(terminal: int, rows: int, columns: int) -> None:
    fcntl.ioctl(terminal, termios.TIOCSWINSZ, struct.pack("HHHH", rows, columns, 0, 0))


def read_until(terminal: int, text: bytes) -> bytes:
    said = b""
    while text not in said:
        assert select.select([terminal], [], [], WAIT_S)[0], said
        said += os.read(terminal, 4096)
    return said


def test_signals_to_exec_reach_its_job(cli: Cli) -> None:
    """Ctrl-C is the job's to handle; a job that ignores it is killed at the third."""
    cli.detached("sleep", "50")
    polite = "from signal import *\npthread_sigmask(0, [2])\nprint('up', flush=True)\nexit(7 + sigwait([2]))"
    client = cli.start("exec", "box", "--", "python3", "-c", polite, stdout=subprocess.PIPE)
    assert client.stdout is not None
    assert client.stdout.readline() == b"up\n"
    client.send_signal(signal.SIGINT)
    assert client.wait(WAIT_S) == 9
    deaf = "trap '' INT; echo up; while :; do read -t 1 x < /dev/zero; done"
    client = cli.start("exec", "box", "--", "bash", "-c", deaf, stdout=subprocess.PIPE)
    assert client.stdout is not None
    assert client.stdout.readline() == b"up\n"
    while client.poll() is None:
        client.send_signal(signal.SIGINT)
        time.sleep(0.02)
    assert client.returncode == 137


def test_a_killed_exec_takes_its_job_along(cli: Cli) -> None:
    """kill -9 of the client ends the job in the sandbox, and nothing else there."""
    sandbox = cli.detached("sleep", "50")
    client = cli.start("exec", "box", "--", "sh", "-c", "sleep 49 & sleep 48; :")
    until(lambda: len(processes(sandbox)) == 5)
    client.kill()
    client.wait()
    until(lambda: len(processes(sandbox)) == 2)
    assert cli.ps()["box"]["state"] == "running"


def test_exec_says_that_the_sandbox_ended(cli: Cli) -> None:
    """A command whose sandbox is stopped under it ends with 137."""
    sandbox = cli.detached("sleep", "50")
    words = ("exec", "box", "--", "sh", "-c", "echo up; sleep 49")
    client = cli.start(*words, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert client.stdout is not None
    assert client.stdout.readline() == b"up\n"
    os.kill(agent_of(sandbox), signal.SIGKILL)
    said = client.communicate(timeout=WAIT_S)[1]
    assert (client.returncode, said) == (137, b"ringfence: the sandbox ended while the command ran\n")


def test_nobody_else_may_connect(cli: Cli) -> None:
    """The socket to the agent is its owner's alone, and no other user gets to it."""
    sandbox = cli.detached("sleep", "50")
    socket = cli.home / "sandboxes" / sandbox / "control.sock"
    assert socket.stat().st_mode & 0o777 == 0o600
    connect = f"import socket; socket.socket(socket.AF_UNIX).connect({str(socket)!r})"
    outsider = subprocess.run([sys.executable, "-c", connect], user=54321, group=54321, capture_output=True)
    assert outsider.returncode == 1
    assert b"PermissionError" in outsider.stderr or b"Permission denied" in outsider.stderr
    subprocess.run([sys.executable, "-c", connect], check=True)


# stop, rm


def test_stop_lets_a_job_end_in_its_own_way(cli: Cli, runtime: str) -> None:
    """SIGTERM comes first: a job that handles it has its own status and its last words in the log."""
    script = "trap 'echo bye; exit 5' TERM; echo up; while :; do sleep 0.05; done"
    sandbox = cli.detached("sh", "-c", script, options=("--runtime", runtime))
    cli.wait_for_log("box", b"up")
    started = time.monotonic()
    assert cli("stop", "box").stdout == b"box\n"
    assert time.monotonic() - started < 5
    assert processes(sandbox) == []
    assert cli("logs", "box").stdout == b"up\nbye\n"
    assert cli.ps()["box"]["exit_status"] == 5
    assert cli("stop", "box").stdout == b"box (had ended)\n"


def test_stop_kills_what_ignores_it(cli: Cli, runtime: str) -> None:
    """After --time everything is dead, also what left its session; several get that time together."""
    script = "trap '' TERM; setsid sleep 49 & echo up; while :; do sleep 0.05; done"
    boxes = {
        name: cli.detached("sh", "-c", script, name=name, options=("--runtime", runtime)) for name in "ab"
    }
    for name in boxes:
        cli.wait_for_log(name, b"up")
    started = time.monotonic()
    assert cli("stop", "--time", "0.6", *boxes).stdout == b"a\nb\n"
    assert 0.6 < time.monotonic() - started < 5
    assert [processes(sandbox) for sandbox in boxes.values()] == [[], []]
    assert {facts["exit_status"] for facts in cli.ps().values()} == {137}


def test_stop_reaches_an_agent_that_does_not_answer(cli: Cli) -> None:
    """A sandbox whose agent is stopped is killed through its cgroup."""
    sandbox = cli.detached("sleep", "50")
    os.kill(agent_of(sandbox), signal.SIGSTOP)
    assert cli("stop", "--time", "0", "box").stdout == b"box\n"
    assert processes(sandbox) == []
    assert cli.ps()["box"]["state"] == "killed"


def test_stop_and_rm_of_a_foreground_sandbox(cli: Cli) -> None:
    """A sandbox of another terminal is stopped as well; its `run` reports the end and cleans up."""
    for words, status in ((("stop", "front"), 143), (("rm", "--force", "front"), 137)):
        front = cli.start("run", "--name", "front", "--", "sleep", "50", stderr=subprocess.DEVNULL)
        until(lambda: cli.ps().get("front", {}).get("state") == "running")
        assert cli(*words).stdout == b"front\n"
        assert front.wait(WAIT_S) == status
        assert cli.ps() == {}


def test_rm_refuses_a_running_sandbox(cli: Cli) -> None:
    """Without --force it says so; the others that were named are removed all the same."""
    cli.detached("sleep", "50")
    cli.detached("true", name="done")
    until(lambda: cli.ps()["done"]["state"] == "exited")
    done = cli("rm", "box", "done", status=125)
    assert done.stdout == b"done\n"
    assert b"box is running" in done.stderr
    assert list(cli.ps()) == ["box"]
    assert cli("rm", "--all").stdout == b""
    assert cli("rm", "--force", "box").stdout == b"box\n"
    assert cli.ps() == {}
    assert b"no sandbox 'box'" in cli("rm", "box", status=2).stderr
    assert b"rm takes names, or --all" in cli("rm", status=2).stderr


# Crashes


def test_a_killed_agent_is_noticed_and_cleaned_up_after(cli: Cli, runtime: str) -> None:
    """kill -9 of the agent: everything inside dies; `ps` says killed, and cgroup and ids are given back."""
    sandbox = cli.detached("sh", "-c", "echo up; setsid sleep 49", options=("--runtime", runtime))
    cli.wait_for_log("box", b"up")
    pids = processes(sandbox)
    os.kill(agent_of(sandbox), signal.SIGKILL)
    until(lambda: not [pid for pid in pids if command_of(pid)])
    assert cli.ps()["box"]["state"] == "killed"
    assert sandbox not in groups_below(layout())
    done = cli("logs", "box")
    assert (done.stdout, done.stderr) == (b"up\n", b"ringfence: the log has no end: the sandbox was killed\n")
    assert cli("gc").stdout == b"nothing to clean up\n"


@pytest.mark.parametrize("options", [(), ("-d",)], ids=["foreground", "detached"])
def test_nothing_is_left_of_launchers_killed_at_any_moment(
    cli: Cli, runtime: str, options: tuple[str, ...]
) -> None:
    """kill -9 of `run` at 40 moments from its start to after the job's: one `gc`, and nothing is left at all."""
    words = ("run", *options, "--runtime", runtime, "--")
    cli(*words, "true")  # the plan is in the cache from now on
    started = time.monotonic()
    cli(*words, "true")
    whole_way_s = time.monotonic() - started
    chance = random.Random()
    for turn in range(200):
        if (
            turn >= 40 and len(cli.seen) >= 10
        ):  # on a busy machine, more turns until they were in the midst of it
            break
        job = ("sleep", "50") if turn % 2 else ("true",)  # with the latter, also while it cleans up
        launcher = cli.start(*words, *job, stdout=subprocess.DEVNULL)
        # Once at least in every part of the way.
        time.sleep((turn % 40 + chance.random()) / 40 * whole_way_s)
        launcher.kill()
        launcher.wait()
        cli.look()
    assert len(cli.seen) >= 10
    if options:
        # Those that were let go live on, as they should.
        cli("rm", "--all", "--force", status=None)
    # What runs on for a moment, a runtime or an agent, holds the locks.
    until(lambda: not any(entry.alive() for entry in store.entries()))
    cli("gc")
    if options:
        cli("rm", "--all")
    assert cli.remains() == []


def test_a_cleaner_that_was_killed_half_way_is_no_harm(cli: Cli) -> None:
    """A directory with an end but not everything given back, a half made and a half removed one: `ps` goes on."""
    sandbox = cli.detached("sh", "-c", "exit 4")
    until(lambda: not store.Entry(f"{cli.home}/sandboxes/{sandbox}").alive())
    home = cli.home / "sandboxes"
    # As `reap` leaves it when it is killed after its first step.
    (home / sandbox / "ended.json").write_text('{"exit_status": 4}')
    for name in (".new-0123456789ab", ".gone-0123456789ab"):
        (home / name).mkdir()
        (home / name / "lock").touch()
    assert cli.ps()["box"]["exit_status"] == 4
    assert sandbox not in groups_below(layout())
    assert sorted(os.listdir(home / sandbox)) == ["ended.json", "record.json", "started"]
    assert os.listdir(home) == [sandbox]


def test_one_sandbox_that_cannot_be_cleaned_up_does_not_stop_the_others(cli: Cli) -> None:
    """A sweep goes on after a failure, and says what failed."""
    stuck, *others = sorted(cli.detached("sleep", "50", name=name) for name in ("a", "b", "c"))
    for sandbox in (stuck, *others):
        os.kill(agent_of(sandbox), signal.SIGKILL)
    until(lambda: not any(entry.alive() for entry in store.entries()))
    record = cli.home / "sandboxes" / stuck / "record.json"
    good = record.read_text()
    record.write_text(good.replace(f"/ringfence/{stuck}", "/../escape"))
    try:
        swept = reap.sweep()
        assert swept.ids == others
        assert len(swept.problems) == 1
        assert stuck in swept.problems[0]
        assert stuck.encode() in cli("gc", status=125).stderr
    finally:
        record.write_text(good)


def test_gc_takes_stray_cgroups_ids_and_logs_and_leaves_what_lives(cli: Cli) -> None:
    """An empty group without a sandbox goes; one with a process, which may be another's, stays and is named."""
    box = cli.detached("sleep", "50")
    stray, inhabited = (
        Cgroup(layout(), layout().path(name)) for name in ("stray-of-a-test", "kept-by-a-test")
    )
    lost_range = Path("/run/ringfence/ranges/1")
    sleeper = subprocess.Popen(["sleep", "50"])
    try:
        stray.create()
        inhabited.create()
        for mount in layout().hierarchies():
            if Path(f"{mount}{inhabited.path}").is_dir():
                Path(f"{mount}{inhabited.path}/cgroup.procs").write_text(str(sleeper.pid))
        lost_range.write_text(f"{cli.home}/sandboxes/not-there")
        cli.log_file("not-there").touch()
        shown = json.loads(cli("gc", "--json").stdout)
        assert sorted(shown["removed"]) == [
            "cgroup /ringfence/stray-of-a-test",
            "id range 1",
            "log not-there",
        ]
        assert [str(sleeper.pid) in line for line in shown["kept"] if "kept-by-a-test" in line] == [True]
        assert shown["problems"] == []
        assert not stray.exists()
        assert not cli.log_file("not-there").exists()
        assert sleeper.poll() is None
        assert len(processes(box)) == 2
    finally:
        sleeper.kill()
        sleeper.wait()
        lost_range.unlink(missing_ok=True)
        inhabited.remove()
        stray.remove()
    assert b"kept-by-a-test" not in cli("gc").stdout


def test_sandboxes_at_the_same_time_have_ids_of_their_own(cli: Cli) -> None:
    """Eight started at once: the kernel's maps of their user namespaces do not overlap."""
    starts = [cli.start("run", "-d", "--", "sleep", "50", stdout=subprocess.PIPE) for _ in range(8)]
    boxes = [start.communicate(timeout=WAIT_S * 2)[0].decode().strip() for start in starts]
    assert [start.returncode for start in starts] == [0] * 8
    ranges = []
    for sandbox in boxes:
        inside, outside, count = map(int, Path(f"/proc/{agent_of(sandbox)}/uid_map").read_text().split())
        assert (inside, count) == (0, 65536)
        ranges.append((outside, outside + count))
    ranges.sort()
    assert all(end <= start for (_, end), (start, _) in pairwise(ranges))


# The command line itself


@pytest.mark.parametrize("words", [("ps", "--all"), ("--help",), ("gc", "--help"), ("gc",), ("logs", "box")])
def test_nobody_reads_our_output(cli: Cli, words: tuple[str, ...]) -> None:
    """A closed pipe is no error to talk about: 141, as a program killed by SIGPIPE has, and silence."""
    cli.detached("sh", "-c", "echo text; sleep 50")
    cli.wait_for_log("box", b"text")
    reader, writer = os.pipe()
    os.close(reader)
    done = subprocess.run([*CLI, *words], stdout=writer, stderr=subprocess.PIPE, timeout=WAIT_S)
    os.close(writer)
    assert (done.returncode, done.stderr) == (141, b"")


def test_output_that_cannot_be_written(cli: Cli) -> None:
    """A full disk behind our output is one line and 125."""
    with open("/dev/full", "wb") as full:
        done = subprocess.run([*CLI, "ps"], stdout=full, stderr=subprocess.PIPE, timeout=WAIT_S)
    assert done.returncode == 125
    assert done.stderr.splitlines() == [b"ringfence: No space left on device; see --debug [RF-ERROR]"]


@pytest.mark.parametrize("verb", ["exec", "ps", "logs", "stop", "rm", "gc"])
def test_help_begins_with_an_example(cli: Cli, verb: str) -> None:
    """Who asks for help sees first what to type."""
    paragraphs = cli(verb, "--help").stdout.split(b"\n\n")
    assert paragraphs[1].startswith(b"example")
    assert f"  ringfence {verb}".encode() in paragraphs[1]
