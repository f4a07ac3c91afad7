"""Who a job of the linux tier is and what it sees: asked inside, and compared with what the host's kernel says."""

import os
import re
import signal
import socket
import time
from pathlib import Path

import pytest

from boxes import Held, Plain, Sandboxes
from ringfence.plan.config import MASKED, READ_ONLY
from ringfence.runtime import base
from ringfence.runtime.spawn import spawn

pytestmark = pytest.mark.requires("root", "compiler")

SPACES = ("user", "pid", "mnt", "net", "ipc", "uts", "cgroup")
# One run answers most of the questions.
LOOK = """
import socket, stat
def text(path):
    try:
        with open(path, errors='surrogateescape') as file: return file.read()
    except OSError as error:
        return f'!{error.errno}'
fds = {}
for name in os.listdir('/proc/self/fd'):
    try: fds[name] = os.readlink('/proc/self/fd/' + name)
    except OSError: pass  # that of the listing itself
def loopback():
    with socket.socket() as server, socket.socket() as client:
        server.bind(('127.0.0.1', 0))
        server.listen()
        client.settimeout(5)
        client.connect(server.getsockname())
        return client.getpeername()[0]
def refused(address, port):
    with socket.socket() as client:
        client.settimeout(5)
        try: client.connect((address, port))
        except OSError as error: return error.errno
def write(path):
    try: os.close(os.open(path, os.O_WRONLY | os.O_CREAT, 0o600))
    except OSError as error: return error.errno
def kind(path):
    mode = os.lstat(path).st_mode
    return oct(stat.S_IFMT(mode)), os.lstat(path).st_rdev
answer = {
    'ids': [os.getresuid(), os.getresgid(), os.getgroups()],
    'status': dict(line.split(':\\t', 1) for line in text('/proc/self/status').splitlines() if ':\\t' in line),
    'uid_map': text('/proc/self/uid_map').split(),
    'gid_map': text('/proc/self/gid_map').split(),
    'spaces': {name: os.readlink('/proc/self/ns/' + name) for name in SPACES},
    'host name': socket.gethostname(),
    'interfaces': [name for _, name in socket.if_nameindex()],
    'loopback': loopback(),
    'refused': [refused('192.0.2.1', 80), refused('169.254.169.254', 80), refused('8.8.8.8', 53)],
    'routes': text('/proc/net/route').splitlines()[1:] + [
        line for line in text('/proc/net/ipv6_route').splitlines() if not line.endswith(' lo')],
    'sockets': text('/proc/net/unix').splitlines()[1:],
    'mountinfo': text('/proc/self/mountinfo'),
    'sys': os.listdir('/sys'),
    'fds': fds,
    'cwd': os.getcwd(),
    'dev': {name: kind('/dev/' + name) for name in os.listdir('/dev')},
    'masked': {path: [] if os.path.isdir(path) and not os.listdir(path) else text(path)
               for path in MASKED if os.path.lexists(path)},
    'read only': {path: write(path + '/x' if os.path.isdir(path) else path)
                  for path in READ_ONLY if os.path.lexists(path)},
    'sysctl': write('/proc/sys/kernel/shmmax'),
    'write': {path: write(path) for path in ('/x', '/etc/x', '/usr/x', '/root/x', '/var/tmp/x', '/dev/x', '/proc/x')},
    'pids': sorted(int(name) for name in os.listdir('/proc') if name.isdigit()),
    'environ': dict(os.environ),
    'cgroup': text('/proc/self/cgroup'),
    'umask': os.umask(0),
    'signals': [text('/proc/self/status').partition(name + ':')[2].split()[0] for name in ('SigBlk', 'SigPnd')],
    'session': os.getsid(0) == os.getpid(),
}
out(answer)
"""


