"""Attacks from a job at the microVM tier: on its guest's kernel, its init, its agent, its devices, and on the host.

Two machines are booted for all of it: one whose job is user 1000, and one whose job is root by name. What the same
programs do outside of any sandbox, or at the linux tier, is the control.
"""

import json
import os
import re
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from test_agent_under_attack import LIMITS, PRY
from test_gvisor import LEAVE_MARKS, MARK, PORT, marks
from test_neighbours import LEAVE, NOTHING, SEEK, SET_UP
from test_system_calls import INSIDE, outcomes
from test_ways_out import KERNEL_FILES

from boxes import Sandboxes
from detached import Cli, command_of, processes, until

pytestmark = pytest.mark.requires(
    "root", "compiler", "x86_64", "crun", "qemu", "kernel", "mkfs.erofs", "image:base"
)

Outside = Callable[..., "subprocess.CompletedProcess[bytes]"]
PRELUDE = "import json, os, sys\ndef out(value): print(json.dumps(value))\n"
EPERM, ENOENT, EACCES, EROFS, ENXIO = 1, 2, 13, 30, 6


@pytest.fixture(scope="module")
def user(booted: Cli) -> Cli:
    """A machine whose job is user 1000; it is called "box"."""
    return booted


@pytest.fixture(scope="module")
def root(booted: Cli, probes: Path) -> Iterator[Cli]:
    """Another one beside it, called "root", whose job has user id 0 and no capability."""
    booted.detached(
        "sleep", "900", name="root", options=("--timeout", "900", "--user", "0:0", "-v", f"{probes}:/probe")
    )
    yield booted
    booted("rm", "--force", "root")


def sandbox_of(cli: Cli, name: str) -> str:
    return str(cli.ps()[name]["id"])


def ask(cli: Cli, code: str, name: str = "box") -> object:
    """Run a Python program that prints JSON with out(value)."""
    return json.loads(cli("exec", name, "--", "python3", "-c", PRELUDE + code).stdout)


# The kernel of its own


def test_a_job_is_nothing_to_the_host(machines: Sandboxes, home: Path, probes: Path) -> None:
    """Its name, words, memory, sockets and ports exist in the guest alone; at the linux tier, on the host."""
    plain = Sandboxes("crun", probes)
    with plain.held(LEAVE_MARKS, env={"MARK": MARK}):
        (sandbox,) = os.listdir(home / "sandboxes")
        assert marks(sandbox) == {"cmdline", "environ", "comm", "net/unix", "net/tcp", "fd"}
    # Before any fixture has a machine up: the only one.
    cli = Cli(home, isolation="microvm")
    code = f"import os, time\ndef hold(value):\n print('up', flush=True)\n time.sleep(60)\n{LEAVE_MARKS}"
    sandbox = cli.detached("python3", "-c", code, name="marked", options=("-e", f"MARK={MARK}"))
    try:
        cli.wait_for_log("marked", b"up")
        assert marks(sandbox) == set()
        programs = {os.path.basename(os.readlink(f"/proc/{pid}/exe")) for pid in processes(sandbox)}
        assert programs == {".ringfence", "qemu-system-x86_64"}
    finally:
        cli("rm", "--force", "marked")
    del machines


def test_kernel_of_its_own(user: Cli) -> None:
    """What the kernel says of itself is the guest's, and its symbols, log and command line are not for the job."""
    code = """
def first(path):
    try:
        with open(path, 'rb') as file: return file.read(200).decode(errors='replace')
    except OSError as error: return error.errno
out({'uname': list(os.uname()), **{path: first(path) for path in PATHS}})
"""
    secret = ["/proc/kallsyms", "/proc/cmdline", "/proc/keys", "/proc/kmsg", "/dev/kmsg", "/proc/kcore"]
    own = ["/proc/version", "/proc/sys/kernel/random/boot_id"]
    found = ask(user, f"PATHS = {secret + own!r}\n{code}")
    assert isinstance(found, dict)
    assert found["uname"][2:4] != list(os.uname())[2:4]
    for path in own:
        assert found[path] != Path(path).read_text()
    assert {found[path] for path in secret} <= {"", ENOENT, EACCES, EPERM}


