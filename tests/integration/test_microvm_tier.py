"""What a job of the microVM tier is and sees: the same policy and images as at the linux tier, in a machine of its own.

A boot takes seconds where the machine is emulated, so most questions are asked of one that is booted once.
"""

import json
import os
import shutil
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from test_gvisor_tier import LOOK, WORDS, mounted
from test_image_run import image
from test_image_run import state as state  # noqa: PLC0414 - a fixture

import ringfence
from boxes import USER, Plain, Sandboxes, bind
from commands import refused, run
from commands import ringfence as command
from detached import Cli
from ringfence.runtime.microvm.kernel import kernel_name
from ringfence.sandbox.prepare import Request, plan_for

pytestmark = pytest.mark.requires(
    "root", "crun", "qemu", "kernel", "mkfs.erofs", "image:base", "userns", "compiler", "x86_64"
)

TIER = ("--isolation", "microvm", "--allow-emulation")


# The job


@pytest.fixture(scope="module")
def first(machines: Sandboxes, filled: Path) -> ringfence.Result:
    """One run with a mount, whose job looks at all there is to see."""
    code = f"import json, os, sys\ndef out(value): print(json.dumps(value))\n{WORDS}{LOOK}{LOOK_AT_MOUNT}"
    os.environ["RINGFENCE_TEST_SECRET"] = "not for jobs"
    try:
        overrides = {
            **mounted(bind(filled, "/data"), bind(filled / "below", "/data/below")),
            "limits.cpus": 1,
        }
        result = machines.run(["python3", "-c", code], overrides, timeout=90)
    finally:
        del os.environ["RINGFENCE_TEST_SECRET"]
    assert result.exit_status == 0, result.stderr.decode()
    return result


@pytest.fixture(scope="module")
def seen(first: ringfence.Result) -> dict[str, Plain]:
    found: dict[str, Plain] = json.loads(first.stdout.splitlines()[0])
    return found


def test_job_is_user_1000_without_any_right(seen: dict[str, Plain]) -> None:
    """Ids are 1000 without supplementary groups, all five capability sets are empty, a filter is there."""
    assert seen["ids"] == [[1000] * 3, [1000] * 3, []]
    status: dict[str, str] = seen["status"]  # type: ignore[assignment]
    assert {status[f"Cap{name}"] for name in ("Inh", "Prm", "Eff", "Bnd", "Amb")} == {"0" * 16}
    assert (status["NoNewPrivs"], status["Seccomp"], status["Seccomp_filters"]) == ("1", "2", "1")


def test_network_is_loopback_alone_and_works(seen: dict[str, Plain]) -> None:
    """Only lo, which is up; no route leads anywhere."""
    assert seen["interfaces"] == ["lo"]
    assert seen["loopback"] == "127.0.0.1"
    assert set(seen["refused"]) == {101}  # type: ignore[arg-type] # ENETUNREACH


def test_only_tmp_work_and_shm_are_writable(seen: dict[str, Plain]) -> None:
    """Nothing can be made elsewhere; /sys is empty."""
    assert seen["writable"] == {"/tmp/x": 0, "/work/x": 0, "/dev/shm/x": 0}
    assert set(seen["write"].values()) <= {-30, -13}  # type: ignore[union-attr] # EROFS, EACCES
    assert seen["sys"] == []


def test_job_starts_clean(seen: dict[str, Plain]) -> None:
    """In /work, leader of a session, umask 022, three descriptors, one neighbour, no variable of the caller's."""
    assert (seen["cwd"], seen["session"], seen["umask"]) == ("/work", True, 0o022)
    assert set(seen["fds"]) == {"0", "1", "2"}  # type: ignore[arg-type]
    assert seen["pids"] == [1, 2]
    assert set(seen["environ"]) - {"LC_CTYPE"} == {"HOME", "LANG", "PATH"}  # type: ignore[arg-type] # Python's own


