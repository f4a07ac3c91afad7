"""Attacks from a job at the gVisor tier: its kernel is not the host's, and there is nothing of the host's in its reach.

What the same programs do at the linux tier, or outside of any sandbox, is the control: it shows that there is
something to be seen or got at.
"""

import errno
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from test_agent_under_attack import LIMITS, PRY
from test_neighbours import LEAVE, NOTHING, SEEK, SET_UP
from test_system_calls import INSIDE, outcomes
from test_ways_out import KERNEL_FILES

from boxes import USER, Plain, Sandboxes, bind
from detached import Cli, processes, until
from ringfence.plan.seccomp import seccomp_for

pytestmark = pytest.mark.requires("root", "compiler", "x86_64", "runsc")

Outside = Callable[..., "subprocess.CompletedProcess[bytes]"]
EPERM, ENOSYS, EINVAL = str(errno.EPERM), str(errno.ENOSYS), str(errno.EINVAL)


@pytest.fixture(scope="module")
def plain(home: Path, probes: Path) -> Sandboxes:
    """The control: sandboxes of the linux tier."""
    return Sandboxes("crun", probes)


# The job's kernel and the host's

MARK, PORT = "ringfence-marked", 47119
LEAVE_MARKS = f"""
import ctypes, socket
ctypes.CDLL(None).prctl(15, b{MARK!r})  # PR_SET_NAME
memory = os.memfd_create({MARK!r})
name = socket.socket(socket.AF_UNIX)
name.bind('\\0{MARK}')
name.listen()
port = socket.socket()
port.bind(('127.0.0.1', {PORT}))
port.listen()
hold([os.getpid(), os.uname().release])
"""


def contents(pid: int, name: str) -> str:
    try:
        return Path(f"/proc/{pid}/{name}").read_text(errors="replace")
    except OSError:
        return ""


def links(pid: int, name: str) -> list[str]:
    try:
        return [os.readlink(f"/proc/{pid}/{name}/{link}") for link in os.listdir(f"/proc/{pid}/{name}")]
    except OSError:
        return []


def marks(sandbox: str) -> set[str]:
    """Return by what the host sees anything that the job has made or is called."""
    found = set()
    for pid in processes(sandbox):
        found |= {
            name for name in ("cmdline", "environ", "comm", "net/unix") if MARK[:15] in contents(pid, name)
        }
        found |= {"net/tcp"} if f":{PORT:04X} " in contents(pid, "net/tcp") else set()
        found |= {"fd"} if any(MARK in link for link in links(pid, "fd")) else set()
    return found


def held_marks(tier: Sandboxes, home: Path) -> tuple[set[str], set[str], Plain]:
    """Return (what is seen of the job, the programs of its sandbox, what the job has seen itself)."""
    with tier.held(LEAVE_MARKS, env={"MARK": MARK}) as held:
        (sandbox,) = os.listdir(home / "sandboxes")
        programs = {os.path.basename(os.readlink(f"/proc/{pid}/exe")) for pid in processes(sandbox)}
        return marks(sandbox), programs, held.said  # type: ignore[return-value]


def test_a_job_is_nothing_to_the_host(guests: Sandboxes, plain: Sandboxes, home: Path) -> None:
    """Its name, words, memory, sockets and ports exist in gVisor's kernel alone; at the linux tier, on the host."""
    seen, programs, said = held_marks(plain, home)
    assert seen == {"cmdline", "environ", "comm", "net/unix", "net/tcp", "fd"}
    assert "python3.11" in programs or any(name.startswith("python3") for name in programs)
    assert said[1] == os.uname().release  # type: ignore[index,call-overload]
    seen, programs, said = held_marks(guests, home)
    assert seen == set()
    assert programs == {".ringfence", "runsc"}
    assert said[1] != os.uname().release  # type: ignore[index,call-overload]


@contextmanager
def watched(home: Path) -> Iterator[set[str]]:
    """Collect, from beside, the programs that processes of our sandboxes execute."""
    over, seen = threading.Event(), set[str]()

    def look() -> None:
        while not over.wait(0.005):
            for sandbox in (home / "sandboxes").glob("[0-9a-f]*"):
                for pid in processes(sandbox.name):
                    try:
                        seen.add(os.path.basename(os.readlink(f"/proc/{pid}/exe")))
                    except OSError:  # it has just ended
                        continue

    thread = threading.Thread(target=look)
    thread.start()
    try:
        yield seen
    finally:
        over.set()
        thread.join()