def test_nothing_of_the_host_is_shown(user: Cli, probes: Path) -> None:
    """No path, disk, process or other name of the host's is in what the job may read of its surroundings."""
    names = ("mountinfo", "mounts", "cgroup", "environ", "maps")
    code = f"""
text = ''.join(open(f'/proc/self/{{name}}').read() for name in {names})
for name in ('cpuinfo', 'meminfo', 'swaps', 'modules', 'devices', 'iomem', 'ioports', 'stat', 'diskstats'):
    try: text += open('/proc/' + name).read()
    except OSError: pass
out({{'text': text, 'host': os.uname().nodename, 'sys': os.listdir('/sys')}})
"""
    found = ask(user, code)
    assert isinstance(found, dict)
    model = re.search(r"^model name\s*: (.*)$", Path("/proc/cpuinfo").read_text(), re.M)
    for word in (str(probes), "/var/lib", "/run/ringfence", "ringfence-run-", "lowerdir=/"):
        assert word not in found["text"], word
    assert found["host"] != os.uname().nodename
    if model is not None and "QEMU" not in model[1] and ringfence_emulates(user):
        assert model[1] not in found["text"]
    assert found["sys"] == []


def ringfence_emulates(cli: Cli) -> bool:
    sandbox = sandbox_of(cli, "box")
    (vmm,) = [pid for pid in processes(sandbox) if b"qemu" in command_of(pid).split(b"\0")[0]]
    return b"tcg" in b" ".join(command_of(vmm).split(b"\0"))


@pytest.mark.parametrize("name", ["box", "root"])
def test_files_that_steer_a_kernel(root: Cli, outside: Outside, name: str) -> None:
    """core_pattern, sysrq, memory, disks, the link's port and the like do not open for writing, nor for root inside."""
    paths = [
        *KERNEL_FILES.split(),
        *("/dev/port", "/dev/hvc0", "/dev/console", "/dev/ttyS0", "/dev/vport0p1", "/dev/vport1p1", "/dev/vport2p1"),
        *("/dev/vdb", "/dev/virtio-ports/link", "/dev/hwrng", "/dev/ram0", "/dev/nvram", "/dev/cpu/0/msr"),
        *("/proc/sys/kernel/modules_disabled", "/proc/sys/kernel/hostname", "/proc/sys/kernel/panic", "/init"),
        *("/sys/class/mem", "/sys/power/state", "/sys/kernel/kexec_loaded", "/.ringfence", "/etc/passwd"),
    ]  # fmt: skip
    code = """
def write(path):
    try: fd = os.open(path, os.O_WRONLY | os.O_NONBLOCK)
    except OSError as error: return error.errno
    covered = os.fstat(fd).st_rdev == os.makedev(1, 3)  # masked by the null device, where this kernel has the file
    os.close(fd)
    return 2 if covered else 0
out({path: write(path) for path in PATHS})
"""
    program = f"PATHS = {paths!r}\n{code}"
    control = outside(["/usr/bin/python3", "-I", "-c", PRELUDE + program], root=True)
    assert b'core_pattern": 0' in control.stdout  # outside, root may
    found = ask(root, program, name)
    assert isinstance(found, dict)
    assert {path: error for path, error in found.items() if error not in (1, 2, 6, 13, 26, 30)} == {}


