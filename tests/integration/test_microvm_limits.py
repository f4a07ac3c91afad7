"""Limits at the microVM tier: what a job really gets of each, and what its machine may take of the host at the most.

Inside it is the guest's kernel that says no; around it the ring's cgroup does, whatever the guest wants.
"""

import json
import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from test_gvisor_limits import FILL, HOG, KIB, LAST_PAGES, MIB, counted, proven

import ringfence
from boxes import Sandboxes
from commands import run
from detached import Cli, command_of, layout, processes
from ringfence.cgroup.group import Cgroup

pytestmark = pytest.mark.requires(
    "root", "compiler", "crun", "qemu", "kernel", "mkfs.erofs", "cgroup1:memory"
)

TIER = ("--isolation", "microvm", "--allow-emulation")
STACK, OPEN, DISK, INODES = 1 * MIB, 37, 3 * MIB, 40
SETTINGS = {
    "limits.stack": "1MiB",
    "limits.open_files": "37",
    "limits.disk": "3MiB",
    "filesystem.tmp": "2MiB",
    "limits.shm": "1MiB",
    "limits.inodes": "40",
    "limits.file_size": "8MiB",
    "limits.cpus": "0.5",
    "limits.cpuset": "1",
    "limits.pids": "64",
}


# Memory


@pytest.mark.parametrize("fork", ["", "import os\nos.fork()\nos.fork()\n"])
def test_memory(machines: Sandboxes, fork: str) -> None:
    """A job that takes more than its limit is killed, which is said; the ring never held more than was proven."""
    result = machines.run(["python3", "-c", fork + HOG], {"limits.memory": "48MiB"}, timeout=60)
    assert (result.exit_status, result.oom_killed, result.timed_out) == (137, True, False)
    assert result.usage.memory_peak_bytes is not None
    assert result.usage.memory_peak_bytes <= proven(result, "cgroup.memory_bytes") + LAST_PAGES
    assert result.notes == ()


def test_memory_in_words() -> None:
    """The command line says the same in one line."""
    done = run(*TIER, "--memory", "40MiB", "--timeout", "60", "--", "python3", "-c", HOG)
    assert done.returncode == 137
    assert done.stderr.startswith(b"ringfence: out of memory")
    assert done.stderr.count(b"\n") == 1


def test_memory_that_the_policy_gives_is_there(machines: Sandboxes) -> None:
    """The guest's kernel and the VMM take none of it: nearly all of the limit can be used."""
    code = "import sys\ndata = [b'x' * (1 << 20) for _ in range(80)]\nsys.exit(7)"
    enough = machines.run(["python3", "-c", code], {"limits.memory": "96MiB"}, timeout=60)
    assert (enough.exit_status, enough.oom_killed) == (7, False)


def test_child_that_is_out_of_memory(machines: Sandboxes) -> None:
    """The guest's kernel kills the one that takes too much; the rest of the job goes on, and both are told."""
    code = f'python3 -c "{HOG}"; echo status $?'
    result = machines.run(["sh", "-c", code], {"limits.memory": "48MiB"}, timeout=60)
    assert (result.exit_status, result.stdout, result.oom_killed) == (0, b"status 137\n", True)


def test_files_in_memory_are_memory(machines: Sandboxes) -> None:
    """What is written to /tmp, /work and /dev/shm counts as the job's memory, so that no file gets past its limit."""
    code = "exec head -c 100M /dev/zero > /tmp/x"
    fields = {"limits.memory": "40MiB", "filesystem.tmp": "200MiB", "limits.file_size": "200MiB"}
    result = machines.run(["sh", "-c", code], fields, timeout=60)
    assert (result.exit_status, result.oom_killed) == (137, True)


@pytest.mark.parametrize(
    ("words", "part"),
    [
        (["--memory", "16MiB"], "at least 32 MiB"),
        (["--memory", "1MiB"], "at least 32 MiB"),
        (["--cpus", "0.01"], "at least 0.05"),
    ],
    ids=" ".join,
)
def test_a_machine_too_small_to_start_is_refused(words: list[str], part: str) -> None:
    """In one line, before anything is booted."""
    done = run(*TIER, *words, "--", "true")
    assert (done.returncode, done.stdout, done.stderr.count(b"\n")) == (125, b"", 1)
    assert part.encode() in done.stderr