@pytest.fixture(scope="module")
def seen(sandboxes: Sandboxes) -> dict[str, Plain]:
    os.environ["RINGFENCE_TEST_SECRET"] = "not for jobs"
    try:
        return sandboxes.ask(f"SPACES, MASKED, READ_ONLY = {SPACES!r}, {MASKED!r}, {READ_ONLY!r}\n" + LOOK)
    finally:
        del os.environ["RINGFENCE_TEST_SECRET"]


@pytest.fixture(scope="module")
def pair(sandboxes: Sandboxes) -> tuple[dict[str, str], dict[str, str]]:
    """What /proc/PID/status says on the host of the jobs of two sandboxes that live at the same time."""
    with sandboxes.held("hold(1)") as one, sandboxes.held("hold(2)") as other:
        return host_view(one), host_view(other)


def host_view(held: Held) -> dict[str, str]:
    """Find the job's process by the mount that only it has."""
    for process in Path("/proc").glob("[0-9]*"):
        try:
            if (
                str(held.directory.stat().st_ino) in _held_inodes(process)
                and process.joinpath("comm").read_text() == "python3\n"
            ):
                text = (process / "status").read_text()
                spaces = {name: os.readlink(process / "ns" / name) for name in SPACES}
                return dict(line.split(":\t", 1) for line in text.splitlines()) | spaces
        except OSError:
            continue
    raise AssertionError("the job is not among the host's processes")


def _held_inodes(process: Path) -> list[str]:
    if not any(line.split(" ")[4] == "/held" for line in (process / "mountinfo").read_text().splitlines()):
        return []
    return [str(os.stat(process / "root" / "held").st_ino)]


def test_job_is_user_1000_and_nobody_else(seen: dict[str, Plain]) -> None:
    """Real, effective and saved ids are 1000, without supplementary groups."""
    assert seen["ids"] == [[1000] * 3, [1000] * 3, []]


def test_job_has_no_capability_in_any_set(seen: dict[str, Plain]) -> None:
    """All five sets are empty, the bounding set too."""
    status = seen["status"]
    assert {status[f"Cap{name}"] for name in ("Inh", "Prm", "Eff", "Bnd", "Amb")} == {"0" * 16}  # type: ignore[index,call-overload]


def test_job_cannot_gain_privileges_and_is_filtered(seen: dict[str, Plain]) -> None:
    """NoNewPrivs is 1, Seccomp is 2 (filter)."""
    status = seen["status"]
    assert [status[name] for name in ("NoNewPrivs", "Seccomp")] == ["1", "2"]  # type: ignore[index,call-overload]


def test_ids_are_mapped_to_one_range_of_65536(seen: dict[str, Plain]) -> None:
    """The maps have one line each, from 0, to the same host range."""
    first, host, size = seen["uid_map"]  # type: ignore[misc]
    assert (first, size) == ("0", "65536")
    assert 0x70000000 <= int(host) < 0x80000000
    assert seen["gid_map"] == seen["uid_map"]


def test_two_sandboxes_have_disjoint_ids(pair: tuple[dict[str, str], dict[str, str]]) -> None:
    """On the host, jobs of two sandboxes are different users, from ranges that do not overlap."""
    ids = [{int(word) for word in view["Uid"].split() + view["Gid"].split()} for view in pair]
    assert [len(found) for found in ids] == [1, 1]
    one, other = (found.pop() for found in ids)
    assert abs(one - other) >= 65536
    assert min(one, other) >= 0x70000000


def test_two_sandboxes_share_no_namespace(pair: tuple[dict[str, str], dict[str, str]]) -> None:
    """Each sandbox has all seven namespaces for itself."""
    assert [name for name in SPACES if pair[0][name] == pair[1][name]] == []


def test_namespaces_are_not_the_hosts(seen: dict[str, Plain]) -> None:
    """All seven differ from those of this process."""
    spaces = seen["spaces"]
    assert [name for name in SPACES if spaces[name] == os.readlink(f"/proc/self/ns/{name}")] == []  # type: ignore[index,call-overload]