def test_every_system_call_by_its_number(guests: Sandboxes, plain: Sandboxes, home: Path) -> None:
    """All of them, made by children: none brings gVisor's kernel down, and on the host no process of theirs appears."""
    with watched(home) as control:
        assert plain.run(["/probe/everycall"]).exit_status == 0
    assert "everycall" in control
    with watched(home) as seen:
        result = guests.run(["/probe/everycall"])
    assert result.exit_status == 0, result.stderr
    counts = json.loads(result.stdout)
    assert sum(counts.values()) == 470
    assert counts["denied"] > 50  # the filter was there
    assert (
        {".ringfence", "runsc"} <= seen <= {".ringfence", "runsc", "crun", ""}
    )  # a program that ends has no name


def test_kernel_of_its_own(guests: Sandboxes) -> None:
    """What the kernel says of itself is gVisor's word, and not the host's."""
    code = """
def text(path):
    try: return open(path).read().strip()
    except OSError as error: return error.errno
out({'uname': list(os.uname())[2:4], **{path: text(path) for path in PATHS}})
"""
    paths = [
        "/proc/version",
        "/proc/cmdline",
        "/proc/sys/kernel/random/boot_id",
        "/proc/kallsyms",
        "/proc/kmsg",
    ]
    found = guests.ask(f"PATHS = {paths!r}\n{code}")
    assert found["uname"] != list(os.uname())[2:4]
    assert found["/proc/version"] != Path("/proc/version").read_text().strip()
    assert "gvisor" in str(found["/proc/cmdline"])
    assert found[paths[2]] != Path(paths[2]).read_text().strip()
    assert [found[path] for path in paths[3:]] == [errno.ENOENT] * 2


def test_nothing_of_the_host_is_shown(guests: Sandboxes, shared: Path) -> None:
    """No path, device, process or other name of the host's is in what the job may read of its surroundings."""
    code = """
text = ''.join(open(f'/proc/self/{name}').read() for name in ('mountinfo', 'mounts', 'cgroup', 'uid_map'))
out({'text': text, 'pids': [int(name) for name in os.listdir('/proc') if name.isdigit()],
     'sys': os.listdir('/sys'), 'host': os.uname().nodename,
     'disks': [name for name in ('/proc/partitions', '/proc/diskstats', '/proc/swaps') if os.path.exists(name)]})
"""
    found = guests.ask(code, {"filesystem.mounts": [bind(shared, "/data")]})
    for word in (str(shared), "/var/lib", "/run/ringfence", "overlay", "lowerdir", "ext4", "/dev/vda"):
        assert word.encode() not in str(found["text"]).replace("overlayfs_stale_read", "").encode(), word
    assert found["pids"] == [1, 2]
    assert found["sys"] == found["disks"] == []
    assert found["host"] != os.uname().nodename


@pytest.mark.parametrize("user", ["1000:1000", "0:0"])
def test_files_that_steer_a_kernel(guests: Sandboxes, user: str) -> None:
    """core_pattern, release_agent, devices and the like: they are not there, or do not open for writing."""
    code = """
def write(path):
    try: os.close(os.open(path, os.O_WRONLY))
    except OSError as error: return error.errno
    return 0
out({path: write(path) for path in PATHS})
"""
    found = guests.ask(f"PATHS = {KERNEL_FILES.split()!r}\n{code}", {"user": user})
    # gVisor's own, with which root of the sandbox reaches nothing: writing to it is taken and does nothing.
    own = (
        {"/proc/sysrq-trigger", "/dev/fuse", "/dev/net/tun"}
        if user == "0:0"
        else {"/dev/fuse", "/dev/net/tun"}
    )
    assert {path: error for path, error in found.items() if error not in (1, 2, 6, 13, 30)}.keys() <= own


# System calls: test_system_calls.py has the controls of these attacks

