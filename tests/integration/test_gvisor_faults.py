"""What goes wrong at the gVisor tier: each fault is one line with what to do, and leaves nothing."""

import json
import os
import shutil
import signal
import socket
import struct
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

import commands
import ringfence
from boxes import Sandboxes
from commands import RINGFENCE, Done, refused, remains, run
from needs import COMPILERS
from ringfence.host import places
from ringfence.host.detect import detect
from ringfence.plan.gvisor_compat import _WITHOUT_EFFECT

pytestmark = pytest.mark.requires("root", "crun", "runsc", "image:base", "userns")
HERE = Path(__file__).parent
GVISOR = ("-i", "gvisor")
WAYS = ("fails", "says why", "ends", "floods", "crashes", "hangs", "leaves a child")


@pytest.fixture(autouse=True)
def nothing_of_this_test_left(home: Path) -> Iterator[None]:
    """After each test no sandbox, id range or mount of it is there, at once and without a ``gc``."""
    yield
    assert remains(home) == []


@pytest.fixture
def directory() -> Iterator[Path]:
    """A directory that everybody can pass through, to the files of a sandbox."""
    made = Path(tempfile.mkdtemp(prefix="ringfence-faults-"))
    made.chmod(0o755)
    yield made
    shutil.rmtree(made)


def gvisor(*words: str | Path, **more: object) -> Done:
    return run(*GVISOR, *words, **more)


def path_with(directory: Path) -> dict[str, str]:
    return {"PATH": f"{directory}:{os.environ['PATH']}"}


# What a policy asks and gVisor has not


@pytest.mark.parametrize(
    ("words", "code", "part"),
    [
        (["--network", "host"], "RF-POLICY", "'host' is not one of none, egress, ports"),
        (["--network", "egress"], "RF-UNENFORCEABLE", "network.mode cannot be enforced at the gvisor tier"),
        (["--publish", "8080:80"], "RF-UNENFORCEABLE", "network.publish"),
        (["--cap-add", "BPF"], "RF-HOST", "gVisor does not know CAP_BPF"),
        (["--cap-add", "PERFMON", "--cap-add", "CHECKPOINT_RESTORE"], "RF-HOST", "CAP_CHECKPOINT_RESTORE"),
        (["--user", "0:0", "--cap-add", "NET_RAW"], "RF-HOST", "CAP_NET_RAW"),
        (["--cap-add", "CHOWN"], "RF-HOST", "user 0 alone"),
        (["--device", "/dev/fuse"], "RF-UNENFORCEABLE", "/dev/fuse cannot be passed into gVisor"),
        (["--sysctl", "net.ipv4.ip_forward=1"], "RF-UNENFORCEABLE", "sysctls"),
        (["--set", "lsm=required"], "RF-UNENFORCEABLE", "lsm cannot be enforced"),
        (["--gvisor-platform", "kvm"], "RF-HOST", "platform kvm does not work here: KVM is"),
        (["--pids-limit", "0"], "RF-POLICY", "limits.pids"),
    ],
    ids=" ".join,
)
def test_what_cannot_be_is_refused(words: list[str], code: str, part: str) -> None:
    """125, one line, the field by name: the sentry would drop most of these without a word."""
    if words[1:] == ["kvm"] and _kvm_works():
        pytest.skip("KVM works here")
    refused(gvisor(*words, "true"), 125, f"[{code}]", part)


def _kvm_works() -> bool:
    return detect().kvm == "works"


@pytest.mark.parametrize("kind", ["socket", "fifo"])
def test_a_mount_that_nobody_could_open(kind: str, directory: Path) -> None:
    """The gofer opens neither; a policy that allows it in so many words is told so, and not left with a dead file."""
    source = directory / "source"
    with socket.socket(socket.AF_UNIX) as listener:
        if kind == "socket":
            listener.bind(str(source))
        else:
            os.mkfifo(source)
        policy = directory / "policy.yaml"
        policy.write_text(
            "extends: untrusted\nfilesystem:\n  mounts:\n"
            f"    - {{source: {source}, target: /data, allow_dangerous: true}}\n"
        )
        done = gvisor("--policy", policy, "--", "true")
    refused(done, 125, f"gVisor does not open the host's {kind} '{source}'", "use -i linux", "[RF-MOUNT]")