def test_host_name_is_the_sandboxes_own(seen: dict[str, Plain]) -> None:
    """The name is the sandbox's id, and not the host's."""
    assert re.fullmatch("[0-9a-f]{12}", str(seen["host name"]))
    assert seen["host name"] != socket.gethostname()


def test_network_is_loopback_alone_and_works(seen: dict[str, Plain]) -> None:
    """Only lo, which is up; no route leads anywhere."""
    assert seen["interfaces"] == ["lo"]
    assert seen["loopback"] == "127.0.0.1"
    assert seen["routes"] == []
    assert set(seen["refused"]) == {101}  # type: ignore[arg-type] # ENETUNREACH
    assert seen["sockets"] == []


def test_no_sysfs(seen: dict[str, Plain]) -> None:
    """/sys is an empty directory."""
    assert seen["sys"] == []


def test_sysfs_is_read_only_if_asked_for(sandboxes: Sandboxes) -> None:
    """`filesystem.sysfs: true` shows it read-only, without what is masked."""
    code = """
def write(path):
    try: os.close(os.open(path, os.O_WRONLY))
    except OSError as error: return error.errno
out({'there': os.path.isdir('/sys/kernel'), 'write': write('/sys/kernel/mm/ksm/run'),
     'cgroup': os.listdir('/sys/fs/cgroup') if os.path.isdir('/sys/fs/cgroup') else [],
     'firmware': os.listdir('/sys/firmware')})
"""
    found = sandboxes.ask(code, {"filesystem.sysfs": True})
    assert found["there"] is True
    assert found["write"] in (13, 30)  # EACCES, EROFS
    assert found["cgroup"] == []
    assert found["firmware"] == []


def test_mountinfo_names_no_host_path(seen: dict[str, Plain], home: Path) -> None:
    """Neither where the image is, nor where Ringfence or this repository lives."""
    text = str(seen["mountinfo"])
    hidden = ["/var/lib", "/home", "/root", "/run", str(home), str(Path(__file__).parents[2])]
    lines = [line for line in text.splitlines() if " /probe " not in line]  # the mount that the tests ask for
    assert [path for path in hidden for line in lines if path in line] == []


def test_every_mount_is_nosuid_or_a_part_of_proc_or_dev(seen: dict[str, Plain]) -> None:
    """Every place where a file could be put or lies in an image is nosuid and nodev."""
    for line in str(seen["mountinfo"]).splitlines():
        target, flags = line.split(" ")[4:6]
        if not target.startswith(("/proc/", "/dev/")) and target != "/dev":
            assert {"nosuid", "nodev"} <= set(flags.split(",")), line


def test_descriptors_are_the_standard_streams(seen: dict[str, Plain]) -> None:
    """A job starts with 0, 1 and 2, all of them pipes, and nothing else."""
    assert set(seen["fds"]) == {"0", "1", "2"}  # type: ignore[arg-type]
    assert all(str(link).startswith("pipe:[") for link in seen["fds"].values())  # type: ignore[union-attr]


def test_working_directory_is_in_the_root(seen: dict[str, Plain]) -> None:
    """It starts in /work, with a clean state: a session of its own, no signal blocked, umask 022."""
    assert seen["cwd"] == "/work"
    assert seen["session"] is True
    assert seen["signals"] == ["0" * 16, "0" * 16]
    assert seen["umask"] == 0o022


def test_dev_has_the_harmless_nodes_only(seen: dict[str, Plain]) -> None:
    """null, zero, full, random, urandom and tty, with their own numbers; the rest are links and mounts."""
    dev = {name: tuple(kind) for name, kind in seen["dev"].items()}  # type: ignore[union-attr,arg-type]
    nodes = {
        "null": (1, 3),
        "zero": (1, 5),
        "full": (1, 7),
        "random": (1, 8),
        "urandom": (1, 9),
        "tty": (5, 0),
    }
    expected = {name: ("0o20000", os.makedev(*number)) for name, number in nodes.items()}
    expected |= dict.fromkeys(("fd", "stdin", "stdout", "stderr", "ptmx"), ("0o120000", 0))
    expected |= dict.fromkeys(("pts", "shm"), ("0o40000", 0))
    dev.pop("core", None)  # crun's link to /proc/kcore, which is masked
    assert dev == expected


