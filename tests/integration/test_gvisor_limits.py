"""Limits at the gVisor tier: what a job really gets of each, and what its sandbox may take of the host at the most.

Inside it is gVisor's kernel that says no; around it the ring's cgroup does, whoever in the sandbox wants more.
"""

import hashlib
import json
import os
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

import ringfence
from boxes import Plain, Sandboxes, bind
from detached import Cli, layout, processes, until
from ringfence.errors import NotEnforceable

pytestmark = pytest.mark.requires("root", "compiler", "runsc")

KIB, MIB = 1 << 10, 1 << 20
# A process that is being killed for it may still take what it needs to end: mm/memcontrol.c, mem_cgroup_charge.
LAST_PAGES = 64 * KIB
FILL = """
def fill(path, piece=1 << 16):
    written = 0
    try:
        with open(path, 'wb', buffering=0) as file:
            while True: written += file.write(bytes(piece))
    except OSError as error: return [written, error.errno]
"""
SPIN = """
import time
end = time.monotonic() + 2
while time.monotonic() < end: pass
"""
HOG = "data = []\nwhile True: data.append(b'x' * (1 << 20))"


def counted(result: ringfence.Result) -> dict[str, Plain]:
    assert result.exit_status == 0, result.stderr
    answer: dict[str, Plain] = json.loads(result.stdout)
    return answer


def proven(result: ringfence.Result, control: str) -> int:
    """Return what the proof says of `control`."""
    assert result.proof is not None
    (line,) = [line for line in result.proof["lines"] if line["control"] == control]
    assert line["ok"] is True
    assert isinstance(line["observed"], int)
    return line["observed"]


class Watch:
    """The most processes and threads that any one sandbox's cgroup held at a time."""

    most = 0


@contextmanager
def watched(home: Path) -> Iterator[Watch]:
    """Look at our sandboxes' cgroups again and again from beside."""
    seen, over = Watch(), threading.Event()

    def look() -> None:
        pids = layout().mount_of("pids")
        while not over.wait(0.01):
            for sandbox in (home / "sandboxes").glob("[0-9a-f]*"):
                try:
                    count = int(Path(f"{pids}/ringfence/{sandbox.name}/pids.current").read_text())
                except OSError:  # it has just ended
                    continue
                seen.most = max(seen.most, count)

    thread = threading.Thread(target=look)
    thread.start()
    try:
        yield seen
    finally:
        over.set()
        thread.join()


@pytest.mark.requires("cgroup1:memory")
@pytest.mark.parametrize("fork", ["", "import os\nos.fork()\nos.fork()\n"])
def test_memory(guests: Sandboxes, fork: str) -> None:
    """A job that takes more is ended, all of it: 137, said to be memory; its group never held more than was proven."""
    result = guests.run(["python3", "-c", fork + HOG], {"limits.memory": "48MiB"})
    assert (result.exit_status, result.oom_killed, result.timed_out) == (137, True, False)
    assert result.usage.memory_peak_bytes is not None
    allowed = proven(result, "cgroup.memory_bytes")
    assert result.usage.memory_peak_bytes <= allowed + LAST_PAGES
    assert allowed < 48 * MIB + 64 * MIB  # what gVisor uses itself is beside it, and no licence


@pytest.mark.requires("cgroup1:memory")
def test_memory_that_the_policy_gives_is_there(guests: Sandboxes) -> None:
    """gVisor's own memory is not taken from the job's: nearly all of the limit can be used."""
    code = "import sys\ndata = [b'x' * (1 << 20) for _ in range(MOST)]\nsys.exit(7)"
    enough = guests.run(["python3", "-c", code.replace("MOST", "80")], {"limits.memory": "96MiB"})
    assert (enough.exit_status, enough.oom_killed) == (7, False)
    beyond = guests.run(["python3", "-c", code.replace("MOST", "112")], {"limits.memory": "96MiB"})
    assert (beyond.exit_status, beyond.oom_killed) == (137, True)


@pytest.mark.requires("cgroup1:memory")
@pytest.mark.parametrize("name", ["tmp", "work", "dev/shm"])
def test_memory_of_files(guests: Sandboxes, name: str) -> None:
    """Files in /tmp, /work and /dev/shm are memory of the sandbox: they cannot exceed its limit."""
    limits = {
        "limits.memory": "48MiB",
        "limits.file_size": "1GiB",
        "filesystem.tmp": "1GiB",
        "limits.disk": "1GiB",
        "limits.shm": "1GiB",
    }
    result = guests.run(["python3", "-c", FILL + f"fill('/{name}/x')"], limits)
    assert (result.exit_status, result.oom_killed) == (137, True)
    assert (result.usage.memory_peak_bytes or 0) <= proven(result, "cgroup.memory_bytes") + LAST_PAGES