def test_every_mount_is_as_small_as_at_the_linux_tier(seen: dict[str, Plain]) -> None:
    """No mount but those that were asked for and what hides files of the kernel; none with devices or set-id bits."""
    mounts: dict[str, list[str]] = seen["mounts"]  # type: ignore[assignment]
    own = {target for target in mounts if not target.startswith("/proc/")}
    assert own == {
        "/", "/proc", "/dev", "/dev/pts", "/dev/shm", "/tmp", "/work", "/data", "/data/below", "/probe",
    }  # fmt: skip
    for target in own:
        assert "nosuid" in mounts[target], target
        assert ("nodev" in mounts[target]) != target.startswith("/dev") or target == "/dev/shm", target
    assert {target for target in own if "rw" in mounts[target]} == own - {
        "/",
        "/data",
        "/data/below",
        "/probe",
    }


def test_the_proof_holds_and_says_what_ran(first: ringfence.Result) -> None:
    """Every control was seen as asked, and where KVM does not work the proof says that no hardware is the boundary."""
    proof = first.proof
    assert proof is not None
    assert proof["holds"]
    assert proof["isolation"] == "microvm"
    lines = {line["control"]: line for line in proof["lines"]}
    accelerator = lines["vmm.accelerator"]["observed"]
    assert ("isolation" in proof["unenforced"]) == (accelerator == "tcg")
    if accelerator == "tcg":
        assert "no hardware boundary" in str(lines["isolation"]["observed"])
    assert lines["kernel"]["observed"] == "own"
    assert lines["mount:/data"]["observed"] == "erofs ro,nosuid,nodev"


def test_usage_counts_the_whole_machine(first: ringfence.Result) -> None:
    """CPU time and memory are what the ring's cgroup counted, the VMM and the guest's kernel included."""
    usage = first.usage
    assert usage.cpu_s is not None
    assert 0.01 < usage.cpu_s < 120
    assert usage.memory_peak_bytes is not None
    assert 30 << 20 < usage.memory_peak_bytes < 1 << 30
    assert usage.wall_s > 0.01


# Mounts are copies


LOOK_AT_MOUNT = """
out({'owners': {name: owner('/data/' + name) for name in ('', 'mine', 'roots', 'all', 'many')},
     'mine': attempt(read, '/data/mine'), 'roots': attempt(read, '/data/roots'), 'all': attempt(read, '/data/all'),
     'create': attempt(create, '/data/new'), 'chmod': attempt(os.chmod, '/data/mine', 0o644),
     'out': attempt(read, '/data/out'), 'inside': attempt(read, '/data/inside'),
     'links': [os.readlink('/data/out'), os.readlink('/data/inside')],
     'odd': attempt(read, '/data/ünï co:lon\\\\'), 'nested': attempt(read, '/data/below/file'),
     'many': len(os.listdir('/data/many')), 'large': hash_of('/data/large'),
     'kinds': [attempt(os.lstat, '/data/' + name) is not None and oct(os.lstat('/data/' + name).st_mode >> 12)
               for name in ('fifo', 'disk')],
     'disk': attempt(os.open, '/data/disk', os.O_RDONLY),
     'set-id': __import__('subprocess').run(['/data/set-user-id', 'whoami'], capture_output=True).stdout.decode()})
""".replace(
    "hash_of('/data/large')",
    "__import__('hashlib').sha256(open('/data/large', 'rb').read()).hexdigest()",
)


@pytest.fixture(scope="module")
def filled(probes: Path) -> Iterator[Path]:
    """A directory of USER's with files of his and of root's, and traps."""
    shared = Path(tempfile.mkdtemp(prefix="ringfence-shared-"))
    shared.chmod(0o755)
    os.chown(shared, USER, USER)
    for name, uid, mode in (("mine", USER, 0o600), ("roots", 0, 0o600), ("all", 0, 0o644)):
        (shared / name).write_text(name)
        os.chown(shared / name, uid, uid)
        (shared / name).chmod(mode)
    shutil.copy(probes / "consume", shared / "set-user-id")
    (shared / "set-user-id").chmod(0o4755)
    (shared / "out").symlink_to("/etc/shadow")
    (shared / "inside").symlink_to("all")
    (shared / "ünï co:lon\\").write_text("odd")
    (shared / "below").mkdir()
    (shared / "below" / "file").write_text("nested")
    (shared / "many").mkdir()
    for number in range(500):
        (shared / "many" / f"{number}").touch()
    (shared / "large").write_bytes(bytes(range(256)) * 20_000)
    os.mkfifo(shared / "fifo")
    os.mknod(shared / "disk", 0o60666, os.makedev(254, 0))
    yield shared
    shutil.rmtree(shared)