def test_masked_paths_are_empty(seen: dict[str, Plain]) -> None:
    """Files read as empty, directories list nothing."""
    masked = seen["masked"]
    assert {"/proc/keys", "/proc/kallsyms", "/proc/timer_list"} <= set(masked)  # type: ignore[arg-type]
    assert [path for path, content in masked.items() if content] == []  # type: ignore[union-attr]


def test_nothing_of_the_kernel_can_be_written(seen: dict[str, Plain]) -> None:
    """/proc/sys and its like are mounted read-only, not only protected by their modes."""
    read_only = seen["read only"]
    assert "/proc/sys" in read_only  # type: ignore[operator]
    assert set(read_only.values()) <= {30, 13, 2}  # type: ignore[union-attr] # EROFS; EACCES, ENOENT: no such name to create
    assert seen["sysctl"] in (13, 30)


def test_root_of_the_sandbox_cannot_write_sysctls_either(sandboxes: Sandboxes) -> None:
    """Even the owner of the namespaces finds /proc/sys read-only, or not his."""
    code = """
def write(path):
    try: os.close(os.open(path, os.O_WRONLY))
    except OSError as error: return error.errno
out([write('/proc/sys/' + name) for name in ('kernel/shmmax', 'net/core/somaxconn', 'kernel/core_pattern')])
"""
    found = sandboxes.ask(code, {"user": "0:0"})
    assert found[0] == 30  # type: ignore[index,call-overload] # his own file, so EROFS
    assert set(found) <= {13, 30}


def test_root_is_read_only(seen: dict[str, Plain]) -> None:
    """Nothing can be made outside of the writable places."""
    assert set(seen["write"].values()) <= {30, 13, 2}  # type: ignore[union-attr]
    assert seen["write"]["/usr/x"] == 30  # type: ignore[index,call-overload]


def test_only_processes_of_the_sandbox_are_visible(seen: dict[str, Plain]) -> None:
    """Process 1 is the agent; the job is the only other one."""
    pids = seen["pids"]
    assert pids[0] == 1  # type: ignore[index]
    assert len(pids) == 2  # type: ignore[arg-type]


def test_environment_is_the_images_and_nothing_of_the_callers(seen: dict[str, Plain]) -> None:
    """Nothing is inherited that was not named."""
    assert set(seen["environ"]) - {"LC_CTYPE"} == {"HOME", "LANG", "PATH"}  # type: ignore[arg-type] # Python's own
    assert seen["environ"]["HOME"] == "/work"  # type: ignore[index,call-overload]


def test_cgroup_paths_show_nothing_of_the_host(seen: dict[str, Plain]) -> None:
    """In its cgroup namespace every path is /."""
    assert {line.rpartition(":")[2] for line in str(seen["cgroup"]).splitlines()} == {"/"}


def test_ids_can_be_chosen_inside(sandboxes: Sandboxes) -> None:
    """`user: 123:456` is that inside, and still of the sandbox's own range outside."""
    with sandboxes.held(
        "hold([os.getresuid(), os.getresgid(), os.getgroups()])", {"user": "123:456"}
    ) as held:
        view = host_view(held)
    assert held.said == [[123] * 3, [456] * 3, []]
    assert int(view["Uid"].split()[0]) % 65536 == 123
    assert int(view["Uid"].split()[0]) >= 0x70000000


def test_standard_streams_can_be_opened_by_name(sandboxes: Sandboxes) -> None:
    """/dev/stdin, /dev/stdout and /dev/stderr work, as shell scripts expect."""
    result = sandboxes.run(
        ["sh", "-c", "cat < /dev/stdin; echo o > /dev/stdout; echo e > /dev/stderr"], stdin=b"i\n"
    )
    assert (result.stdout, result.stderr, result.exit_status) == (b"i\no\n", b"e\n", 0)


