"""Limits, felt from inside: how much a job really gets, and that the caller lives on when it wants more."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

import ringfence
from boxes import Plain, Sandboxes, bind
from ringfence.errors import NotEnforceable, PolicyError

pytestmark = pytest.mark.requires("root", "compiler")

KIB, MIB = 1 << 10, 1 << 20
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


def counted(result: ringfence.Result) -> dict[str, Plain]:
    assert result.exit_status == 0, result.stderr
    answer: dict[str, Plain] = json.loads(result.stdout)
    return answer


@pytest.mark.requires("cgroup:memory")
def test_memory(sandboxes: Sandboxes) -> None:
    """A job that takes more is killed: 137, said to be memory, and the peak stays within the limit."""
    hog = "data = []\nwhile True: data.append(bytearray(1 << 20))"
    result = sandboxes.run(["python3", "-c", hog], {"limits.memory": "48MiB"})
    assert (result.exit_status, result.oom_killed, result.timed_out) == (137, True, False)
    assert result.usage.memory_peak_bytes is not None
    assert result.usage.memory_peak_bytes <= 48 * MIB


@pytest.mark.requires("cgroup:memory")
def test_memory_of_files(sandboxes: Sandboxes) -> None:
    """Files in /tmp, /work and /dev/shm are memory of the job: together they cannot exceed the limit."""
    fill = FILL + "for name in ('tmp', 'work', 'dev/shm'): fill(f'/{name}/x')"
    limits = {
        "limits.memory": "48MiB",
        "limits.file_size": "1GiB",
        "filesystem.tmp": "1GiB",
        "limits.disk": "1GiB",
    }
    result = sandboxes.run(["python3", "-c", fill], limits)
    assert (result.exit_status, result.oom_killed) == (137, True)


@pytest.mark.requires("cgroup:memory")
def test_child_that_is_out_of_memory(sandboxes: Sandboxes) -> None:
    """When only a child dies of it, the job's own status counts, and the result still says so."""
    code = "python3 -c 'x = bytearray(1 << 28)'; echo status $?"
    result = sandboxes.run(["sh", "-c", code], {"limits.memory": "48MiB"})
    assert (result.exit_status, result.stdout, result.oom_killed) == (0, b"status 137\n", True)


@pytest.mark.requires("cgroup:memory")
def test_memory_too_small_to_start(sandboxes: Sandboxes) -> None:
    """A limit that not even the start fits in is an error that says so, or the end of the job; nothing hangs."""
    try:
        result = sandboxes.run(["python3", "-c", "pass"], {"limits.memory": "1MiB"})
    except ringfence.RingfenceError as error:
        assert "memory" in str(error)
    else:
        assert (result.exit_status, result.oom_killed) == (137, True)


@pytest.mark.requires("cgroup:pids")
def test_fork_bomb(sandboxes: Sandboxes) -> None:
    """Exactly `limits.pids` processes of the job live at the same time, however they fork."""
    result = sandboxes.run(["/probe/consume", "processes"], {"limits.pids": 20, "limits.threads": 20})
    assert counted(result)["count"] == 20


@pytest.mark.requires("cgroup:pids")
def test_thread_bomb(sandboxes: Sandboxes) -> None:
    """Threads count as processes do, in both limits; the smaller one is reached exactly."""
    by_group = sandboxes.run(["/probe/consume", "threads"], {"limits.pids": 24, "limits.threads": 24})
    assert counted(by_group) == {"count": 24, "errno": 11}
    by_user = sandboxes.run(["/probe/consume", "threads"], {"limits.pids": 60, "limits.threads": 16})
    assert counted(by_user) == {"count": 16, "errno": 11}
    forks = sandboxes.run(["/probe/consume", "processes"], {"limits.pids": 60, "limits.threads": 16})
    assert counted(forks)["count"] == 16


def test_fork_bomb_that_never_ends(sandboxes: Sandboxes) -> None:
    """A bomb that outlives its first process is gone when the run is."""
    bomb = "import os\nos.fork()\nwhile True:\n try: os.fork()\n except OSError: pass"
    result = sandboxes.run(["python3", "-c", bomb], {"limits.pids": 32, "limits.threads": 32}, timeout=1.5)
    assert result.exit_status == 124
    assert result.usage.wall_s < 10


