"""Ways out of the root that have worked elsewhere: descriptors, working directories, links, devices, kernel files."""

import os
import shutil
import socket
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

import ringfence
from boxes import Sandboxes

pytestmark = pytest.mark.requires("root", "compiler")

Outside = Callable[..., "subprocess.CompletedProcess[bytes]"]


def test_working_directory_through_a_leaked_descriptor(sandboxes: Sandboxes) -> None:
    """CVE-2024-21626: no number leads to a directory of the host, as working directory or when asked later."""
    for cwd in (
        *(f"/proc/self/fd/{number}" for number in range(3, 12)),
        "/proc/1/cwd",
        "/proc/1/root",
        "/work/../../..",
    ):
        result = sandboxes.run(["ls", "-a", "."], cwd=cwd)
        if cwd == "/work/../../..":
            assert b".ringfence" in result.stdout  # the sandbox's own root
        else:
            assert result.exit_status == 126, cwd
            assert b"working directory" in result.stderr


@pytest.mark.parametrize("relative", ["relative", "", "."])
def test_working_directory_that_is_relative(sandboxes: Sandboxes, relative: str) -> None:
    """It is refused, or means the default; never the directory of whoever started the sandbox."""
    try:
        result = sandboxes.run(["pwd"], cwd=relative)
    except ringfence.RingfenceError:
        return
    assert result.stdout == b"/work\n"


def test_working_directory_through_a_link_of_the_image(
    sandboxes: Sandboxes, probes: Path, shared: Path
) -> None:
    """A symlink of the image to a descriptor is followed inside, where there is none."""
    shutil.copy(probes / "consume", shared / "consume")
    for number in range(3, 10):
        (shared / f"exit-{number}").symlink_to(f"/proc/self/fd/{number}")
        result = sandboxes.run(["/consume", "whoami"], cwd=f"/exit-{number}", rootfs=str(shared))
        assert result.exit_status == 126


def test_control_a_leaked_descriptor_is_a_way_out(outside: Outside, tmp_path: Path) -> None:
    """Outside: a process in a chroot with one inherited directory reaches the host's files through it."""
    code = "import os\nos.chroot(ROOT)\nos.fchdir(FD)\nprint(os.path.exists('etc/passwd'))"
    fd = os.open("/", os.O_RDONLY | os.O_DIRECTORY)
    try:
        program = f"ROOT, FD = {str(tmp_path)!r}, {fd}\n{code}"
        done = outside(["/usr/bin/python3", "-I", "-c", program], root=True, pass_fds=(fd,))
    finally:
        os.close(fd)
    assert done.stdout == b"True\n", done.stderr


def test_no_parent_beyond_the_root(sandboxes: Sandboxes) -> None:
    """Neither ".." nor a descriptor of /proc leads above the root."""
    code = """
up = os.open('/', os.O_RDONLY)
for _ in range(40): up = os.open('..', os.O_RDONLY, dir_fd=up)
same = os.fstat(up).st_ino == os.stat('/').st_ino
roots = [os.path.realpath(f'/proc/{name}/root') for name in os.listdir('/proc') if name.isdigit() and name != '1']
out([same, os.path.exists('/../../../../var/lib/ringfence'), roots])
"""
    same, there, roots = sandboxes.ask(code)
    assert (same, there) == (True, False)
    assert set(roots) == {"/"}  # type: ignore[arg-type]


KERNEL_FILES = """
/proc/sys/kernel/core_pattern /proc/sys/kernel/modprobe /proc/sys/vm/overcommit_memory /proc/sys/fs/binfmt_misc/register
/proc/sysrq-trigger /proc/kcore /proc/kmsg /proc/mtrr /proc/irq/default_smp_affinity /proc/1/mem /proc/1/exe
/sys/kernel/uevent_helper /sys/fs/cgroup/memory/release_agent /sys/fs/cgroup/devices/devices.allow
/sys/fs/cgroup/unified/cgroup.procs /dev/mem /dev/kmsg /dev/vda /dev/sda /dev/fuse /dev/net/tun /dev/kvm
/dev/loop-control
"""


@pytest.mark.parametrize("user", ["1000:1000", "0:0"])
def test_files_that_steer_the_kernel(sandboxes: Sandboxes, outside: Outside, user: str) -> None:
    """core_pattern, release_agent, devices and the like do not open for writing, not for root inside either."""
    code = """
import json, os, sys
def write(path):
    try: os.close(os.open(path, os.O_WRONLY))
    except OSError as error: return error.errno
    return 0
print(json.dumps({path: write(path) for path in PATHS}))
"""
    program = f"PATHS = {KERNEL_FILES.split()!r}\n{code}"
    control = outside(["/usr/bin/python3", "-I", "-c", program], root=True)
    assert control.stdout.count(b": 0") >= 5  # core_pattern among them: outside, root may
    assert b'core_pattern": 0' in control.stdout
    found = sandboxes.ask(program.replace("print(json.dumps(", "out(("), {"user": user})
    assert {path: error for path, error in found.items() if error not in (1, 2, 6, 13, 30)} == {}