@pytest.mark.requires("cgroup1:memory")
def test_files_that_are_only_read_are_not_the_jobs_memory(guests: Sandboxes, shared: Path) -> None:
    """The page cache of what the gofer reads gives way: a file larger than the limit can be read through."""
    data = os.urandom(MIB) * 96
    (shared / "large").write_bytes(data)
    code = "import hashlib\nout(hashlib.file_digest(open('/data/large', 'rb'), 'md5').hexdigest())"
    limits = {"limits.memory": "48MiB", "filesystem.mounts": [bind(shared, "/data")]}
    assert guests.ask(code, limits) == hashlib.md5(data, usedforsecurity=False).hexdigest()


@pytest.mark.requires("cgroup1:memory")
def test_child_that_is_out_of_memory(guests: Sandboxes) -> None:
    """There is one limit and one kernel inside: a child that takes too much is the end of the whole sandbox."""
    code = f'python3 -c "{HOG}"; echo status $?'
    result = guests.run(["sh", "-c", code], {"limits.memory": "48MiB"})
    assert (result.exit_status, result.stdout, result.oom_killed) == (137, b"", True)


@pytest.mark.requires("cgroup1:memory")
def test_detached_job_that_is_out_of_memory(gvisor: Cli) -> None:
    """A sandbox that nobody attends says afterwards that memory was its end."""
    gvisor.detached("python3", "-c", HOG, options=("--memory", "48MiB"))
    until(lambda: gvisor.ps()["box"]["state"] != "running")
    facts = gvisor.ps()["box"]
    assert (facts["exit_status"], facts["oom_killed"]) == (137, True)


@pytest.mark.requires("cgroup1:memory")
def test_memory_too_small_to_start(guests: Sandboxes) -> None:
    """A limit that the job does not even begin in is an error that says so, or its end; nothing hangs."""
    try:
        result = guests.run(["python3", "-c", "pass"], {"limits.memory": "1MiB"})
    except ringfence.RingfenceError as error:
        assert "memory" in str(error)
    else:
        assert (result.exit_status, result.oom_killed) == (137, True)


@pytest.mark.requires("cgroup1:pids")
def test_fork_bomb(guests: Sandboxes, home: Path) -> None:
    """Exactly `limits.pids` processes live at a time, however they fork; the ring's own limit is never reached."""
    with watched(home) as seen:
        result = guests.run(["/probe/consume", "processes"], {"limits.pids": 20, "limits.threads": 20})
    assert counted(result) == {"count": 20, "errno": 11}
    assert 20 < seen.most < proven(result, "cgroup.pids")


@pytest.mark.requires("cgroup1:pids")
@pytest.mark.parametrize(("pids", "threads"), [(24, 24), (60, 16)])
def test_thread_bomb(guests: Sandboxes, pids: int, threads: int) -> None:
    """Threads count as processes do; the smaller one of the two limits is reached exactly, by both."""
    limits = {"limits.pids": pids, "limits.threads": threads}
    least = threads
    result = guests.run(["/probe/consume", "threads"], limits)
    assert counted(result) == {"count": least, "errno": 11}
    assert counted(guests.run(["/probe/consume", "processes"], limits))["count"] == least


@pytest.mark.requires("cgroup1:pids")
def test_many_processes(guests: Sandboxes) -> None:
    """The ring has room for as many processes as the policy gives the job, each with a thread beside it."""
    result = guests.run(["/probe/consume", "processes"], {"limits.pids": 500, "limits.threads": 500})
    assert counted(result) == {"count": 500, "errno": 11}


def test_fork_bomb_that_never_ends(guests: Sandboxes) -> None:
    """A bomb that outlives its first process is gone when the run is."""
    bomb = "import os\nos.fork()\nwhile True:\n try: os.fork()\n except OSError: pass"
    result = guests.run(["python3", "-c", bomb], {"limits.pids": 32, "limits.threads": 32}, timeout=1.5)
    assert (result.exit_status, result.timed_out) == (124, True)
    assert result.usage.wall_s < 10