def test_ptrace_works_when_it_is_asked_for() -> None:
    """Nobody takes it where systrap works, but whoever wants it gets it: processes, threads and all."""
    code = "import subprocess, threading; threads = [threading.Thread(target=print, args=('x',)) for _ in 'ab']\n"
    code += "[thread.start() for thread in threads]; [thread.join() for thread in threads]\n"
    code += "print(subprocess.run(['id', '-u'], capture_output=True, text=True).stdout)"
    done = gvisor("--gvisor-platform", "ptrace", "--proof", "-", "--", "python3", "-c", code)
    assert (done.returncode, done.stdout) == (0, b"x\nx\n1000\n\n"), done.stderr
    assert b"(ptrace) in crun" in done.stderr.splitlines()[0]


# A runsc that is none


def test_no_runsc(directory: Path) -> None:
    """Not there at all, or there and not executable, which is the same: how to get one."""
    hidden = (
        "for place in $PLACES; do if [ -e $place/runsc ]; then mount --bind /dev/null $place/runsc; fi; done"
    )
    places_ = f"{os.environ['PATH'].replace(':', ' ')} /usr/sbin /sbin /usr/local/bin"
    done = gvisor("true", mounts=hidden, env={"PLACES": places_})
    refused(done, 125, "runsc is not installed", "apt-get install runsc", "[RF-HOST]")
    (directory / "runsc").write_text("#!/bin/sh\nexit 1\n")
    assert gvisor("true", env=path_with(directory)).returncode == 0


OLD = r"""#!/bin/sh
if [ "$1" = help ]; then
  printf '  -bundle string\n    path\n  -detach\n    detach\n  -user-log string\n    log\n' >&2
else
  printf '  -root string\n    root\n  -platform value\n    which\n  -network value\n    which\n'
  printf '  -debug-log string\n    where\n'
fi
"""


@pytest.mark.parametrize(
    ("script", "part"),
    [
        (OLD, "is too old: it lacks --pass-fd, --allow-flag-override, --debug, --debug-command and "),
        ("#!/bin/sh\nexit 1\n", "does not answer as a runsc does"),
        ("#!/bin/sh\nhead -c 200000 /dev/urandom\n", "does not answer as a runsc does"),
        ("#!/bin/sh\nkill -9 $$\n", "does not answer as a runsc does"),
        ("#!/nosuch/interpreter\n", "does not answer as a runsc does"),
        ("#!/bin/sh\nexec sleep 600\n", "does not answer as a runsc does"),
    ],
    ids=["old", "fails", "garbage", "killed", "no interpreter", "hangs"],
)
def test_a_runsc_that_cannot_be_used(script: str, part: str, directory: Path) -> None:
    """One line, soon, and by the path that was found: never another runsc, nor a weaker tier."""
    program = directory / "runsc"
    program.write_text(script)
    program.chmod(0o755)
    refused(gvisor("true", env=path_with(directory)), 125, f"{program} {part}", "[RF-HOST]")


@pytest.fixture(params=WAYS)
def fake(request: pytest.FixtureRequest, directory: Path) -> Iterator[tuple[str, Path]]:
    """A runsc that passes every question and goes wrong at the start."""
    compiler = next((name for name in COMPILERS if shutil.which(name)), None)
    if compiler is None:
        pytest.skip("needs compiler: no C compiler")
    flags = ["-static", "-O1", "-Wall", "-Werror", f"-DWAY={WAYS.index(request.param)}"]
    flags.append(f'-DREAL="{places.find("runsc")}"')
    subprocess.run([compiler, *flags, "-o", directory / "runsc", HERE / "fake_runsc.c"], check=True)
    yield str(request.param), directory


SAID = {
    "fails": "could not start the sandbox: it said nothing",
    "says why": "could not start the sandbox: FATAL ERROR: no such luck; \\x1b[31mred",
    "ends": "could not start the sandbox: it said nothing",
    "floods": "could not start the sandbox: ",
    "crashes": "could not start the sandbox: ",
    "hangs": "did not start the sandbox within 1 s",
    "leaves a child": "did not start the sandbox within 1 s",
}
_SHORTER = "import sys; from ringfence.cli import main; from ringfence.sandbox import launch\n"
_SHORTER += "launch.START_TIMEOUT_S = 1.0; sys.exit(main(sys.argv[1:]))"