GUEST = (
    INSIDE
    | {
        "become_host_id": EPERM,  # there is no map, and no other user to become
        "mount_attributes": ENOSYS,
        "steal_descriptor": "200",  # no pidfd to begin with
        "fchmodat2_suid": ENOSYS,
        "real_time": EINVAL,
        "negative_nice": "0",  # a number in gVisor's kernel: see below
        "int80": EPERM,  # the host ends the process that stands for it on the host; gVisor calls that exit status 1
        "x32": EPERM,
    }
)


@pytest.fixture(scope="module")
def inside(guests: Sandboxes) -> dict[str, str]:
    result = guests.run(["/probe/attack", *GUEST])
    assert result.exit_status == 0, result.stderr
    return outcomes(result.stdout)


def test_the_policys_filter_holds_in_gvisors_kernel(inside: dict[str, str]) -> None:
    """Each attack gets from the sentry the answer that the filter of the policy gives, or one that is as good."""
    assert inside == GUEST


def test_root_of_the_sandbox_can_do_no_more(guests: Sandboxes) -> None:
    """`user: 0:0` is root by name only: the same attacks fail, but for changing ids to itself."""
    result = guests.run(["/probe/attack", *GUEST], {"user": "0:0"})
    assert outcomes(result.stdout) == GUEST | {"become_root": "0", "become_group": "0"}


@pytest.mark.parametrize("capabilities", ["CAP_SYS_PTRACE", "CAP_SYS_CHROOT", "CAP_MKNOD", "CAP_NET_ADMIN"])
def test_capabilities_are_gvisors_own(guests: Sandboxes, capabilities: str) -> None:
    """What a capability gives, it gives inside: no node of the host's disks, no tracer, no namespace."""
    fields = {"user": "0:0", "capabilities": [capabilities]}
    result = guests.run(["/probe/attack", *GUEST], fields)
    assert result.exit_status == 0, result.stderr
    more = {name for name, answer in outcomes(result.stdout).items() if answer == "0" != GUEST[name]}
    own = {
        "CAP_SYS_PTRACE": {"vm_read", "vm_write"},
        "CAP_SYS_CHROOT": {"change_root"},
    }
    assert more <= {"become_root", "become_group", "all_capabilities"} | own.get(capabilities, set())


def test_strict_stops_the_same_attacks(guests: Sandboxes) -> None:
    """Under `seccomp: strict` no attack succeeds either."""
    result = guests.run(["/probe/attack", *GUEST], {"seccomp": "strict"})
    found = outcomes(result.stdout)
    assert set(found) == set(GUEST)
    assert [name for name, outcome in found.items() if outcome == "0"] == ["negative_nice"]


CHANGED = [
    {"names": ["rmdir", "mkdir"], "action": "SCMP_ACT_ERRNO", "errnoRet": errno.EPERM},
    {"names": ["rename"], "action": "SCMP_ACT_ERRNO", "errnoRet": errno.ENOSYS},
    {"names": ["link"], "action": "SCMP_ACT_KILL_PROCESS"},
]


@pytest.fixture
def profile(tmp_path: Path) -> str:
    """A profile of the user's own, in moby's format: our default, but for a few calls."""
    oci = seccomp_for("default", arch="x86_64").oci
    changed = {name for rule in CHANGED for name in rule["names"]}  # type: ignore[attr-defined]
    rules = [
        {**rule, "names": [name for name in rule["names"] if name not in changed]} for rule in oci["syscalls"]
    ]
    own = {name: oci[name] for name in ("defaultAction", "defaultErrnoRet")}  # type: ignore[literal-required]
    path = tmp_path / "profile.json"
    path.write_text(json.dumps({**own, "syscalls": [*(rule for rule in rules if rule["names"]), *CHANGED]}))
    return str(path)


ASK_MOBY = """
def attempt(work, *args):
    try: work(*args)
    except OSError as error: return error.errno
    return 0
pid = os.fork()
if pid == 0: os.link('/etc/passwd', '/work/x')
status = os.waitpid(pid, 0)[1]
out([attempt(os.mkdir, '/work/d'), attempt(os.rename, '/work/a', '/work/b'), attempt(os.symlink, 'a', '/work/l'),
     os.WIFSIGNALED(status) and os.WTERMSIG(status)])
"""