@pytest.mark.requires("cgroup:cpu")
def test_cpu_quota(sandboxes: Sandboxes) -> None:
    """Two spinning processes get half a CPU of time together when the policy says 0.5."""
    code = f"import os\nos.fork()\n{SPIN}"
    result = sandboxes.run(["python3", "-c", code], {"limits.cpus": 0.5})
    assert result.exit_status == 0
    assert result.usage.cpu_s is not None
    # Upwards, a period may be begun once more than the wall clock has room for; downwards, others run here too.
    # In an emulated machine runc's own start in the group is a matter of some tenths of a second, too.
    start_s = 0.5 if "RINGFENCE_TEST_SLOW" in os.environ else 0
    assert 0.15 * result.usage.wall_s < result.usage.cpu_s < 0.65 * result.usage.wall_s + start_s


@pytest.mark.requires("cgroup:cpuset", "two-cpus")
def test_cpuset(sandboxes: Sandboxes) -> None:
    """The job may run on the CPUs of the list alone, and cannot widen that."""
    code = """
def widen():
    try: os.sched_setaffinity(0, range(os.cpu_count()))
    except OSError: pass
    return sorted(os.sched_getaffinity(0))
text = open('/proc/self/status').read()
out([text.partition('Cpus_allowed_list:')[2].split()[0], widen()])
"""
    assert sandboxes.ask(code, {"limits.cpuset": "1"}) == ["1", [1]]
    assert sandboxes.ask(code)[1] == list(range(os.cpu_count() or 1))  # type: ignore[index,call-overload]


def test_cpu_that_is_not_there(sandboxes: Sandboxes) -> None:
    """A CPU that this host lacks is refused, by the field's name."""
    with pytest.raises(NotEnforceable, match=r"limits\.cpuset"):
        sandboxes.run(["true"], {"limits.cpuset": "900"})


def test_stack(sandboxes: Sandboxes) -> None:
    """A main thread has the stack of the policy and no more: then SIGSEGV."""
    limits = {"limits.stack": "1MiB"}
    assert sandboxes.run(["/probe/consume", "stack", str(512 * KIB)], limits).exit_status == 0
    beyond = sandboxes.run(["/probe/consume", "stack", str(2 * MIB)], limits)
    assert (beyond.exit_status, beyond.signal) == (128 + signal.SIGSEGV, signal.SIGSEGV)


def test_open_files(sandboxes: Sandboxes) -> None:
    """Exactly N descriptors can be open."""
    result = sandboxes.run(["/probe/consume", "files"], {"limits.open_files": 37})
    assert counted(result) == {"count": 37, "errno": 24}


def test_limits_cannot_be_raised(sandboxes: Sandboxes) -> None:
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
    assert set(map(tuple, sandboxes.ask(code).values())) == {(True, "refused")}  # type: ignore[arg-type]


def test_file_size(sandboxes: Sandboxes) -> None:
    """A file ends at the limit: SIGXFSZ, or EFBIG for whoever ignores that."""
    limits = {"limits.file_size": "1MiB"}
    assert sandboxes.ask(FILL + "out(fill('/tmp/x'))", limits) == [MIB, 27]
    result = sandboxes.run(["sh", "-c", "exec head -c 2000000 /dev/zero > /tmp/x"], limits)
    assert (result.exit_status, result.signal) == (128 + signal.SIGXFSZ, signal.SIGXFSZ)


def test_disk(sandboxes: Sandboxes) -> None:
    """The work directory, /tmp and /dev/shm take what the policy gives to each: then ENOSPC."""
    limits = {"limits.disk": "3MiB", "filesystem.tmp": "2MiB", "limits.shm": "1MiB"}
    code = FILL + "out([fill('/work/x'), fill('/tmp/x'), fill('/dev/shm/x')])"
    assert sandboxes.ask(code, limits) == [[3 * MIB, 28], [2 * MIB, 28], [MIB, 28]]


def test_inodes(sandboxes: Sandboxes) -> None:
    """Files run out at the limit, of which the directory itself takes one."""
    for directory in ("/work", "/tmp", "/dev/shm"):
        result = sandboxes.run(["/probe/consume", "inodes", directory], {"limits.inodes": 40})
        assert counted(result) == {"count": 39, "errno": 28}
    writable = {"limits.inodes": 40, "filesystem.root": "writable"}
    result = sandboxes.run(["/probe/consume", "inodes", "/work"], writable)
    assert 20 <= counted(result)["count"] < 40  # type: ignore[operator] # overlayfs keeps a few for itself


def test_dev_itself_is_no_place_to_write(sandboxes: Sandboxes) -> None:
    """/dev is bounded as well, even for root of the sandbox, whose it is."""
    written, error = sandboxes.ask(FILL + "out(fill('/dev/x'))", {"user": "0:0"})
    assert error == 28
    assert written <= 64 * KIB