def test_program_without_a_path_runs_under_the_same_rules(sandboxes: Sandboxes) -> None:
    """Executing anonymous memory is allowed, and gains nothing."""
    result = sandboxes.run(["/probe/consume", "memfd"])
    lines = dict(line.split(":\t") for line in result.stdout.decode().splitlines()[1:])
    assert result.stdout.startswith(b"uid 1000 euid 1000 gid 1000 egid 1000\n")
    assert lines["CapBnd"] == lines["CapEff"] == "0" * 16
    assert (lines["NoNewPrivs"], lines["Seccomp"]) == ("1", "2")


def test_bytes_pass_unchanged(sandboxes: Sandboxes) -> None:
    """Every byte value, in input, arguments, environment and output."""
    every = bytes(range(256))
    echo = "import os, sys\nd = sys.stdin.buffer.read()\nos.write(1, d + os.fsencode(sys.argv[1])); os.write(2, d)"
    result = sandboxes.run(["python3", "-c", echo, bytes(range(1, 256))], stdin=every * 300)
    assert result.stdout == every * 300 + bytes(range(1, 256))
    assert result.stderr == every * 300


@pytest.mark.parametrize(
    ("argv", "status"),
    [(["/nonexistent"], 127), (["nonexistent"], 127), (["/etc/passwd"], 126), (["/usr"], 126), ([""], 127)],
)
def test_command_that_cannot_be_run(sandboxes: Sandboxes, argv: list[str], status: int) -> None:
    """Not found is 127, not executable or a directory is 126, with one line that names it."""
    result = sandboxes.run(argv)
    assert result.exit_status == status
    assert result.stdout == b""
    assert result.stderr.startswith(b"ringfence: ")
    assert result.stderr.count(b"\n") == 1


def test_status_and_signal_of_the_job(sandboxes: Sandboxes) -> None:
    """The job's own status; 128 + N when signal N killed it."""
    assert sandboxes.run(["sh", "-c", "exit 7"]).exit_status == 7
    killed = sandboxes.run(["sh", "-c", "kill -TERM $$"])
    assert (killed.exit_status, killed.signal) == (143, 15)


def test_mount_of_the_test_is_the_only_host_path(seen: dict[str, Plain], probes: Path) -> None:
    """The one bind mount shows its own path below the file system's root and no other."""
    line = next(line for line in str(seen["mountinfo"]).splitlines() if " /probe " in line)
    assert line.split(" ")[3].endswith(probes.name)


def test_a_runtime_that_never_ends_is_killed(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With what it started, in bounded time: a start that has failed must not hang over it."""
    monkeypatch.setattr(base, "PATIENCE_S", 0.3)
    starting = spawn(["/bin/sh", "-c", "sleep 67 & echo $!; sleep 67"], (), runtime_dir=str(home))
    started = time.monotonic()
    assert starting.wait() == -signal.SIGKILL
    assert 0.25 < time.monotonic() - started < 5
    pid = int(starting.words())
    starting.release()
    until_gone = time.monotonic() + 5
    while os.path.exists(f"/proc/{pid}") and "(sleep) Z" not in Path(f"/proc/{pid}/stat").read_text():
        assert time.monotonic() < until_gone
        time.sleep(0.01)


def test_the_last_sandbox_takes_the_cgroup_above_it_along(sandboxes: Sandboxes) -> None:
    """Nothing of ours is in the cgroup hierarchies when no sandbox is: not even an empty group."""
    sandboxes.run(["true"])
    ranges = Path("/run/ringfence/ranges")
    if not any(path.name.isdigit() for path in ranges.iterdir()):  # else somebody else's sandbox lives
        assert list(Path("/sys/fs/cgroup").glob("*/ringfence")) == []