@pytest.fixture(scope="module")
def copied(first: ringfence.Result) -> dict[str, Plain]:
    found: dict[str, Plain] = json.loads(first.stdout.splitlines()[1])
    return found


def test_read_only_mount(copied: dict[str, Plain], filled: Path) -> None:
    """The source's owner is the job, everybody else nobody; what only others may read the job may not; no writing."""
    job, nobody = "1000:1000", "65534:65534"
    assert copied["owners"] == {"": job, "mine": job, "roots": nobody, "all": nobody, "many": nobody}
    assert (copied["mine"], copied["roots"], copied["all"]) == ("mine", -13, "all")
    assert (copied["create"], copied["chmod"]) == (-30, -30)
    assert not (filled / "new").exists()


def test_what_is_copied_is_what_is_there(copied: dict[str, Plain]) -> None:
    """Odd names, many files, large ones, directories within; links are links and followed inside alone."""
    import hashlib

    assert copied["links"] == ["/etc/shadow", "all"]
    assert copied["out"] == -2  # the base image has no such file, and the host's is not reached
    assert (copied["inside"], copied["odd"], copied["nested"], copied["many"]) == (
        "all",
        "odd",
        "nested",
        500,
    )
    assert copied["large"] == hashlib.sha256(bytes(range(256)) * 20_000).hexdigest()


def test_nothing_dangerous_comes_along(copied: dict[str, Plain]) -> None:
    """A device node opens nothing, a set-user-id bit gives nothing."""
    assert copied["disk"] in (-1, -13)
    assert copied["set-id"].startswith("uid 1000 euid 1000 ")  # type: ignore[union-attr]


@pytest.mark.parametrize(
    ("mode", "name", "words"),
    [
        (":rw", "directory", "nothing is copied back yet"),
        ("", "file", "mount the directory that it is in"),
    ],
)
def test_mounts_that_are_not_built_yet_are_refused(shared: Path, mode: str, name: str, words: str) -> None:
    """Before anything is booted, by the path, with what to do instead."""
    (shared / "directory").mkdir()
    (shared / "file").touch()
    done = run(*TIER, "-v", f"{shared / name}:/data{mode}", "--", "true")
    refused(done, 125, str(shared / name), words, "[RF-MOUNT]")


# Commands, ids, images


@pytest.mark.parametrize(
    ("argv", "status", "says"),
    [
        (["/nonexistent"], 127, b"'/nonexistent': No such file"),
        (["nonexistent"], 127, b"'nonexistent': No such file"),
        (["/etc/passwd"], 126, b"'/etc/passwd': Permission denied"),
        (["/usr"], 126, b"'/usr': Permission denied"),
    ],
)
def test_command_that_cannot_be_run(booted: Cli, argv: list[str], status: int, says: bytes) -> None:
    """Not found is 127, not executable or a directory is 126, with one line that names it."""
    done = booted("exec", "box", "--", *argv, status=status)
    assert done.stdout == b""
    assert says in done.stderr
    assert done.stderr.count(b"\n") == 1


def test_first_command_that_cannot_be_run(machines: Sandboxes) -> None:
    """The same of the command that a machine was made for; nothing is said of a machine that ended."""
    result = machines.run(["nonexistent"])
    assert (result.exit_status, result.stdout, result.notes) == (127, b"", ())
    assert result.stderr.startswith(b"ringfence: 'nonexistent': No such file")
    assert result.stderr.count(b"\n") == 1