def test_no_core(sandboxes: Sandboxes) -> None:
    """A crash leaves no core file."""
    assert counted(sandboxes.run(["/probe/consume", "crash"])) == {"core": 0, "errno": signal.SIGABRT}
    result = sandboxes.run(["sh", "-c", "/probe/consume crash > /dev/null; ls -A /work /tmp"])
    assert result.stdout == b"/tmp:\n\n/work:\n"


@pytest.fixture
def on_disk() -> Path:
    """A place on the disk that the limits are about."""
    from ringfence.linux.paths import state_dir

    if os.stat(state_dir()).st_dev != os.stat("/tmp").st_dev:
        pytest.skip("the state directory and /tmp are on different disks")
    return Path("/tmp")


READ = """
import mmap, time
def read(path, piece, pieces):
    fd = os.open(path, os.O_RDONLY | os.O_DIRECT)
    room = mmap.mmap(-1, piece)
    start = time.monotonic()
    for _ in range(pieces): os.preadv(fd, [room], (_ * piece))
    return time.monotonic() - start
"""


@pytest.mark.requires("cgroup:io")
def test_disk_reads_are_throttled(sandboxes: Sandboxes, on_disk: Path, shared: Path) -> None:
    """Bytes and operations per second from the disk stay at the policy's rates."""
    (shared / "data").write_bytes(os.urandom(MIB) * 8)
    os.sync()
    mount = {"filesystem.mounts": [bind(shared, "/data")]}
    whole, small = "out(read('/data/data', 1 << 20, 8))", "out(read('/data/data', 4096, 150))"
    free = {"limits.io.read": "1GiB/s", "limits.io.read_iops": 1_000_000, **mount}
    control = sandboxes.ask(READ + whole, free)
    slow = sandboxes.ask(READ + whole, {"limits.io.read": "5MiB/s", **mount})
    assert float(slow) > 1.2 > float(control)  # type: ignore[arg-type]
    operations = sandboxes.ask(READ + small, {"limits.io.read_iops": 100, **mount})
    assert float(operations) > 1.2  # type: ignore[arg-type]


OTHER_DISK = """
import sys, ringfence
from ringfence.errors import NotEnforceable
fields = {{'limits.io.read': '5MiB/s', 'filesystem.mounts': [{mount!r}]}}
try: result = ringfence.run(['python3', '-c', {read!r}], runtime={runtime!r}, overrides=fields)
except NotEnforceable: print(1000)
else: print(float(result.stdout))
"""