def test_devices_are_those_few_and_no_others(root: Cli) -> None:
    """There is no node of a disk, a port or memory anywhere, and none can be made."""
    code = """
import stat
found = []
for place, directories, files in os.walk('/', onerror=lambda _: None):
    if place in ('/proc', '/sys', '/usr/share', '/usr/lib'): directories.clear(); continue
    for file in files:
        mode = os.lstat(os.path.join(place, file)).st_mode
        if stat.S_ISBLK(mode) or stat.S_ISCHR(mode): found.append(os.path.join(place, file))
made = {}
for number in ((254, 0), (1, 1), (10, 1), (229, 0), (1, 11)):
    for kind in (stat.S_IFBLK, stat.S_IFCHR):
        try: os.mknod(f'/tmp/{kind}-{number}', kind | 0o666, os.makedev(*number)); made[str(number)] = kind
        except OSError as error: pass
out([sorted(found), made])
"""
    nodes, made = ask(root, code, "root")  # type: ignore[misc]
    always = {f"/dev/{name}" for name in ("full", "null", "random", "tty", "urandom", "zero", "pts/ptmx")}
    assert set(nodes) == always
    assert made == {}


# System calls: test_system_calls.py has the controls of these attacks

# EPERM, ENOSYS, EAFNOSUPPORT, EINVAL, EOPNOTSUPP; 200: what it begins with is not there, such as user namespaces.
NOT_THERE = ("1", "38", "97", "22", "95", "200")


@pytest.mark.parametrize("name", ["box", "root"])
def test_every_system_call_attack_fails(root: Cli, name: str) -> None:
    """The filter in the guest refuses what it refuses at the linux tier, and in the same way."""
    said = root("exec", name, "--", "/probe/attack", *INSIDE).stdout
    found = outcomes(said)
    assert set(found) == set(INSIDE)
    same = {"become_root", "become_group"} if name == "root" else set()  # from 0 to 0
    for attack, outcome in INSIDE.items():
        if attack in same:
            assert found[attack] == "0"
        elif attack == "become_host_id":
            assert found[attack] in NOT_THERE  # there is no map: another user of the guest
        elif attack == "int80":
            assert found[attack] in (outcome, "killed 11")  # a kernel without any 32-bit calls
        else:
            assert found[attack] == outcome or found[attack] in NOT_THERE, (attack, found[attack])


def test_every_system_call_by_its_number(root: Cli) -> None:
    """All of them, made by children, more than the filter allows: the guest lives on."""
    counts = json.loads(root("exec", "root", "--", "/probe/everycall").stdout)
    assert sum(counts.values()) == 470
    assert counts["denied"] > 50  # the filter was there
    assert root("exec", "root", "--", "echo", "alive").stdout == b"alive\n"


def test_the_guests_own_probe(user: Cli) -> None:
    """Mounts, nodes, clock, reboot, kernel log, chroot, the agent's memory, console, disk and link: all refused."""
    found = outcomes(user("exec", "box", "--", "/probe/guest", "refused").stdout)
    assert len(found) > 15
    assert {name for name, outcome in found.items() if outcome == "0"} == set()
    assert user("exec", "box", "--", "echo", "alive").stdout == b"alive\n"


def test_modules_kexec_and_reboot(root: Cli) -> None:
    """With a kernel of his own for the taking, root of the job cannot replace, extend or restart it."""
    code = """
import ctypes
libc = ctypes.CDLL(None, use_errno=True)
def call(number, *args):
    return ctypes.get_errno() if libc.syscall(number, *args) < 0 else 0
# init_module, finit_module, delete_module, kexec_load, kexec_file_load, reboot, iopl, ioperm, swapon, perf, bpf
out([call(number, 0, 0, 0, 0, 0) for number in (175, 313, 176, 246, 320, 169, 172, 173, 167, 298, 321)])
"""
    errors = ask(root, code, "root")
    assert isinstance(errors, list)
    assert set(errors) <= {1, 38}
    assert root("exec", "root", "--", "echo", "alive").stdout == b"alive\n"


# The agent and init