def test_capabilities_that_get_past_the_limit_are_refused(guests: Sandboxes, home: Path) -> None:
    """Each is refused by the limit's name; accepted all the same, it gets past inside, and the ring still holds."""
    limits = {"limits.pids": 20, "limits.threads": 20, "limits.memory": "96MiB", "user": "0:0"}
    for name in ("CAP_SYS_ADMIN", "CAP_SYS_RESOURCE"):
        fields = {**limits, "capabilities": [name]}
        with pytest.raises(NotEnforceable, match=r"limits\.pids"):
            guests.run(["true"], fields)
        with watched(home) as seen:
            result = guests.run(
                ["/probe/consume", "processes"],
                fields,
                allow_unenforced=("limits.pids", "limits.threads"),
                timeout=4,
            )
        assert seen.most > 64  # so the refusal is right
        assert result.exit_status in (0, 124, 137)
        assert (result.usage.memory_peak_bytes or 0) <= proven(result, "cgroup.memory_bytes") + LAST_PAGES


AS_MANY_USERS = """
import signal
counts = []
for user in (1, 2):
    ends = os.pipe()
    if os.fork() == 0:
        os.setresuid(user, user, user)
        made = 0
        try:
            while made < 40:
                if os.fork() == 0: signal.pause()
                made += 1
        except OSError: pass
        os.write(ends[1], bytes([made]))
        signal.pause()
    counts.append(os.read(ends[0], 1)[0])
out(counts)
"""


def test_users_count_apart(guests: Sandboxes) -> None:
    """Whoever may become other users has the limit of processes once for each, and is refused for it."""
    fields = {"limits.pids": 20, "limits.threads": 20, "user": "0:0", "capabilities": ["CAP_SETUID"]}
    with pytest.raises(NotEnforceable, match=r"limits\.pids"):
        guests.run(["true"], fields)
    assert guests.ask(AS_MANY_USERS, fields, allow_unenforced=("limits.pids",)) == [
        21,
        21,
    ]  # no agent among them


def test_capabilities_that_do_not_get_past_the_limit(guests: Sandboxes) -> None:
    """Others change nothing about it, nor does being root inside."""
    limits = {"limits.pids": 20, "limits.threads": 20, "user": "0:0"}
    for names in ([], ["CAP_SYS_PTRACE", "CAP_KILL", "CAP_DAC_OVERRIDE", "CAP_SYS_NICE"]):
        result = guests.run(["/probe/consume", "processes"], {**limits, "capabilities": names})
        assert counted(result) == {"count": 20, "errno": 11}


@pytest.mark.requires("cgroup1:cpu")
def test_cpu_quota(guests: Sandboxes) -> None:
    """Two spinning processes, and the sentry with them, get half a CPU of time together when the policy says 0.5."""
    code = f"import os\nos.fork()\n{SPIN}"
    result = guests.run(["python3", "-c", code], {"limits.cpus": 0.5})
    started = guests.run(["true"]).usage.cpu_s  # starting gVisor is before the job's time, and counted
    assert result.exit_status == 0
    assert result.usage.cpu_s is not None
    assert started is not None
    assert 0.15 < (result.usage.cpu_s - started) / result.usage.wall_s < 0.65


@pytest.mark.requires("cgroup1:cpuset", "two-cpus")
def test_cpuset(guests: Sandboxes, home: Path) -> None:
    """No process of the sandbox may run on another CPU than the list's: those are the sentry's, which runs the job."""
    with guests.held("hold(0)", {"limits.cpuset": "1"}):
        (name,) = os.listdir(home / "sandboxes")
        pids = processes(name)
        assert len(pids) > 2
        assert {frozenset(os.sched_getaffinity(pid)) for pid in pids} == {frozenset({1})}


def test_stack(guests: Sandboxes) -> None:
    """A main thread has the stack of the policy and no more: then SIGSEGV."""
    limits = {"limits.stack": "1MiB"}
    assert guests.run(["/probe/consume", "stack", str(512 * KIB)], limits).exit_status == 0
    beyond = guests.run(["/probe/consume", "stack", str(2 * MIB)], limits)
    assert (beyond.exit_status, beyond.signal) == (128 + signal.SIGSEGV, signal.SIGSEGV)


def test_open_files(guests: Sandboxes) -> None:
    """Exactly N descriptors can be open."""
    result = guests.run(["/probe/consume", "files"], {"limits.open_files": 37})
    assert counted(result) == {"count": 37, "errno": 24}