def test_a_runsc_that_starts_nothing(fake: tuple[str, Path]) -> None:
    """Its own words in one line of some length, without its colours; one that never ends is ended."""
    way, directory = fake
    command = [sys.executable, "-c", _SHORTER, "run", *GVISOR, "true"]
    env = {**os.environ, **path_with(directory)}
    done = subprocess.run(command, env=env, stdin=subprocess.DEVNULL, capture_output=True, timeout=60)
    line = refused(done, 125, SAID[way])
    assert len(line) < 5000


def test_a_runsc_that_is_replaced_between_two_runs(directory: Path) -> None:
    """A plan that was kept is of the runsc that it was made with: another one at the same path is asked anew."""
    program = directory / "runsc"
    shutil.copy(places.find("runsc"), program)
    assert gvisor("true", env=path_with(directory)).returncode == 0
    program.unlink()
    program.write_text("#!/bin/sh\nexit 1\n")
    program.chmod(0o755)
    refused(gvisor("true", env=path_with(directory)), 125, "does not answer as a runsc does")


# Roots of all kinds


HELLO = """#include <stdio.h>
#include <unistd.h>
int main(void) { printf("hello %d\\n", (int)geteuid()); return 0; }
"""


@pytest.fixture(scope="module")
def hello(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A static program."""
    compiler = next((name for name in COMPILERS if shutil.which(name)), None)
    if compiler is None:
        pytest.skip("needs compiler: no C compiler")
    made = tmp_path_factory.mktemp("hello") / "hello"
    subprocess.run([compiler, "-static", "-x", "c", "-o", made, "-"], input=HELLO.encode(), check=True)
    return made


@pytest.fixture
def root(directory: Path, hello: Path) -> Path:
    """A root file system with one program and no directory but its own."""
    (directory / "root/bin").mkdir(parents=True)
    shutil.copy(hello, directory / "root/bin/hello")
    return directory / "root"


@pytest.mark.parametrize("way", ["--read-only=true", "--read-only=false"])
def test_a_root_without_any_directories(root: Path, way: str) -> None:
    """No /proc, /dev, /tmp, /etc or /work: they are made, and not in the directory that was given."""
    done = gvisor("--rootfs", root, way, "--", "/bin/hello")
    assert (done.returncode, done.stdout, done.stderr) == (0, b"hello 1000\n", b"")
    assert os.listdir(root) == ["bin"]


@pytest.mark.parametrize("name", ["proc", "work", "dev", "tmp", "etc", "sys"])
@pytest.mark.parametrize("kind", ["link", "file"])
def test_a_root_with_something_else_in_the_way(root: Path, name: str, kind: str) -> None:
    """A symlink or a file where a directory has to be leads nowhere: the sandbox has its own there."""
    outside = root.parent / "outside"
    outside.mkdir()
    if kind == "link":
        (root / name).symlink_to(f"../../..{outside}")
    else:
        (root / name).write_text("in the way")
    done = gvisor("--rootfs", root, "--", "/bin/hello")
    assert (done.returncode, done.stdout, done.stderr) == (0, b"hello 1000\n", b"")
    assert list(outside.iterdir()) == []


def test_an_empty_root(root: Path) -> None:
    """The command is what is missing, and the status is the shell's."""
    shutil.rmtree(root / "bin")
    refused(gvisor("--rootfs", root, "--", "/bin/hello"), 127, "'/bin/hello'", "in the image", "[RF-COMMAND]")


def test_set_user_id_and_other_machines(root: Path) -> None:
    """The sentry knows no set-user-id bit, which is said, and runs no 32-bit program, of which an image is told."""
    (root / "bin/hello").chmod(0o4755)
    done = gvisor("--rootfs", root, "--set", "no_new_privileges=false", "--", "/bin/hello")
    assert done.stdout == b"hello 1000\n"
    assert b"note: no_new_privileges: false has no effect" in done.stderr
    (root / "bin/old").write_bytes(_elf32())
    (root / "bin/old").chmod(0o755)
    refused(gvisor("--rootfs", root, "--", "/bin/old"), 126, "'/bin/old'", "Exec format error")
    (root / "lib").mkdir()
    (root / "lib/ld-linux.so.2").write_bytes(_elf32())
    done = gvisor("--rootfs", root, "--", "/bin/hello")
    assert done.returncode == 0
    assert done.stderr == (
        b"ringfence: note: the image has 32-bit x86 programs: the sentry runs 64-bit programs only\n"
    )


def _elf32() -> bytes:
    """Return a 32-bit program for x86 that ends with status 0: elf(5)."""
    code = b"\xb8\x01\x00\x00\x00\x31\xdb\xcd\x80"
    start = 0x08048000
    size = 52 + 32 + len(code)
    header = b"\x7fELF\x01\x01\x01" + bytes(9)
    header += struct.pack("<HHIIIIIHHHHHH", 2, 3, 1, start + 84, 52, 0, 0, 52, 32, 1, 0, 0, 0)
    return header + struct.pack("<IIIIIIII", 1, 0, start, start, size, size, 5, 0x1000) + code


# Small limits


@pytest.mark.parametrize("memory", ["1m", "4m", "16m"])
def test_memory_is_the_jobs_alone(memory: str) -> None:
    """What gVisor needs is not the job's: a tiny limit starts, and a job that wants more is killed for memory."""
    assert gvisor("--memory", memory, "--", "true").returncode == 0
    done = gvisor("--memory", memory, "--", "python3", "-c", "x = b'x' * (80 << 20)")
    assert done.returncode == 137
    assert b"out of memory: limit of" in done.stderr
    assert b"crashed" not in done.stderr


def test_one_process() -> None:
    """limits.pids of 1 starts, and is one."""
    done = gvisor("--pids-limit", "1", "--", "sh", "-c", "true & echo started")
    assert done.returncode == 2
    assert b"Cannot fork" in done.stderr


def test_a_full_run_directory(home: Path) -> None:
    """Where there is no room for a sandbox's files the line says so, and names the place."""
    place = home / "full"
    place.mkdir(mode=0o711)
    script = 'mount -t tmpfs -o size=128k,nr_inodes=8,mode=711 none "$PLACE"'
    try:
        done = gvisor("true", mounts=script, env={"PLACE": str(place), "RINGFENCE_RUN_DIR": f"{place}/run"})
        refused(done, 125, f"{place}/run", "free some space there, or set RINGFENCE_RUN_DIR")
    finally:
        place.rmdir()


def test_a_profile_that_refuses_the_agent(directory: Path) -> None:
    """Without the calls that it needs itself the agent cannot speak: a refusal, and no sandbox that hangs."""
    profile = directory / "seccomp.json"
    allowed = {"names": ["read"], "action": "SCMP_ACT_ALLOW"}
    profile.write_text(json.dumps({"defaultAction": "SCMP_ACT_ERRNO", "syscalls": [allowed]}))
    done = gvisor("--security-opt", f"seccomp={profile}", "--", "true")
    assert done.returncode == 125, done
    assert b"Traceback" not in done.stderr
    lines = done.stderr.decode().splitlines()
    assert [line for line in lines if ": note: " not in line] == lines[-1:]


# What gVisor lacks


def test_a_job_that_fails_is_told_what_gvisor_lacks(guests: Sandboxes) -> None:
    """The call by name, once, if the job failed; one that got along without it hears nothing."""
    code = "import os, sys\ntry: os.pidfd_open(1)\nexcept OSError: pass\nsys.exit({})"
    failed, fine = (guests.run(["python3", "-c", code.format(status)]) for status in (5, 0))
    assert failed.exit_status == 5
    assert failed.notes == (
        "the job made system calls that gVisor does not have: pidfd_open; if it failed for that, -i linux has them",
    )
    assert (fine.exit_status, fine.notes) == (0, ())
    assert (
        guests.run(["sh", "-c", "ls /; exit 5"]).notes == ()
    )  # what libraries try by themselves is not named


def test_the_note_is_a_line_on_stderr() -> None:
    """After the job's own output, in one line."""
    done = gvisor("--", "python3", "-c", "import os; os.pidfd_open(1)")
    assert done.returncode == 1
    assert (
        done.stderr.decode().splitlines()[-1].startswith("ringfence: the job made system calls that gVisor")
    )


NO_EFFECT = {
    "CAP_SYS_MODULE": "call(175, 0, 0, 0)",
    "CAP_SYS_RAWIO": "call(172, 3)",
    "CAP_SYS_BOOT": "call(169, 0xfee1dead, 672274793, 0, 0)",
    "CAP_SYS_TIME": "call(227, 0, (ctypes.c_long * 2)(1700000000, 0))",
    "CAP_MKNOD": "opened('/tmp/node', os.mknod('/tmp/node', 0o20666, os.makedev(1, 3)))",
    "CAP_AUDIT_CONTROL": "socket.socket(16, 3, 9)",
    "CAP_AUDIT_READ": "socket.socket(16, 3, 9).bind((0, 1))",
    "CAP_AUDIT_WRITE": "socket.socket(16, 3, 9)",
    "CAP_SYSLOG": "call(103, 3, ctypes.create_string_buffer(4096), 4096)",
    "CAP_WAKE_ALARM": "call(283, 8, 0)",
    "CAP_LEASE": "fcntl.fcntl(open('/tmp/file', 'w'), fcntl.F_SETLEASE, fcntl.F_WRLCK)",
}
TRY = """import ctypes, fcntl, json, os, socket
libc = ctypes.CDLL(None, use_errno=True)
def call(number, *words):
    if libc.syscall(number, *words) < 0: raise OSError(ctypes.get_errno(), 'x')
def opened(path, _): open(path)
found = {}
for name, code in json.loads(os.environ['TRY']).items():
    try: eval(code)
    except OSError: found[name] = False
    else: found[name] = True
out(found)
"""


def test_capabilities_that_are_said_to_have_no_effect(guests: Sandboxes) -> None:
    """With each of them what it is for fails all the same; the control is one that has an effect."""
    # There is nothing to try of the others: no file, no call, no socket stands for them.
    assert set(_WITHOUT_EFFECT) - set(NO_EFFECT) == {"CAP_MAC_ADMIN", "CAP_MAC_OVERRIDE", "CAP_BLOCK_SUSPEND"}
    tried = {**NO_EFFECT, "CAP_CHOWN": "os.chown('/tmp', 5, 5)"}
    overrides: dict[str, object] = {"user": "0:0", "capabilities": list(tried)}
    found = guests.ask(TRY, overrides, env={"TRY": json.dumps(tried)})
    assert found == {name: name == "CAP_CHOWN" for name in tried}
    assert guests.ask(TRY, {"user": "0:0"}, env={"TRY": json.dumps(tried)})["CAP_CHOWN"] is False


def test_what_the_warnings_of_programs_say(guests: Sandboxes) -> None:
    """No KVM, packet socket, bpf, perf, module, mount, new namespace, or cgroup to write to, as root of the sandbox."""
    tried = {
        "qemu": "open('/dev/kvm')",
        "tcpdump": "socket.socket(17, 3, 0)",
        "bpftool": "call(321, 0, 0, 0)",
        "perf": "call(298, 0, 0, -1, -1, 0)",
        "modprobe": "call(313, -1, 0, 0)",
        "containers": "call(165, b'none', b'/mnt', b'tmpfs', 0, 0)",
        "podman": "call(272, 0x10000000)",
        "systemd": "os.listdir('/sys/fs/cgroup')",
        "control": "os.listdir('/')",
    }
    found = guests.ask(TRY, {"user": "0:0"}, env={"TRY": json.dumps(tried)})
    assert found == {name: name == "control" for name in tried}


def test_an_ordinary_image_has_no_notes(root: Path) -> None:
    """The base image has no word on stderr; one with such a program has one, in the plan and its JSON as well."""
    done = gvisor("--", "true")
    assert (done.returncode, done.stderr) == (0, b"")
    (root / "usr/bin").mkdir(parents=True)
    (root / "usr/bin/perf").write_text("")
    note = "the image has perf: there is no perf_event_open(2)"
    done = gvisor("--rootfs", root, "--", "/bin/hello")
    assert (done.returncode, done.stderr.decode()) == (0, f"ringfence: note: {note}\n")
    assert (planned(), planned("--rootfs", root)) == ([], [note])


def planned(*words: str | Path) -> list[str]:
    """Return the warnings of a plan as JSON, which its text has to have as well."""
    done = [commands.ringfence("plan", *GVISOR, *words, *form, "--", "true") for form in ((), ("--json",))]
    assert [(each.returncode, each.stderr) for each in done] == [(0, b"")] * 2
    warnings: list[str] = json.loads(done[1].stdout)["warnings"]
    assert all(warning in done[0].stdout.decode() for warning in warnings)
    return warnings


# When the sentry goes away


def sentry_of(home: Path) -> int:
    """Return the host pid of the sentry of this session's only sandbox."""
    (name,) = (path.name for path in (home / "sandboxes").iterdir())
    for file in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            words = file.read_bytes().split(b"\0")
        except OSError:
            continue
        if words[0] == b"runsc-sandbox" and name.encode() in words:
            return int(file.parent.name)
    raise AssertionError("no sentry")


def crash(pid: int) -> None:
    """Put an instruction that none is where the sentry's idle threads go on: a fault of its own code, as a bug is."""
    memory = os.open(f"/proc/{pid}/mem", os.O_RDWR)
    try:
        for task in os.listdir(f"/proc/{pid}/task"):
            words = Path(f"/proc/{pid}/task/{task}/syscall").read_text().split()
            if words[0] == "202":  # futex
                os.pwrite(memory, b"\x0f\x0b", int(words[-1], 16))  # ud2
    finally:
        os.close(memory)


JOB = "echo ready; while :; do sleep 0.02; done"


def started(home: Path, *words: str) -> "subprocess.Popen[bytes]":
    process = subprocess.Popen(
        [RINGFENCE, "run", *GVISOR, *words, "--", "sh", "-c", JOB],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    assert process.stdout is not None
    assert process.stdout.readline() == b"ready\n"
    return process


@pytest.mark.requires("x86_64")
def test_a_sentry_that_crashes(home: Path) -> None:
    """137, as for everything that was killed, and what gVisor said last."""
    process = started(home)
    crash(sentry_of(home))
    out, said = process.communicate(timeout=30)
    assert (process.returncode, out) == (137, b"")
    assert said.decode() == "ringfence: gVisor's kernel crashed: SIGILL: illegal instruction\n"


def test_a_sentry_that_is_killed(home: Path) -> None:
    """137, and that somebody did it, for gVisor had no time to say a word."""
    process = started(home)
    os.kill(sentry_of(home), signal.SIGKILL)
    _, said = process.communicate(timeout=30)
    assert process.returncode == 137
    assert said == b"ringfence: gVisor's kernel was killed from outside, without a word of its own\n"


def test_a_sentry_that_does_not_answer(home: Path) -> None:
    """A stopped kernel keeps nobody waiting beyond the time limit, and goes with its sandbox."""
    process = started(home, "--timeout", "2s")
    pid = sentry_of(home)
    os.kill(pid, signal.SIGSTOP)
    began = time.monotonic()
    _, said = process.communicate(timeout=30)
    assert process.returncode == 124
    assert b"time limit of 2 s reached" in said
    assert time.monotonic() - began < 15
    assert not os.path.exists(f"/proc/{pid}/mem") or _is_dead(pid)


def _is_dead(pid: int) -> bool:
    try:
        return "\nState:\tZ" in Path(f"/proc/{pid}/status").read_text()
    except OSError:
        return True


def test_a_detached_job_whose_sentry_crashed(home: Path) -> None:
    """``ps`` shows it as killed, its output up to then is there, and ``logs`` says that there is no more."""
    done = gvisor("-d", "--name", "crashed", "--", "sh", "-c", JOB)
    assert done.returncode == 0, done.stderr
    try:
        deadline = time.monotonic() + 10
        while not subprocess.run([RINGFENCE, "logs", "crashed"], capture_output=True).stdout:
            assert time.monotonic() < deadline
        crash(sentry_of(home))
        told = subprocess.run([RINGFENCE, "logs", "-f", "crashed"], capture_output=True, timeout=30)
        assert told.stdout == b"ready\n"
        assert b"the sandbox was killed" in told.stderr
        listed = subprocess.run([RINGFENCE, "ps", "--all"], capture_output=True, timeout=30)
        assert b"killed" in listed.stdout
    finally:
        subprocess.run([RINGFENCE, "rm", "--force", "crashed"], capture_output=True, timeout=30)


def test_errors_of_a_run_are_errors_in_python(guests: Sandboxes) -> None:
    """The same refusals as exceptions, with a code that is stable."""
    with pytest.raises(ringfence.RingfenceError) as error:
        guests.run(["true"], gvisor_platform="xen")
    assert error.value.code == "RF-HOST"