@pytest.mark.parametrize("name", ["box", "root"])
def test_agent_is_closed(root: Cli, name: str) -> None:
    """Nothing in /proc/1 that is the owner's opens; no ptrace, memory, descriptor or limit of it."""
    found = ask(root, f"TARGET = '1'\n{PRY.replace('print(json.dumps(found))', 'out(found)')}", name)
    assert isinstance(found, dict)
    # To the kernel root of a guest is root, of whom are all files of such a process: he may harm his own machine.
    own = (
        {"fd listed", "comm written", "clear_refs written", "oom_score_adj written"}
        if name == "root"
        else set()
    )
    assert {name for name, error in found.items() if error not in (1, 2, 13)} <= own
    names = ["trace_target", "vm_read", "vm_write", "steal_descriptor"]
    said = root("exec", name, "--", "/probe/attack", "--pid", "1", *names).stdout
    assert said.split() == b"trace_target 1 vm_read 1 vm_write 1 steal_descriptor 1".split()
    refused = json.loads(root("exec", name, "--", "python3", "-c", f"TARGET = 1\n{LIMITS}").stdout)
    assert 0 not in refused


@pytest.mark.parametrize("name", ["box", "root"])
def test_init_and_other_processes_are_out_of_sight(root: Cli, name: str) -> None:
    """The job sees its own process namespace alone: the agent, the first job and itself; init has no number in it."""
    code = """
words = {}
for pid in os.listdir('/proc'):
    if pid.isdigit():
        try: words[int(pid)] = open(f'/proc/{pid}/cmdline').read()
        except OSError as error: words[int(pid)] = error.errno
def kill(pid):
    try: os.kill(pid, 0)
    except OSError as error: return error.errno
    return 0
own = set(words)
others = [pid for pid in range(1, 400) if pid not in own and kill(pid) != 3]
out({'words': sorted(map(str, words.values())), 'others': others, 'parent': os.getppid()})
"""
    found = ask(root, code, name)
    assert isinstance(found, dict)
    assert len(found["words"]) == 3
    assert "/init" not in "".join(found["words"])
    assert found["others"] == []
    assert found["parent"] == 1


SIGNALS = """
import signal
for number in signal.valid_signals() - {signal.SIGKILL, signal.SIGSTOP}: signal.signal(number, signal.SIG_IGN)
tried = 0
for number in [*signal.valid_signals()] * 20:
    try: os.kill(1, number); tried += 1
    except OSError: pass
state = open('/proc/1/stat').read().rpartition(')')[2].split()[0]
"""


@pytest.mark.parametrize("ids", ["1000:1000", "0:0"])
def test_agent_survives_every_signal(microvm_alone: Cli, ids: str) -> None:
    """All signals, many times; some it passes on to the first job, which ignores them, and whose status arrives."""
    code = PRELUDE + SIGNALS + "sys.exit(7 if tried > 100 and state in 'SR' else 8)"
    microvm_alone.detached("python3", "-c", code, name="killer", options=("--user", ids))
    until(lambda: microvm_alone.ps()["killer"]["state"] != "running", wait_s=40)
    assert microvm_alone.ps()["killer"]["exit_status"] == 7


def test_job_that_kills_all_its_processes(microvm_alone: Cli) -> None:
    """kill(-1) reaches the job's processes and nobody else: its own end is reported as what it was."""
    code = "import os\nos.fork()\nos.kill(-1, 9)\nos.kill(os.getpid(), 9)"
    microvm_alone.detached("python3", "-c", code, name="killer")
    until(lambda: microvm_alone.ps()["killer"]["state"] != "running", wait_s=40)
    facts = microvm_alone.ps()["killer"]
    assert (facts["exit_status"], facts["oom_killed"]) == (137, False)


def test_time_of_a_detached_job_that_stops_its_agent_and_starves_it(microvm_alone: Cli) -> None:
    """Stopping the agent, or taking all CPU time there is, gains a job that nobody attends no time."""
    code = PRELUDE + SIGNALS + "for _ in range(5): os.fork()\nwhile True: pass"
    microvm_alone.detached("python3", "-c", code, name="killer", options=("--timeout", "4s"))
    until(lambda: microvm_alone.ps()["killer"]["state"] != "running", wait_s=40)
    facts = microvm_alone.ps()["killer"]
    assert (facts["exit_status"], facts["timed_out"]) == (124, True)