def test_cgroup_files_are_nowhere(sandboxes: Sandboxes) -> None:
    """No cgroup file system is mounted, with sysfs neither, and none can be."""
    code = """
kinds = {line.split(' - ')[1].split()[0] for line in open('/proc/self/mountinfo')}
out([sorted(kinds & {'cgroup', 'cgroup2', 'securityfs', 'debugfs', 'tracefs', 'bpf', 'mqueue'}), 'release_agent' in
     [name for _, _, files in os.walk('/sys') for name in files]])
"""
    assert sandboxes.ask(code) == [[], False]
    assert sandboxes.ask(code, {"filesystem.sysfs": True}) == [[], False]


def test_streams_of_a_run_lead_nowhere(sandboxes: Sandboxes) -> None:
    """Opened again, the job's streams are its own pipes: nothing of the caller's can be read or written by them."""
    code = """
import fcntl
def again(number, mode):
    try: return os.open(f'/proc/self/fd/{number}', mode | os.O_NONBLOCK)
    except OSError as error: return -error.errno
def kind(number):
    return os.readlink(f'/proc/self/fd/{number}').partition(':')[0]
opened = [again(number, mode) for number in (0, 1, 2) for mode in (os.O_RDONLY, os.O_WRONLY)]
out({'kinds': sorted({kind(number) for number in (0, 1, 2, *[fd for fd in opened if fd > 0])}), 'pipes': len(
    {os.readlink(f'/proc/self/fd/{number}') for number in (0, 1, 2, *[fd for fd in opened if fd > 0])})})
"""
    assert sandboxes.ask(code) == {"kinds": ["pipe"], "pipes": 3}


def test_abstract_sockets_of_the_host(sandboxes: Sandboxes, outside: Outside) -> None:
    """An abstract name of the host's, as in CVE-2020-15257, is not there inside; outside any user connects."""
    code = "import socket\nsocket.socket(socket.AF_UNIX).connect('\\0ringfence-test')\nprint('connected')"
    with socket.socket(socket.AF_UNIX) as server:
        server.bind("\0ringfence-test")
        server.listen()
        control = outside(["/usr/bin/python3", "-I", "-c", code])
        assert control.stdout == b"connected\n"
        result = sandboxes.run(["python3", "-c", code])
    assert result.exit_status == 1
    assert b"ConnectionRefusedError" in result.stderr


def test_loopback_of_the_host(sandboxes: Sandboxes, outside: Outside) -> None:
    """127.0.0.1 inside is the sandbox's own: a server of the host's is not there."""
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        server.listen()
        port = server.getsockname()[1]
        code = f"import socket\nsocket.create_connection(('127.0.0.1', {port}), 5)\nprint('connected')"
        assert outside(["/usr/bin/python3", "-I", "-c", code]).stdout == b"connected\n"
        result = sandboxes.run(["python3", "-c", code])
    assert result.exit_status == 1
    assert b"ConnectionRefusedError" in result.stderr


def test_processes_of_the_host(sandboxes: Sandboxes, outside: Outside) -> None:
    """A process of the host is neither seen nor reached, whatever its number."""
    code = "import os\ntry: os.kill(PID, 0)\nexcept OSError as e: print(e.errno)\nprint(os.path.exists(f'/proc/{PID}'))"
    program = f"PID = {os.getpid()}\n{code}"
    assert outside(["/usr/bin/python3", "-I", "-c", program]).stdout == b"1\nTrue\n"  # EPERM: it is there
    assert sandboxes.run(["python3", "-c", program]).stdout == b"3\nFalse\n"


def test_kernel_log_and_keys(sandboxes: Sandboxes) -> None:
    """The host's kernel log, its symbols, its command line and its users' keys are not shown."""
    code = """
def first(path):
    try:
        with open(path, 'rb') as file: return len(file.read(10))
    except OSError: return 0
out([first(path) for path in ('/proc/kmsg', '/dev/kmsg', '/proc/kallsyms', '/proc/cmdline', '/proc/keys')])
"""
    assert sandboxes.ask(code) == [0] * 5


def test_terminal_of_the_caller(sandboxes: Sandboxes) -> None:
    """There is no controlling terminal to open, whatever the caller has."""
    result = sandboxes.run(["sh", "-c", "echo typed > /dev/tty"])
    assert result.exit_status != 0
    assert b"/dev/tty" in result.stderr