def test_status_and_signal_of_the_job(booted: Cli, machines: Sandboxes) -> None:
    """The job's own status; 128 + N when signal N killed it; no note about a job that only failed."""
    booted("exec", "box", "--", "sh", "-c", "exit 7", status=7)
    for number in (1, 2, 6, 9, 11, 15):
        booted("exec", "box", "--", "sh", "-c", f"kill -{number} $$", status=128 + number)
    killed = machines.run(["sh", "-c", "kill -11 $$"])
    assert (killed.exit_status, killed.signal, killed.notes) == (139, 11, ())


def test_ids_environment_and_directory_of_the_api(machines: Sandboxes) -> None:
    """`user: 123:456` is that inside, `env` is added, `cwd` is where it starts; the VMM has that id in its ring."""
    script = "id -u; id -g; id -G; echo $A; pwd"
    result = machines.run(
        ["sh", "-c", script], {"user": "123:456"}, env={"A": "b=c d"}, cwd="/usr/lib", timeout=60
    )
    assert result.stdout == b"123\n456\n456\nb=c d\n/usr/lib\n"
    assert result.proof is not None
    lines = {line["control"]: line["observed"] for line in result.proof["lines"]}
    assert (lines["vmm.credentials.uid"], lines["bridge.credentials.gid"]) == (123, 456)


def test_kernel_and_clock_are_its_own(booted: Cli) -> None:
    """Another kernel than the host's with its own name, a clock that is right, and time that passes as it does here."""
    release, name, before, after = (
        booted("exec", "box", "--", "sh", "-c", "uname -r; uname -n; date +%s.%N; sleep 1; date +%s.%N")
        .stdout.decode()
        .split()
    )
    assert release != os.uname().release
    assert name not in (os.uname().nodename, "")
    assert abs(time.time() - float(after)) < 5
    assert 0.9 < float(after) - float(before) < 4


@pytest.mark.requires("runc")
def test_the_ring_may_be_runcs(machines: Sandboxes) -> None:
    """runc makes the ring as well, and the proof holds."""
    result = ringfence.run(
        ["id", "-u"], isolation="microvm", allow_emulation=True, runtime="runc", timeout=60
    )
    assert (result.stdout, result.exit_status) == (b"1000\n", 0)
    assert result.proof is not None
    assert result.proof["holds"]
    assert "runc" in result.proof["runtime"]


def test_a_kept_plan_is_the_plan(home: Path, tmp_path: Path) -> None:
    """A plan from the cache equals the one that was kept; without leave to emulate it is another."""
    policy = tmp_path / "policy.yaml"
    policy.write_text("extends: untrusted\nisolation: microvm\nlimits: {open_files: 77}\n")
    request = Request(policy=str(policy), allow_emulation=True)
    made = plan_for(request)
    assert made["machine"] is not None
    assert plan_for(request) == made
    if made["machine"]["accelerator"] == "tcg":
        with pytest.raises(ringfence.RingfenceError, match="needs KVM"):
            plan_for(Request(policy=str(policy)))


def test_a_plan_lists_its_devices() -> None:
    """``plan --json`` has what the machine is made of, and starts nothing."""
    done = command("plan", *TIER, "--json", "--", "true")
    assert done.returncode == 0, done.stderr
    machine = json.loads(done.stdout)["machine"]
    assert machine["devices"] == ["console", "serial link", "rng", "disk vda"]


def test_files_behave_as_files(booted: Cli) -> None:
    """Links, renames, locks, mappings, FIFOs, sockets and removed files in /tmp."""
    code = """
import fcntl, mmap, os, socket, threading
os.makedirs('/tmp/f'); os.chdir('/tmp/f')
with open('a', 'w+b') as file:
    file.truncate(1 << 20)
    fcntl.flock(file, fcntl.LOCK_EX)
    with mmap.mmap(file.fileno(), 1 << 20) as mapped: mapped[5:8] = b'abc'
    file.seek(5)
    read = file.read(3).decode()
os.link('a', 'b'); os.symlink('b', 'c'); os.rename('a', 'd')
os.mkfifo('fifo')
thread = threading.Thread(target=lambda: open('fifo', 'w').write('through'))
thread.start()
fifo = open('fifo').read(); thread.join()
with socket.socket(socket.AF_UNIX) as server, socket.socket(socket.AF_UNIX) as client:
    server.bind('socket'); server.listen(); client.connect('socket')
    client.send(b'hello'); hello = server.accept()[0].recv(9).decode()
file = open('gone', 'w+'); os.unlink('gone'); file.write('still'); file.seek(0)
print([read, sorted(os.listdir('.')), os.stat('c').st_nlink, fifo, hello, file.read()])
"""
    said = booted("exec", "box", "--", "python3", "-c", code).stdout
    assert said == b"['abc', ['b', 'c', 'd', 'fifo', 'socket'], 2, 'through', 'hello', 'still']\n"