@pytest.fixture
def microvm_alone(booted: Cli) -> Iterator[Cli]:
    """A place for one more machine, called "killer", beside the others."""
    yield booted
    booted("rm", "--force", "killer", status=None)


def test_cgroups_are_nowhere(root: Cli) -> None:
    """The guest's cgroup file system is not mounted where the job is, cannot be, and says nothing of a path."""
    code = """
kinds = {line.split(' - ')[1].split()[0] for line in open('/proc/self/mountinfo')}
out([sorted(kinds), open('/proc/self/cgroup').read(),
     [place for place in ('/cgroup', '/sys/fs/cgroup', '/stage', '/init', '/modules') if os.path.exists(place)]])
"""
    kinds, group, places = ask(root, code, "root")  # type: ignore[misc]
    assert set(kinds) <= {"overlay", "proc", "tmpfs", "devpts", "erofs"}
    assert group.count("\n") <= 1
    assert places == []


def test_no_parent_beyond_the_root(root: Cli) -> None:
    """Neither ".." nor a descriptor of /proc leads above the root, nor does a working directory by one."""
    code = """
up = os.open('/', os.O_RDONLY)
for _ in range(40): up = os.open('..', os.O_RDONLY, dir_fd=up)
same = os.fstat(up).st_ino == os.stat('/').st_ino
out([same, [os.path.realpath(f'/proc/{name}/root') for name in os.listdir('/proc') if name.isdigit() and name != '1']])
"""
    same, roots = ask(root, code, "root")  # type: ignore[misc]
    assert same is True
    assert set(roots) == {"/"}
    for cwd in ("/proc/self/fd/3", "/proc/self/fd/4", "/proc/1/cwd", "/proc/1/root"):
        root("exec", "-w", cwd, "root", "--", "ls", status=126)


def test_streams_lead_nowhere(user: Cli) -> None:
    """A job has its three descriptors and no other, each a pipe of the guest's own."""
    code = """
names = [os.readlink(f'/proc/self/fd/{name}').partition(':')[0] for name in range(3)]
out([names, [fd for fd in range(3, 64) if os.path.exists(f'/proc/self/fd/{fd}')]])
"""
    assert ask(user, code) == [["pipe"] * 3, []]


# Networks and neighbours


def test_no_network_leads_out(user: Cli, outside: Outside) -> None:
    """No interface but lo, no way to a server of the host's or an abstract name of it; outside both answer."""
    with socket.socket() as server, socket.socket(socket.AF_UNIX) as name:
        server.bind(("127.0.0.1", 0))
        server.listen()
        name.bind("\0ringfence-test")
        name.listen()
        code = f"""
import socket
def connects(family, address):
    client = socket.socket(family)
    client.settimeout(3)
    try: client.connect(address)
    except OSError as error: return error.errno
    return 0
out([connects(socket.AF_INET, ('127.0.0.1', {server.getsockname()[1]})),
     connects(socket.AF_UNIX, '\\0ringfence-test'), connects(socket.AF_INET, ('192.0.2.1', 80))])
"""
        control = outside(["/usr/bin/python3", "-I", "-c", PRELUDE + code])
        assert json.loads(control.stdout)[:2] == [0, 0]
        assert ask(user, code) == [111, 111, 101]  # ECONNREFUSED twice, ENETUNREACH
    vsock = "import socket\ntry: out(bool(socket.socket(40, 1)))\nexcept OSError as error: out(error.errno)"
    assert ask(user, vsock) in (1, 97)
    assert ask(user, "import socket\nout([name for _, name in socket.if_nameindex()])") == ["lo"]