@pytest.mark.requires("cgroup:io")
@pytest.mark.skipif(
    not (shutil.which("mkfs.ext4") and os.path.exists("/dev/loop-control")), reason="no loop devices"
)
def test_other_disk_of_a_mount_is_throttled_too(sandboxes: Sandboxes, shared: Path) -> None:
    """A mount from another block device is throttled, or refused; never read at full speed under a proof that holds."""
    image, point = shared / "disk", shared / "point"
    point.mkdir()
    with open(image, "wb") as file:
        file.truncate(32 * MIB)
    subprocess.run(["mkfs.ext4", "-q", "-F", image], check=True)
    fill = (
        f'mount -o loop {image} {point} && head -c {8 * MIB} /dev/urandom > {point}/data && sync && exec "$@"'
    )
    read = f"import os\n{READ}\nprint(read('/data/data', 1 << 20, 8))"
    code = OTHER_DISK.format(mount=bind(point, "/data"), read=read, runtime=sandboxes.runtime)
    apart = ["unshare", "--mount", "--propagation", "private", "sh", "-c", fill, "sh"]
    done = subprocess.run(
        [*apart, sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True
    )
    assert float(done.stdout) > 1.2


@pytest.mark.requires("cgroup2", "cgroup:io")
def test_disk_writes_are_throttled(sandboxes: Sandboxes, on_disk: Path, shared: Path) -> None:
    """What goes to the disk by way of the page cache is throttled as well, for cgroup v2 knows whose it is."""
    # A new file each time: the kernel takes a file's writes for those of the group that wrote it before, for a while.
    code = """
import time
start = time.monotonic()
with open(f'/data/{time.time_ns()}', 'wb', buffering=0) as file:
    for _ in range(8): file.write(os.urandom(1 << 20))
    os.fsync(file.fileno())
out(time.monotonic() - start)
"""
    fields = {"filesystem.mounts": [bind(shared, "/data", "rw")]}
    control = sandboxes.ask(code, {"limits.io.write": "1GiB/s", **fields}, allow_unenforced=())
    slow = sandboxes.ask(code, {"limits.io.write": "2MiB/s", **fields}, allow_unenforced=())
    assert float(slow) > 3 > float(control)  # type: ignore[arg-type]


@pytest.mark.requires("cgroup1:blkio")
def test_disk_writes_that_nothing_throttles_are_refused(sandboxes: Sandboxes, shared: Path) -> None:
    """With a writable mount, cgroup v1 cannot keep `limits.io.write`: refused by name unless accepted."""
    fields = {"filesystem.mounts": [bind(shared, "/data", "rw")]}
    with pytest.raises(NotEnforceable, match=r"limits\.io\.write"):
        sandboxes.run(["true"], fields, allow_unenforced=())
    result = sandboxes.run(["true"], fields)
    assert result.exit_status == 0
    assert result.proof is not None
    assert {"limits.io.write", "limits.io.write_iops"} <= set(result.proof["unenforced"])


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
def test_time(sandboxes: Sandboxes, how: str) -> None:
    """A job that does not end by itself is ended: 124, soon after its time, whatever state it is in."""
    start = time.monotonic()
    result = sandboxes.run(["python3", "-c", STUBBORN[how]], timeout=0.6)
    took = time.monotonic() - start
    assert (result.exit_status, result.timed_out) == (124, True)
    assert 0.6 <= result.usage.wall_s < 3
    assert took < 6


def test_end_of_the_first_process_is_the_end(sandboxes: Sandboxes) -> None:
    """Processes that a job leaves behind do not keep the sandbox, though they hold its output open."""
    code = "import os, time\nif os.fork() == 0:\n os.setsid()\n time.sleep(60)\nos.write(1, b'done')\nos._exit(3)"
    result = sandboxes.run(["python3", "-c", code])
    assert (result.exit_status, result.stdout) == (3, b"done")
    assert result.usage.wall_s < 5


def test_output(sandboxes: Sandboxes) -> None:
    """Of a flood as much is kept as the policy says, of both streams together; the job is not disturbed."""
    code = "import os\nfor _ in range(64): os.write(1, bytes(65536)), os.write(2, bytes(65536))\nraise SystemExit(5)"
    result = sandboxes.run(["python3", "-c", code], {"limits.output": "100KiB"})
    assert len(result.stdout) + len(result.stderr) == 100 * KIB
    assert (result.exit_status, result.output_truncated) == (5, True)
    whole = sandboxes.run(["head", "-c", "102400", "/dev/zero"], {"limits.output": "100KiB"})
    assert (len(whole.stdout), whole.output_truncated) == (100 * KIB, False)


def test_sysctls(sandboxes: Sandboxes) -> None:
    """Parameters of the sandbox's own namespaces are set there, and the host's stay what they are."""
    wanted = {"kernel.msgmax": "9000", "kernel.shm_rmid_forced": "1", "fs.mqueue.msg_max": "11"}
    # Not net.core: older kernels, 6.1 among them, show none of it in a network namespace of a user namespace.
    wanted["net.ipv4.ip_default_ttl"] = "33"
    files = {name: Path("/proc/sys") / name.replace(".", "/") for name in wanted}
    before = {name: file.read_text() for name, file in files.items()}
    code = f"""
names = {list(wanted)!r}
out({{name: open('/proc/sys/' + name.replace('.', '/')).read().strip() for name in names}})
"""
    assert sandboxes.ask(code, {"sysctls": wanted}) == wanted
    assert {name: file.read_text() for name, file in files.items()} == before


FOREIGN = (
    "kernel.core_pattern",
    "vm.overcommit_memory",
    "kernel.hostname",
    "fs.file-max",
    "dev.tty.legacy_tiocsti",
)


@pytest.mark.parametrize("name", FOREIGN)
def test_sysctls_of_the_host_are_refused(sandboxes: Sandboxes, name: str) -> None:
    """What every sandbox does not have for itself is no policy."""
    with pytest.raises(PolicyError, match="belongs to the whole host"):
        sandboxes.run(["true"], {"sysctls": {name: "1"}})


def test_sysctl_that_only_the_host_has(sandboxes: Sandboxes) -> None:
    """net.core.rmem_max is not in the sandbox's namespace: an error, and the host's value stays."""
    file = Path("/proc/sys/net/core/rmem_max")
    before = file.read_text()
    with pytest.raises(ringfence.RingfenceError):
        sandboxes.run(["true"], {"sysctls": {"net.core.rmem_max": str(int(before) + 1)}})
    assert file.read_text() == before