def test_a_profile_of_the_users_own(guests: Sandboxes, plain: Sandboxes, profile: str) -> None:
    """A moby profile means the same as at the linux tier: EPERM, ENOSYS, death, and what it allows works."""
    expected = [errno.EPERM, errno.ENOSYS, 0, signal.SIGSYS]
    assert plain.ask(ASK_MOBY, {"seccomp": profile}) == expected
    assert guests.ask(ASK_MOBY, {"seccomp": profile}) == expected


def test_a_tracer_gets_around_no_filter(
    guests: Sandboxes, plain: Sandboxes, outside: Outside, probes: Path
) -> None:
    """Changing a call after the filter was asked works outside, where there is none, and not in gVisor's kernel."""
    assert outside([probes / "tracer"]).stdout == b"unshare 0\n"
    fields = {"user": "0:0", "capabilities": ["CAP_SYS_PTRACE"]}
    assert plain.run(["/probe/tracer"], fields).stdout == b"unshare 1\n"  # the kernel asks again
    assert guests.run(["/probe/tracer"], fields).stdout == b"trace 1\n"


def test_threads_of_a_libc_that_tries_clone3_first(guests: Sandboxes) -> None:
    """A denied call that libraries have something else for is answered so that they use that."""
    code = "import threading\nt = threading.Thread(target=lambda: out(7))\nt.start()\nt.join()"
    assert guests.ask(code) == 7


def test_priority_is_gvisors_own(guests: Sandboxes, home: Path) -> None:
    """A job that makes itself more important stays what it was on the host."""
    with guests.held(
        "os.setpriority(os.PRIO_PROCESS, 0, -20)\nhold(os.getpriority(os.PRIO_PROCESS, 0))"
    ) as held:
        assert held.said == -20
        (sandbox,) = os.listdir(home / "sandboxes")
        assert {os.getpriority(os.PRIO_PROCESS, pid) for pid in processes(sandbox)} == {0}


# Files

HOSTILE = """
import errno, socket, subprocess
def attempt(work, *args):
    try: work(*args)
    except OSError as error: return errno.errorcode[error.errno]
    return 'done'
def read(path):
    with open(path) as file: return file.read()
hold({
    'socket': attempt(socket.socket(socket.AF_UNIX).connect, '/data/socket'),
    'fifo': attempt(os.open, '/data/fifo', os.O_RDONLY | os.O_NONBLOCK),
    'disk': attempt(os.open, '/data/disk', os.O_RDONLY), 'zero': attempt(os.open, '/data/zero', os.O_RDONLY),
    'link': attempt(read, '/data/link'), 'dots': attempt(read, '/data/dots'), 'proc': attempt(read, '/data/proc'),
    'up': attempt(os.stat, '/data/../../../../..' + OUTSIDE), 'hard': attempt(os.link, '/etc/passwd', '/data/hard'),
    'away': attempt(os.rename, '/data/own', '/tmp/own'),
    'id': subprocess.run('/data/id', capture_output=True).stdout.decode(),
    'node': attempt(os.mknod, '/data/node', 0o20666, os.makedev(1, 5)), 'pipe': attempt(os.mkfifo, '/data/pipe'),
    'name': attempt(socket.socket(socket.AF_UNIX).bind, '/data/name'), 'mode': attempt(os.chmod, '/data/id', 0o4777),
    'owner': attempt(os.chown, '/data/own', 7, 7), 'made': attempt(os.mkdir, '/data/made'),
    'leave': attempt(os.symlink, '/etc/shadow', '/data/leave'),
})
"""


@pytest.fixture
def hostile(shared: Path) -> Iterator[Path]:
    """A directory to mount with everything in it that could be a way to the host; all of it open to all."""
    server = socket.socket(socket.AF_UNIX)
    server.bind(str(shared / "socket"))
    server.listen()
    os.mkfifo(shared / "fifo")
    os.mknod(shared / "disk", 0o60666, os.makedev(254, 0))
    os.mknod(shared / "zero", 0o20666, os.makedev(1, 5))
    (shared / "own").write_text("own")
    shutil.copy("/usr/bin/id", shared / "id")
    for name in ("socket", "fifo", "disk", "zero", "own", "id"):
        os.chown(shared / name, USER, USER)
        (shared / name).chmod(0o4755 if name == "id" else 0o666)
    (shared / "link").symlink_to("/etc/shadow")
    (shared / "dots").symlink_to("../" * 20 + "etc/shadow")
    (shared / "proc").symlink_to("/proc/1/root/etc/shadow")
    shared.chmod(0o777)
    yield shared
    server.close()