def test_a_writable_root_is_the_machines_own(machines: Sandboxes) -> None:
    """`filesystem.root: writable`: root changes his copy of the image, which nobody else sees."""
    overrides: dict[str, object] = {"filesystem.root": "writable", "user": "0:0"}
    script = "ls /etc/made /made 2>/dev/null; test -e /etc/passwd && echo new > /etc/made && rm /etc/passwd"
    script += " && mkdir /made && cat /etc/made && ls -d /made"
    for _ in range(2):
        result = machines.run(["sh", "-c", script], overrides, timeout=60)
        assert (result.stdout, result.exit_status) == (b"new\n/made\n", 0), result.stderr


def test_a_root_directory_without_anything(probes: Path, shared: Path) -> None:
    """`--rootfs DIR` is copied at the start: what the kernel needs is made in the guest, and DIR is left as it was."""
    shutil.copy(probes / "consume", shared / "consume")
    os.chown(shared, 0, 0)
    (shared / "secret").write_text("of root's")
    (shared / "secret").chmod(0o600)
    done = run(*TIER, "--rootfs", str(shared), "--", "/consume", "list", "/secret", "/consume")
    assert (done.returncode, done.stderr) == (0, b"")
    secret, program = done.stdout.decode().splitlines()
    assert "13" in secret.split()  # EACCES: its owner is who it was
    assert "of root's" not in secret
    assert "0" in program.split()
    assert sorted(os.listdir(shared)) == ["consume", "secret"]


def test_the_hosts_own_files_are_refused() -> None:
    """`--image host` would share the host's files, and nothing is shared with a guest."""
    refused(
        run(*TIER, "--image", "host", "--", "true"), 125, "cannot be the image of a microVM", "[RF-MOUNT]"
    )


def test_an_image_starts_as_it_says(state: str) -> None:
    """Entrypoint, command, environment, directory, user and volumes are the image's; its layers are seen as one."""
    script = 'echo "$0 $1 $COLOUR"; pwd; id -u; cd /srv; ls; cat changed secret; echo a > /srv/data/f && cat data/f'
    image(
        state,
        "machine:1",
        Entrypoint=["/bin/sh", "-c", script],
        Cmd=["own", "words"],
        Env=["COLOUR=red", "PATH=/usr/bin:/bin"],
        WorkingDir="/made/for it",
        User="app",
        Volumes={"/srv/data": {}},
    )
    name = kernel_name("/var/lib/ringfence")
    shutil.copytree(f"/var/lib/ringfence/kernels/{name}", f"{state}/kernels/{name}")
    os.symlink(name, f"{state}/kernels/default")
    result = ringfence.run(image="machine:1", isolation="microvm", allow_emulation=True, timeout=60)
    expected = b"own words red\n/made/for it\n1234\nchanged\ndata\nhidden\nsecret\nnewfor app\na\n"
    assert result.stdout == expected, result.stderr


def test_a_kernel_parameter_is_set_and_said_to_be_the_guests(machines: Sandboxes) -> None:
    """It is the guest's own, and the proof says that the host has not seen it."""
    fields = {"sysctls": {"kernel.msgmax": "4242"}}
    result = machines.run(["cat", "/proc/sys/kernel/msgmax"], fields, timeout=60)
    assert result.stdout == b"4242\n"
    assert result.proof is not None
    (line,) = [line for line in result.proof["lines"] if line["control"] == "sysctl:kernel.msgmax"]
    assert (line["asked"], line["vantage"], line["ok"]) == ("4242", "not observable", None)