def test_the_least_machine_works(machines: Sandboxes) -> None:
    """32 MiB and a tenth of a CPU are little, and enough for something little."""
    fields = {"limits.memory": "32MiB", "limits.cpus": 0.1}
    result = ringfence.run(
        ["echo", "up"],
        isolation="microvm",
        allow_emulation=True,
        runtime=machines.runtime,
        overrides=fields,
        timeout=60,
    )
    assert (result.exit_status, result.stdout) == (0, b"up\n")


# Processes


def test_fork_bomb(machines: Sandboxes) -> None:
    """Exactly `limits.pids` processes live at a time, however they fork."""
    result = machines.run(
        ["/probe/consume", "processes"], {"limits.pids": 20, "limits.threads": 20}, timeout=60
    )
    assert counted(result) == {"count": 20, "errno": 11}


@pytest.mark.parametrize(("pids", "threads"), [(24, 24), (60, 16)])
def test_thread_bomb(machines: Sandboxes, pids: int, threads: int) -> None:
    """Threads count as processes do; the smaller one of the two limits is reached."""
    result = machines.run(
        ["/probe/consume", "threads"], {"limits.pids": pids, "limits.threads": threads}, timeout=60
    )
    assert counted(result) == {"count": threads, "errno": 11}


def test_fork_bomb_that_never_ends(machines: Sandboxes) -> None:
    """A bomb that outlives its first process is gone when the run is, on time though the guest is busy."""
    bomb = "import os\nos.fork()\nwhile True:\n try: os.fork()\n except OSError: pass"
    result = machines.run(["python3", "-c", bomb], {"limits.pids": 32, "limits.threads": 32}, timeout=3)
    assert (result.exit_status, result.timed_out) == (124, True)
    assert result.usage.wall_s < 12


# One machine with many small limits


@pytest.fixture(scope="module")
def small(home: Path, probes: Path, machines: Sandboxes) -> Iterator[Cli]:
    del machines  # for what it requires
    made = Cli(home, isolation="microvm")
    options = [word for key, value in SETTINGS.items() for word in ("--set", f"{key}={value}")]
    made.detached(
        "sleep", "900", name="small", options=("--timeout", "900", "-v", f"{probes}:/probe", *options)
    )
    try:
        yield made
    finally:
        made("rm", "--force", "small")


def python(small: Cli, code: str) -> object:
    """Run a program that prints JSON."""
    return json.loads(small("exec", "small", "--", "python3", "-c", code).stdout)


def probe(small: Cli, *words: str, status: int = 0) -> object:
    said = small("exec", "small", "--", "/probe/consume", *words, status=status).stdout
    return json.loads(said) if said else None


def test_open_files(small: Cli) -> None:
    """Exactly N descriptors can be open."""
    assert probe(small, "files") == {"count": OPEN, "errno": 24}


def test_stack(small: Cli) -> None:
    """A main thread has the stack of the policy and no more: then SIGSEGV."""
    probe(small, "stack", str(512 * KIB))
    probe(small, "stack", str(2 * MIB), status=128 + signal.SIGSEGV)


def test_limits_cannot_be_raised(small: Cli) -> None:
    """Hard limits are the soft ones, and only go down."""
    code = """
import json, resource
def lift(kind):
    soft, hard = resource.getrlimit(kind)
    try: resource.setrlimit(kind, (soft, hard + 1))
    except (ValueError, OSError): return soft == hard
print(json.dumps([lift(getattr(resource, 'RLIMIT_' + name)) for name in ('NOFILE', 'NPROC', 'STACK', 'FSIZE', 'CORE')]))
"""
    assert python(small, code) == [True] * 5


def test_disk(small: Cli) -> None:
    """/work, /tmp and /dev/shm take what the policy gives to each: then ENOSPC; what is removed is free again."""
    code = (
        "import json, os\n"
        + FILL
        + "found = []\nfor path in ('/work/x', '/tmp/x', '/dev/shm/x', '/work/x'):\n"
        + " found.append(fill(path)); os.unlink(path)\nprint(json.dumps(found))"
    )
    assert python(small, code) == [[DISK, 28], [2 * MIB, 28], [MIB, 28], [DISK, 28]]