@pytest.mark.parametrize("user", ["1000:1000", "0:0"])
def test_what_lies_in_a_writable_mount_leads_nowhere(guests: Sandboxes, hostile: Path, user: str) -> None:
    """Links are followed inside, the host's sockets, pipes and devices do not open, set-id bits give nothing."""
    mounts = {"filesystem.mounts": [bind(hostile, "/data", "rw")], "user": user}
    outside_path = str(hostile.parent / hostile.name)
    with guests.held(f"OUTSIDE = {outside_path!r}\n{HOSTILE}", mounts) as held:
        found = held.said
        left = {path.name for path in hostile.iterdir()}
        owners = {path.name: path.lstat().st_uid for path in hostile.iterdir()}
    assert found["socket"] == "ECONNREFUSED"
    assert {found[name] for name in ("fifo", "disk", "zero")} <= {"EPERM", "EACCES", "ENXIO"}
    assert {found[name] for name in ("link", "dots")} == {"ENOENT"}  # the image has no such file
    assert found["proc"] in ("ENOENT", "EACCES", "EPERM")
    assert found["up"] == "ENOENT"
    assert {found["hard"], found["away"]} <= {"EXDEV", "EPERM"}
    assert "uid=0(root)" not in str(found["id"]) or user == "0:0"
    assert "euid" not in str(found["id"])
    assert {found[name] for name in ("node", "mode", "owner")} <= {"EPERM", "EACCES"}
    # Sockets and pipes that a job makes are gVisor's, and no files of the host's.
    assert (found["pipe"], found["name"], found["made"], found["leave"]) == ("done",) * 4
    assert not left & {"hard", "node", "pipe", "name"}
    assert owners["made"] == owners["leave"] == USER


def test_control_what_lies_there_works_for_others(hostile: Path, outside: Outside) -> None:
    """Outside, anybody gets through the socket, the pipe and the device."""
    code = f"""
import os, socket
os.chdir({str(hostile)!r})
socket.socket(socket.AF_UNIX).connect('socket')
os.open('fifo', os.O_RDONLY | os.O_NONBLOCK)
print(os.read(os.open('zero', os.O_RDONLY), 1), os.path.exists('dots'))
"""
    done = outside([sys.executable, "-I", "-c", code])
    assert done.stdout == b"b'\\x00' True\n", done.stderr


def test_no_parent_beyond_the_root(guests: Sandboxes) -> None:
    """Neither ".." nor a descriptor of /proc leads above the root, nor does a working directory by one."""
    code = """
up = os.open('/', os.O_RDONLY)
for _ in range(40): up = os.open('..', os.O_RDONLY, dir_fd=up)
names = sorted(os.listdir(up))
out([names == sorted(os.listdir('/')), os.path.exists('/../../../../var/lib/ringfence'),
     [os.path.realpath(f'/proc/{name}/root') for name in os.listdir('/proc') if name.isdigit() and name != '1']])
"""
    same, there, roots = guests.ask(code)
    assert (same, there) == (True, False)
    assert set(roots) == {"/"}  # type: ignore[arg-type]
    for cwd in ("/proc/self/fd/3", "/proc/self/fd/4", "/proc/1/cwd", "/proc/1/root"):
        result = guests.run(["ls", "-a", "."], cwd=cwd)
        assert result.exit_status == 126, (cwd, result.stdout)


# The agent inside


def test_memory_descriptors_and_files_of_the_agent_are_closed(guests: Sandboxes) -> None:
    """Nothing of process 1 opens that could change it or show its memory; the control: test_agent_under_attack.py."""
    found = guests.ask(f"TARGET = '1'\n{PRY.replace('print(json.dumps(found))', 'out(found)')}")
    # Of these gVisor lets every process of the same user have its way; there is nothing in them that does harm.
    harmless = {"environ", "maps", "auxv", "fd listed", "ns/net opened", "comm written"}
    assert {name for name, error in found.items() if error == 0} <= harmless