def test_limits_cannot_be_raised(guests: Sandboxes) -> None:
    """Hard limits are the soft ones, and only go down."""
    code = """
import resource
names = ('NOFILE', 'NPROC', 'STACK', 'FSIZE', 'CORE')
def lift(kind):
    soft, hard = resource.getrlimit(kind)
    try: resource.setrlimit(kind, (soft, hard + 1))
    except (ValueError, OSError): return [soft == hard, 'refused']
    return [soft == hard, 'lifted']
out({name: lift(getattr(resource, 'RLIMIT_' + name)) for name in names})
"""
    assert set(map(tuple, guests.ask(code).values())) == {(True, "refused")}  # type: ignore[arg-type]


def test_file_size(guests: Sandboxes) -> None:
    """A file ends at the limit: SIGXFSZ, or EFBIG for whoever ignores that."""
    limits = {"limits.file_size": "1MiB"}
    for name in ("tmp", "work", "dev/shm"):
        assert guests.ask(FILL + f"out(fill('/{name}/x'))", limits) == [MIB, 27]
    result = guests.run(["sh", "-c", "exec head -c 2000000 /dev/zero > /tmp/x"], limits)
    assert (result.exit_status, result.signal) == (128 + signal.SIGXFSZ, signal.SIGXFSZ)


def test_disk(guests: Sandboxes) -> None:
    """The work directory, /tmp, /dev/shm and a writable root take what the policy gives to each: then ENOSPC."""
    limits = {"limits.disk": "3MiB", "filesystem.tmp": "2MiB", "limits.shm": "1MiB"}
    code = FILL + "out([fill('/work/x'), fill('/tmp/x'), fill('/dev/shm/x')])"
    assert guests.ask(code, limits) == [[3 * MIB, 28], [2 * MIB, 28], [MIB, 28]]
    root = {**limits, "filesystem.root": "writable", "user": "0:0"}
    assert guests.ask(FILL + "out(fill('/x'))", root) == [3 * MIB, 28]


def test_disk_of_the_host(guests: Sandboxes) -> None:
    """A job that fills all it has changes nothing about the host's disks: everything of it is memory of its group."""
    before = os.statvfs("/var/lib").f_bavail, os.statvfs("/tmp").f_bavail
    code = FILL + "out([fill('/work/x')[1], fill('/tmp/x')[1]])"
    limits = {"limits.disk": "60MiB", "filesystem.tmp": "60MiB"}
    with guests.held(code.replace("out(", "hold("), limits) as held:
        assert held.said == [28, 28]
        after = os.statvfs("/var/lib").f_bavail, os.statvfs("/tmp").f_bavail
    block = os.statvfs("/tmp").f_frsize
    # Others write here at the same time; 120 MiB would be seen.
    assert max(old - new for old, new in zip(before, after, strict=True)) * block < 60 * MIB


def test_inodes(guests: Sandboxes) -> None:
    """Files run out at the limit, of which the directory itself takes one; on every writable mount."""
    for directory in ("/work", "/tmp", "/dev/shm"):
        result = guests.run(["/probe/consume", "inodes", directory], {"limits.inodes": 40})
        assert counted(result) == {"count": 39, "errno": 28}
    writable = {"limits.inodes": 40, "filesystem.root": "writable"}
    result = guests.run(["/probe/consume", "inodes", "/work"], writable)
    assert 20 <= counted(result)["count"] < 40  # type: ignore[operator] # overlayfs keeps a few for itself


def test_dev_is_memory_of_the_job(guests: Sandboxes) -> None:
    """gVisor gives its /dev no size: root of the sandbox, whose it is, can fill it until memory is used up."""
    result = guests.run(
        ["python3", "-c", FILL + "for n in range(9): fill(f'/dev/{n}')"],
        {"user": "0:0", "limits.memory": "48MiB"},
    )
    assert (result.exit_status, result.oom_killed) == (137, True)
    assert guests.ask(FILL + "out(os.access('/dev', os.W_OK))") is False


def test_no_core(guests: Sandboxes) -> None:
    """A crash leaves no core file, neither inside nor on the host."""
    assert counted(guests.run(["/probe/consume", "crash"])) == {"core": 0, "errno": signal.SIGABRT}
    result = guests.run(["sh", "-c", "/probe/consume crash > /dev/null; ls -A /work /tmp"])
    assert result.stdout == b"/tmp:\n\n/work:\n"