@pytest.mark.parametrize("directory", ["/work", "/tmp", "/dev/shm"])
def test_inodes(small: Cli, directory: str) -> None:
    """Files run out at the limit, of which the directories themselves take some."""
    found = probe(small, "inodes", directory)
    assert isinstance(found, dict)
    assert INODES - 2 <= found["count"] < INODES
    assert found["errno"] == 28
    small("exec", "small", "--", "find", directory, "-type", "f", "-delete")


def test_dev_cannot_be_filled(small: Cli) -> None:
    """Nothing can be made in /dev, and terminals run out before memory does."""
    code = """
import json, os
made, error = [], 0
try:
    os.open('/dev/x', os.O_CREAT | os.O_WRONLY)
except OSError as refused: error = refused.errno
print(json.dumps(error))
"""
    assert python(small, code) == 13


def test_no_core(small: Cli) -> None:
    """A crash leaves no core file."""
    assert probe(small, "crash") == {"core": 0, "errno": signal.SIGABRT}
    assert small("exec", "small", "--", "sh", "-c", "ls -A /work /tmp").stdout == b"/tmp:\n\n/work:\n"


def test_cpu_quota_and_cpuset(small: Cli) -> None:
    """Two spinning processes get half a CPU together, the VMM's own work included, and on one CPU alone."""
    (sandbox,) = os.listdir(small.home / "sandboxes")
    pids = processes(sandbox)
    assert {frozenset(os.sched_getaffinity(pid)) for pid in pids} == {frozenset({1})}
    group = Cgroup(layout(), layout().path(sandbox))
    script = "(while :; do :; done) & (while :; do :; done) & echo up; sleep 60"
    spinner = small.start("exec", "small", "--", "sh", "-c", script)
    try:
        time.sleep(1.5)
        before, started = group.usage()["cpu_s"], time.monotonic()
        time.sleep(3)
        after, took = group.usage()["cpu_s"], time.monotonic() - started
    finally:
        spinner.kill()
        spinner.wait()
    assert before is not None
    assert after is not None
    # Others want that one CPU too.
    assert 0.1 < (after - before) / took < 0.56


def test_the_machine_stays_in_its_group_and_off_the_disk(small: Cli) -> None:
    """All of the VMM's processes and memory are the group's, swap included, and the host's disks know nothing of it."""
    (sandbox,) = os.listdir(small.home / "sandboxes")
    qemu = [pid for pid in processes(sandbox) if b"qemu" in command_of(pid).split(b"\0")[0]]
    assert len(qemu) == 1
    links = [os.readlink(f"/proc/{qemu[0]}/fd/{name}") for name in os.listdir(f"/proc/{qemu[0]}/fd")]
    for link in links:
        if link.startswith("/"):
            assert re_opened(qemu[0], link), link
    assert Path(f"/proc/{qemu[0]}/status").read_text().count("VmSwap:\t       0 kB") == 1


def re_opened(pid: int, link: str) -> bool:
    """Say whether every descriptor of `link` in `pid` can only be read, but for the sandbox's own log and nothing."""
    for name in os.listdir(f"/proc/{pid}/fd"):
        if os.readlink(f"/proc/{pid}/fd/{name}") != link:
            continue
        flags = int(Path(f"/proc/{pid}/fdinfo/{name}").read_text().split("flags:")[1].split()[0], 8)
        writable = flags & os.O_ACCMODE != os.O_RDONLY
        if writable and not link.startswith(("/dev/null", "/memfd:")) and "runtime.log" not in link:
            return False
    return True


def test_file_size(machines: Sandboxes) -> None:
    """A file ends at the limit: SIGXFSZ."""
    result = machines.run(
        ["sh", "-c", "exec head -c 2000000 /dev/zero > /tmp/x"], {"limits.file_size": "1MiB"}, timeout=60
    )
    assert (result.exit_status, result.signal) == (128 + signal.SIGXFSZ, signal.SIGXFSZ)


def test_a_writable_root_is_bounded(machines: Sandboxes) -> None:
    """Of the root and the work directory in it, as much can be changed as the policy gives of disk."""
    root = {"limits.disk": "3MiB", "filesystem.root": "writable", "user": "0:0"}
    found = machines.ask(FILL + "out(fill('/x'))", root, timeout=60)
    assert found == [3 * MIB, 28]