def test_descriptors_of_the_agent_do_not_open(guests: Sandboxes) -> None:
    """The sockets that it speaks on are numbers to be read, not ways to the launcher; what opens is what all have."""
    code = """
def opens(path):
    for mode in (os.O_RDONLY, os.O_WRONLY, os.O_RDWR):
        try: os.close(os.open(path, mode | os.O_NONBLOCK))
        except OSError: continue
        return True
    return False
out({os.readlink(f'/proc/1/fd/{name}'): opens(f'/proc/1/fd/{name}') for name in os.listdir('/proc/1/fd')})
"""
    for fields in ({}, {"user": "0:0", "capabilities": ["CAP_SYS_PTRACE", "CAP_DAC_OVERRIDE"]}):
        found = guests.ask(code, fields)
        assert sum(name.startswith("host:") for name in found) == 2  # its control socket, and the feed
        assert {name for name, opened in found.items() if opened} == {"/dev/null", "/proc"}


SIGNAL_IT = """
import ctypes, signal, sys
libc, info, tried = ctypes.CDLL(None), (ctypes.c_int * 32)(), 0
for number in signal.valid_signals() - {signal.SIGKILL, signal.SIGSTOP}: signal.signal(number, signal.SIG_IGN)
for number in [*signal.valid_signals()] * 20:
    info[0], info[2] = number, -1
    # kill, tkill, tgkill, rt_sigqueueinfo, rt_tgsigqueueinfo
    for call in ((62, 1), (200, 1), (234, 1, 1), (129, 1), (297, 1, 1)):
        tried += libc.syscall(*call, number, info) == 0
state = [line for line in open('/proc/1/status') if line.startswith('State')][0].split()[1]
"""


@pytest.mark.parametrize("seccomp", ["default", "strict", "own"])
def test_agent_survives_every_signal(guests: Sandboxes, profile: str, seccomp: str) -> None:
    """All signals, by every call that sends one; the job goes on and its status arrives, whatever the profile."""
    seccomp = profile if seccomp == "own" else seccomp
    code = SIGNAL_IT + "sys.exit(7 if state in 'SR' and tried > 100 else 8)"
    result = guests.run(["python3", "-c", code], {"seccomp": seccomp}, timeout=10)
    assert (result.exit_status, result.signal) == (7, 0), result.stderr


def test_time_of_a_detached_job_that_stops_its_agent(gvisor: Cli) -> None:
    """Nobody but the agent keeps the time of a job that nobody attends: stopping it, or trying to, gains none."""
    code = SIGNAL_IT + "import time\nprint(state, flush=True)\ntime.sleep(60)"
    gvisor("run", *gvisor.tier, "-d", "--name", "box", "--timeout", "3s", "--", "python3", "-c", code)
    until(lambda: gvisor.ps()["box"]["state"] != "running", wait_s=10)
    facts = gvisor.ps()["box"]
    assert (facts["exit_status"], facts["timed_out"]) == (124, True)
    assert gvisor("logs", "box").stdout in (b"S\n", b"R\n")


def test_starving_the_agent_does_not_stretch_time(gvisor: Cli) -> None:
    """Processes that spin on all CPU time there is do not keep the agent from ending a detached job on time."""
    code = "import os\nfor _ in range(5): os.fork()\nwhile True: pass"
    gvisor("run", *gvisor.tier, "-d", "--name", "box", "--timeout", "2s", "--", "python3", "-c", code)
    until(lambda: gvisor.ps()["box"]["state"] != "running", wait_s=12)
    assert gvisor.ps()["box"]["timed_out"] is True