READ = """
import mmap, time
def read(path, piece, pieces):
    start = time.monotonic()
    with open(path, 'rb', buffering=0) as file:
        for number in range(pieces): os.pread(file.fileno(), piece, number * piece)
    return time.monotonic() - start
"""


@pytest.mark.requires("cgroup1:blkio")
def test_disk_reads_are_throttled(guests: Sandboxes, shared: Path) -> None:
    """What the gofer and the sentry read from the disk for the job stays at the policy's rate."""
    data = shared / "data"

    def cold() -> None:
        """Have nothing of it in the page cache, from where it would be free."""
        data.write_bytes(os.urandom(MIB) * 8)
        fd = os.open(data, os.O_RDONLY)
        os.fsync(fd)
        os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(fd)

    mount = {"filesystem.mounts": [bind(shared, "/data")]}
    whole = READ + "out(read('/data/data', 1 << 20, 8))"
    cold()
    control = guests.ask(whole, {"limits.io.read": "1GiB/s", "limits.io.read_iops": 1_000_000, **mount})
    cold()
    slow = guests.ask(whole, {"limits.io.read": "5MiB/s", **mount})
    assert float(slow) > 1.0 > float(control)  # type: ignore[arg-type]


IDLE = "while True: time.sleep(60)"
STUBBORN = {
    "sleeps": "import time\n" + IDLE,
    "ignores signals": "import signal, time\nfor n in (1, 2, 3, 13, 14, 15): signal.signal(n, 1)\n" + IDLE,
    "double fork": "import os, time\nif os.fork() == 0:\n os.setsid()\n os.fork()\n" + IDLE,
    "stopped": "import os, signal\nos.kill(os.getpid(), signal.SIGSTOP)",
    "stops all": "import os, signal, time\nos.fork()\nos.kill(-1, signal.SIGSTOP)\n" + IDLE,
    "closed streams": "import os, time\nos.closerange(0, 3)\n" + IDLE,
    "spins": "while True: pass",
}


@pytest.mark.parametrize("how", STUBBORN)
def test_time(guests: Sandboxes, how: str) -> None:
    """A job that does not end by itself is ended: 124, soon after its time, whatever state it is in."""
    start = time.monotonic()
    result = guests.run(["python3", "-c", STUBBORN[how]], timeout=0.6)
    took = time.monotonic() - start
    assert (result.exit_status, result.timed_out) == (124, True)
    assert 0.6 <= result.usage.wall_s < 3
    assert took < 8


def test_end_of_the_first_process_is_the_end(guests: Sandboxes) -> None:
    """Processes that a job leaves behind do not keep the sandbox, though they hold its output open."""
    code = "import os, time\nif os.fork() == 0:\n os.setsid()\n time.sleep(60)\nos.write(1, b'done')\nos._exit(3)"
    result = guests.run(["python3", "-c", code])
    assert (result.exit_status, result.stdout) == (3, b"done")
    assert result.usage.wall_s < 5


def test_output(guests: Sandboxes) -> None:
    """Of a flood as much is kept as the policy says, of both streams together; the job is not disturbed."""
    code = "import os\nfor _ in range(64): os.write(1, bytes(65536)), os.write(2, bytes(65536))\nraise SystemExit(5)"
    result = guests.run(["python3", "-c", code], {"limits.output": "100KiB"})
    assert len(result.stdout) + len(result.stderr) == 100 * KIB
    assert (result.exit_status, result.output_truncated) == (5, True)
    whole = guests.run(["head", "-c", "102400", "/dev/zero"], {"limits.output": "100KiB"})
    assert (len(whole.stdout), whole.output_truncated) == (100 * KIB, False)


FLOOD = "import os\nfor _ in range(128): os.write(1, b'x' * 65536)\nos.write(2, b'end')"


def test_output_of_a_detached_job(gvisor: Cli) -> None:
    """Its log on the host holds what the policy gives, and the job ends as if there had been no limit."""
    sandbox = gvisor.detached("python3", "-c", FLOOD, options=("--set", "limits.output=100KiB"))
    until(lambda: gvisor.ps()["box"]["state"] != "running")
    assert gvisor.ps()["box"]["exit_status"] == 0
    assert 100 * KIB <= gvisor.log_file(sandbox).stat().st_size <= 100 * KIB + 4 * KIB