def test_two_machines_do_not_see_each_other(root: Cli) -> None:
    """While one leaves something everywhere, another finds none of it; the control: in the same one it is all there."""
    leaver = root.start(
        "exec", "box", "--", "python3", "-c",
        f"import os\n{SET_UP}{LEAVE}print('left', flush=True)\nimport time; time.sleep(100)", stdout=subprocess.PIPE,
    )  # fmt: skip
    assert leaver.stdout is not None
    assert leaver.stdout.readline() == b"left\n"
    seek = SET_UP + SEEK.replace("print(json.dumps(", "out((")
    try:
        assert ask(root, seek, "root") == NOTHING
        found = ask(root, seek, "box")
    finally:
        leaver.kill()
        leaver.wait()
        leaver.stdout.close()
    assert isinstance(found, dict)
    assert found["port"] is found["abstract"] is True
    assert found["files"] == ["/tmp/left", "/dev/shm/left", "/work/left"]


def test_machines_share_no_secret(root: Cli) -> None:
    """Random bytes, boot id, host name, hashes and addresses of two machines are not the same."""
    code = """
boot = open('/proc/sys/kernel/random/boot_id').read()
stack = [line for line in open('/proc/self/maps') if '[stack]' in line][0].split('-')[0]
out([os.urandom(16).hex(), boot, os.uname().nodename, hash('x'), stack])
"""
    one, two = ask(root, code, "box"), ask(root, code, "root")
    assert isinstance(one, list)
    assert isinstance(two, list)
    assert [a == b for a, b in zip(one, two, strict=True)] == [False] * 5


def test_parts_of_a_machine_are_in_no_users_reach(user: Cli, outside: Outside) -> None:
    """No other user of the host may look into the VMM's or the bridge's memory, signal them, or see the directory."""
    sandbox = sandbox_of(user, "box")
    pids = processes(sandbox)
    assert len(pids) >= 2
    for pid in pids:
        for name in ("mem", "environ", "maps"):
            assert outside(["head", "-c", "1", f"/proc/{pid}/{name}"]).returncode != 0
        assert outside(["ls", f"/proc/{pid}/fd/"]).returncode != 0
        assert outside(["kill", "-0", str(pid)]).returncode != 0
    assert outside(["ls", str(user.home / "sandboxes" / sandbox)]).returncode != 0
    socket_path = user.home / "sandboxes" / sandbox / "control.sock"
    code = f"import socket\nsocket.socket(socket.AF_UNIX).connect({str(socket_path)!r})"
    assert outside([sys.executable, "-I", "-c", code]).returncode != 0


def test_the_vmm_reaches_nothing_of_the_host(user: Cli) -> None:
    """A VMM that was taken over has a root of its own files, all read-only, no network but lo, and no capability."""
    sandbox = sandbox_of(user, "box")
    (vmm,) = [pid for pid in processes(sandbox) if b"qemu" in command_of(pid).split(b"\0")[0]]
    mounts = [line.split(" - ") for line in Path(f"/proc/{vmm}/mountinfo").read_text().splitlines()]
    writable = {
        own.split()[4] for own, _ in mounts if "rw" in own.split()[5].split(",") and "/proc" not in own.split()[4]
    }  # fmt: skip
    nodes = {f"/dev/{name}" for name in ("full", "null", "random", "tty", "urandom", "zero")}
    assert writable <= {"/dev", *nodes}
    root = Path(f"/proc/{vmm}/root")
    names = {str(path.relative_to(root)).split("/")[0] for path in root.iterdir()}
    assert names <= {
        "proc",
        "dev",
        "bundle",
        ".ringfence",
        "usr",
        "lib",
        "lib64",
        "kernel",
        "initrd",
        "setup",
        "etc",
    }
    assert [
        line.split(":")[0].strip() for line in Path(f"/proc/{vmm}/net/dev").read_text().splitlines()[2:]
    ] == ["lo"]
    status = Path(f"/proc/{vmm}/status").read_text()
    assert {line.split()[1] for line in status.splitlines() if line.startswith("Cap")} == {"0" * 16}
    assert "NoNewPrivs:\t1" in status
    assert f":{PORT:04X} " not in Path(f"/proc/{vmm}/net/tcp").read_text()