def test_agent_cannot_be_traced_or_limited(guests: Sandboxes) -> None:
    """No ptrace, no memory, no descriptor, no prlimit of process 1, nor of any other process."""
    names = ["trace_target", "vm_read", "vm_write", "steal_descriptor"]
    result = guests.run(["/probe/attack", "--pid", "1", *names])
    assert result.stdout.split() == b"trace_target 1 vm_read 1 vm_write 1 steal_descriptor 200".split()
    result = guests.run(["python3", "-c", f"TARGET = 1\n{LIMITS}"])
    assert (result.stdout, result.exit_status) == (b"[1, 1, 1, 1, 1]\n", 0)


def test_job_that_kills_all_its_processes(guests: Sandboxes) -> None:
    """kill(-1) reaches the job's processes and nobody else: its own end is reported as what it was."""
    result = guests.run(["python3", "-c", "import os\nos.fork()\nos.kill(-1, 9)\nos.kill(os.getpid(), 9)"])
    assert (result.exit_status, result.signal, result.oom_killed) == (137, 9, False)


def test_streams_of_a_run_lead_nowhere(guests: Sandboxes) -> None:
    """A job has its three descriptors and no other, none of them the agent's or the launcher's."""
    code = "out([os.readlink(f'/proc/self/fd/{name}').partition(':')[0] for name in range(3)])"
    assert guests.ask(code) == ["host"] * 3  # gVisor's word for what was passed in
    assert guests.ask("out([fd for fd in range(3, 64) if os.path.exists(f'/proc/self/fd/{fd}')])") == []


# Networks and neighbours


def test_network_is_loopback_and_gvisors_own(guests: Sandboxes, outside: Outside) -> None:
    """No interface but lo, no way to a server of the host's, nor to an abstract name of it; outside both answer."""
    with socket.socket() as server, socket.socket(socket.AF_UNIX) as name:
        server.bind(("127.0.0.1", 0))
        server.listen()
        name.bind("\0ringfence-test")
        name.listen()
        code = f"""
import json, socket
def connects(family, address):
    client = socket.socket(family)
    client.settimeout(3)
    try: client.connect(address)
    except OSError as error: return error.errno
    return 0
print(json.dumps([connects(socket.AF_INET, ('127.0.0.1', {server.getsockname()[1]})),
                  connects(socket.AF_UNIX, '\\0ringfence-test'), connects(socket.AF_INET, ('192.0.2.1', 80))]))
"""
        assert json.loads(outside(["/usr/bin/python3", "-I", "-c", code]).stdout)[:2] == [0, 0]
        refused = [errno.ECONNREFUSED, errno.ECONNREFUSED, errno.EHOSTUNREACH]
        assert guests.ask(code) == refused
    assert guests.ask("import socket\nout([name for _, name in socket.if_nameindex()])") == ["lo"]


def test_nothing_is_shared_with_a_neighbour(guests: Sandboxes, plain: Sandboxes) -> None:
    """While one sandbox leaves something everywhere, neither another of this tier nor one of the linux tier sees it."""
    seek = SET_UP + SEEK.replace("print(json.dumps(", "out((")
    with guests.held(SET_UP + LEAVE + "hold({'leaver': os.getpid()})"):
        assert guests.ask(seek) == NOTHING
        assert plain.ask(seek) == NOTHING


def test_control_the_same_sandbox_finds_it(guests: Sandboxes) -> None:
    """What is left is there for processes beside: gVisor has all of these means."""
    found = guests.ask(SET_UP + LEAVE + SEEK.replace("print(json.dumps(", "out(("))
    assert found["memory"] is found["abstract"] is found["port"] is True
    assert found["files"] == ["/tmp/left", "/dev/shm/left", "/work/left"]


def test_parts_of_a_sandbox_are_in_no_users_reach(guests: Sandboxes, home: Path, outside: Outside) -> None:
    """No other user of the host may look into the sentry's or the gofer's memory, or trace or signal them."""
    with guests.held("hold(1)"):
        (sandbox,) = os.listdir(home / "sandboxes")
        for pid in processes(sandbox):
            for name in ("mem", "environ", "maps"):
                assert outside(["head", "-c", "1", f"/proc/{pid}/{name}"]).returncode != 0
            assert outside(["ls", f"/proc/{pid}/fd/"]).returncode != 0
            assert outside(["kill", "-0", str(pid)]).returncode != 0
        assert outside(["ls", str(home / "sandboxes" / sandbox)]).returncode != 0
