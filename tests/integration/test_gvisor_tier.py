"""What a job of the gVisor tier is and sees: the same policy, images and mounts as at the linux tier."""

import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from test_image_run import image
from test_image_run import state as state  # noqa: PLC0414 - a fixture

import ringfence
from boxes import USER, Plain, Sandboxes, bind
from commands import ringfence as command
from commands import run
from detached import Cli, until
from ringfence.errors import MountError
from ringfence.sandbox.prepare import Request, plan_for

pytestmark = pytest.mark.requires("root", "crun", "runsc", "image:base", "userns", "compiler", "x86_64")

TIER = ("--isolation", "gvisor")
WORDS = """
def attempt(work, *args):
    try: return work(*args)
    except OSError as error: return -error.errno
def create(path, mode=0o644):
    os.close(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode))
    return 0
def read(path):
    with open(path) as file: return file.read()
def owner(path):
    found = os.lstat(path)
    return f'{found.st_uid}:{found.st_gid}'
"""
LOOK = """
import socket
def text(path):
    with open(path, errors='surrogateescape') as file: return file.read()
fds = {}
for name in os.listdir('/proc/self/fd'):
    try: fds[name] = os.readlink('/proc/self/fd/' + name)
    except OSError: pass  # that of the listing itself
def refused(address, port):
    with socket.socket() as client:
        client.settimeout(5)
        try: client.connect((address, port))
        except OSError as error: return error.errno
def loopback():
    with socket.socket() as server, socket.socket() as client:
        server.bind(('127.0.0.1', 0))
        server.listen()
        client.connect(server.getsockname())
        return client.getpeername()[0]
out({
    'ids': [os.getresuid(), os.getresgid(), os.getgroups()],
    'status': dict(line.split(':\\t', 1) for line in text('/proc/self/status').splitlines() if ':\\t' in line),
    'host name': socket.gethostname(),
    'interfaces': [name for _, name in socket.if_nameindex()],
    'loopback': loopback(),
    'refused': [refused('192.0.2.1', 80), refused('169.254.169.254', 80), refused('8.8.8.8', 53)],
    'mounts': {line.split()[1]: line.split()[3].split(',') for line in text('/proc/mounts').splitlines()},
    'sys': os.listdir('/sys'),
    'fds': fds,
    'cwd': os.getcwd(),
    'write': {path: attempt(create, path) for path in ('/x', '/etc/x', '/usr/x', '/root/x', '/var/tmp/x')},
    'writable': {path: attempt(create, path) for path in ('/tmp/x', '/work/x', '/dev/shm/x')},
    'pids': sorted(int(name) for name in os.listdir('/proc') if name.isdigit()),
    'environ': dict(os.environ),
    'umask': os.umask(0),
    'session': os.getsid(0) == os.getpid(),
})
"""


def mounted(*mounts: dict[str, object]) -> dict[str, object]:
    return {"filesystem.mounts": list(mounts)}


# The job


@pytest.fixture(scope="module")
def seen(guests: Sandboxes) -> dict[str, Plain]:
    os.environ["RINGFENCE_TEST_SECRET"] = "not for jobs"
    try:
        return guests.ask(WORDS + LOOK)
    finally:
        del os.environ["RINGFENCE_TEST_SECRET"]


def test_job_is_user_1000_without_any_right(seen: dict[str, Plain]) -> None:
    """Ids are 1000 without supplementary groups, all five capability sets are empty, a filter is there."""
    assert seen["ids"] == [[1000] * 3, [1000] * 3, []]
    status = seen["status"]
    assert {status[f"Cap{name}"] for name in ("Inh", "Prm", "Eff", "Bnd")} == {"0" * 16}  # type: ignore[index,call-overload]
    assert status["Seccomp"] == "2"  # type: ignore[index,call-overload]


def test_network_is_loopback_alone_and_works(seen: dict[str, Plain]) -> None:
    """Only lo, which is up; no route leads anywhere."""
    assert seen["interfaces"] == ["lo"]
    assert seen["loopback"] == "127.0.0.1"
    assert set(seen["refused"]) <= {101, 113}  # type: ignore[arg-type] # ENETUNREACH, EHOSTUNREACH


def test_only_tmp_work_and_shm_are_writable(seen: dict[str, Plain]) -> None:
    """Nothing can be made elsewhere; /sys is empty."""
    assert seen["writable"] == {"/tmp/x": 0, "/work/x": 0, "/dev/shm/x": 0}
    assert set(seen["write"].values()) <= {-30, -13}  # type: ignore[union-attr] # EROFS, EACCES
    assert seen["sys"] == []


def test_job_starts_clean(seen: dict[str, Plain]) -> None:
    """In /work, leader of a session, umask 022, three descriptors, one neighbour, no variable of the caller's."""
    assert (seen["cwd"], seen["session"], seen["umask"]) == ("/work", True, 0o022)
    assert set(seen["fds"]) == {"0", "1", "2"}  # type: ignore[arg-type]
    assert seen["pids"][0] == 1  # type: ignore[index,call-overload]
    assert len(seen["pids"]) == 2  # type: ignore[arg-type]
    assert set(seen["environ"]) - {"LC_CTYPE"} == {"HOME", "LANG", "PATH"}  # type: ignore[arg-type] # Python's own


def test_kernel_is_not_the_hosts(guests: Sandboxes, seen: dict[str, Plain]) -> None:
    """The version is gVisor's, and the host's name is not there."""
    release = guests.ask("out(os.uname().release)")
    assert release != os.uname().release
    assert seen["host name"] != os.uname().nodename


def test_ids_can_be_chosen_inside(guests: Sandboxes) -> None:
    """`user: 123:456` is that inside; user 0 too."""
    code = "out([os.getresuid(), os.getresgid(), os.getgroups()])"
    assert guests.ask(code, {"user": "123:456"}) == [[123] * 3, [456] * 3, []]
    assert guests.ask(code, {"user": "0:0"}) == [[0] * 3, [0] * 3, []]


@pytest.mark.parametrize(
    ("argv", "status"),
    [(["/nonexistent"], 127), (["nonexistent"], 127), (["/etc/passwd"], 126), (["/usr"], 126), ([""], 127)],
)
def test_command_that_cannot_be_run(guests: Sandboxes, argv: list[str], status: int) -> None:
    """Not found is 127, not executable or a directory is 126, with one line that names it."""
    result = guests.run(argv)
    assert (result.exit_status, result.stdout) == (status, b"")
    assert result.stderr.startswith(b"ringfence: ")
    assert result.stderr.count(b"\n") == 1


def test_status_and_signal_of_the_job(guests: Sandboxes) -> None:
    """The job's own status; 128 + N when signal N killed it; no note about a job that only failed."""
    assert guests.run(["sh", "-c", "exit 7"]).exit_status == 7
    for number in (1, 2, 6, 9, 10, 11, 15):
        killed = guests.run(["sh", "-c", f"kill -{number} $$"])
        assert (killed.exit_status, killed.signal, killed.notes) == (128 + number, number, ())


def test_a_time_limit_of_the_api(guests: Sandboxes) -> None:
    """`timeout` ends the job with 124, its output so far is there, and nothing is said of a crash."""
    result = guests.run(["sh", "-c", "echo early; exec sleep 60"], timeout=0.5)
    assert (result.exit_status, result.timed_out, result.stdout) == (124, True, b"early\n")
    assert result.notes == ()


def test_environment_and_directory_of_the_api(guests: Sandboxes) -> None:
    """`env` is added, `cwd` is where it starts."""
    result = guests.run(["sh", "-c", "echo $A; pwd"], env={"A": "b=c d"}, cwd="/usr/lib")
    assert result.stdout == b"b=c d\n/usr/lib\n"


def test_usage_counts_the_whole_sandbox(guests: Sandboxes) -> None:
    """CPU time and memory are what the ring's cgroup counted: a job that burns and fills shows."""
    idle = guests.run(["true"]).usage
    code = "import time\nb = bytearray(64 << 20)\nwhile time.process_time() < 0.5: pass"
    busy = guests.run(["python3", "-c", code], {"limits.memory": "256MiB"}).usage
    assert idle.cpu_s is not None
    assert busy.cpu_s is not None
    assert busy.cpu_s > idle.cpu_s + 0.15
    assert idle.memory_peak_bytes is not None
    assert busy.memory_peak_bytes is not None
    assert busy.memory_peak_bytes > idle.memory_peak_bytes + (50 << 20)
    assert busy.wall_s > 0.4


def test_the_proof_holds_and_says_what_ran(guests: Sandboxes) -> None:
    """A run has a proof of gVisor inside a ring of crun."""
    proof = guests.run(["true"]).proof
    assert proof is not None
    assert proof["holds"]
    assert proof["isolation"] == "gvisor"
    assert "runsc" in proof["runtime"]
    assert "in crun" in proof["runtime"]


@pytest.mark.requires("runc")
def test_the_ring_may_be_runcs(guests: Sandboxes) -> None:
    """runc makes the ring as well; the proof holds and names it."""
    result = ringfence.run(["id", "-u"], isolation="gvisor", runtime="runc", timeout=30)
    assert (result.stdout, result.exit_status) == (b"1000\n", 0)
    assert result.proof is not None
    assert result.proof["holds"]
    assert "in runc" in result.proof["runtime"]


def test_a_kept_plan_is_the_plan(home: Path, tmp_path: Path) -> None:
    """A plan from the cache equals the one that was kept, and a start from it does the same."""
    policy = tmp_path / "policy.yaml"
    policy.write_text("extends: untrusted\nisolation: gvisor\nlimits: {open_files: 77}\n")
    request = Request(policy=str(policy))
    made = plan_for(request)
    assert made["guest"] is not None
    assert plan_for(request) == made
    for _ in range(2):
        assert ringfence.run(["sh", "-c", "ulimit -n"], policy=str(policy)).stdout == b"77\n"


# Places to write to


def test_tmp_and_work_are_shared_by_all_jobs_of_a_sandbox(gvisor: Cli) -> None:
    """What one job leaves in /tmp and /work another finds; both are gone with the sandbox."""
    gvisor.detached("sh", "-c", "echo a > /tmp/a; echo b > /work/b; echo up; sleep 50")
    gvisor.wait_for_log("box", b"up")
    assert gvisor("exec", "box", "--", "cat", "/tmp/a", "/work/b").stdout == b"a\nb\n"
    assert gvisor.run("--", "ls", "/tmp", "/work").stdout == b"/tmp:\n\n/work:\n"


def test_files_behave_as_files(guests: Sandboxes) -> None:
    """Links, renames, locks, mappings, FIFOs, sockets and removed files in /tmp, served by the host."""
    code = """
import fcntl, mmap, socket, stat, threading
os.chdir('/tmp')
with open('a', 'w+b') as file:
    file.truncate(1 << 20)
    fcntl.flock(file, fcntl.LOCK_EX)
    with mmap.mmap(file.fileno(), 1 << 20) as mapped:
        mapped[5:8] = b'abc'
    file.seek(5)
    read = file.read(3).decode()
os.link('a', 'b'); os.symlink('b', 'c'); os.rename('a', 'd')
os.mkfifo('fifo')
thread = threading.Thread(target=lambda: open('fifo', 'w').write('through'))
thread.start()
fifo = open('fifo').read(); thread.join()
with socket.socket(socket.AF_UNIX) as server, socket.socket(socket.AF_UNIX) as client:
    server.bind('/tmp/socket'); server.listen(); client.connect('/tmp/socket')
    client.send(b'hello'); hello = server.accept()[0].recv(9).decode()
file = open('gone', 'w+'); os.unlink('gone'); file.write('still'); file.seek(0)
os.chmod('d', 0o640)
out([read, sorted(os.listdir('.')), os.stat('c').st_nlink, fifo, hello, file.read(),
     oct(stat.S_IMODE(os.stat('b').st_mode)), os.readlink('c')])
"""
    assert guests.ask(code) == [
        "abc",
        ["b", "c", "d", "fifo", "socket"],
        2,
        "through",
        "hello",
        "still",
        "0o640",
        "b",
    ]


def test_a_writable_root_is_the_sandboxes_own(guests: Sandboxes) -> None:
    """`filesystem.root: writable`: root changes his copy of the image, which nobody else sees."""
    overrides: dict[str, object] = {"filesystem.root": "writable", "user": "0:0"}
    script = "echo new > /etc/made && rm /etc/passwd && mkdir /made && cat /etc/made && ls -d /made"
    result = guests.run(["sh", "-c", script], overrides)
    assert (result.stdout, result.exit_status) == (b"new\n/made\n", 0), result.stderr
    again = guests.run(["sh", "-c", "ls /etc/made /made; test -e /etc/passwd"], overrides)
    assert (again.stdout, again.exit_status) == (b"", 0)


# Mounts


@pytest.fixture
def filled(shared: Path, probes: Path) -> Path:
    """A directory of USER's with files of his and of root's, and traps."""
    for name, uid, mode in (("mine", USER, 0o600), ("roots", 0, 0o600), ("all", 0, 0o644)):
        (shared / name).write_text(name)
        os.chown(shared / name, uid, uid)
        (shared / name).chmod(mode)
    shutil.copy(probes / "consume", shared / "set-user-id")
    (shared / "set-user-id").chmod(0o4755)
    (shared / "out").symlink_to("/etc/shadow")
    return shared


def test_read_only_mount(guests: Sandboxes, filled: Path) -> None:
    """The source's owner is the job, everybody else nobody, and nothing can be written."""
    code = """
out({'owners': {name: owner('/data/' + name) for name in ('', 'mine', 'roots', 'all')},
     'mine': attempt(read, '/data/mine'), 'roots': attempt(read, '/data/roots'), 'all': attempt(read, '/data/all'),
     'create': attempt(create, '/data/new'), 'chmod': attempt(os.chmod, '/data/mine', 0o644),
     'out': attempt(read, '/data/out')})
"""
    found = guests.ask(WORDS + code, mounted(bind(filled, "/data")))
    job, nobody = "1000:1000", "65534:65534"
    assert found["owners"] == {"": job, "mine": job, "roots": nobody, "all": nobody}
    assert (found["mine"], found["roots"], found["all"]) == ("mine", -13, "all")
    assert (found["create"], found["chmod"]) == (-30, -30)
    assert found["out"] == -2  # the base image has no such file, and the host's is not reached
    assert not (filled / "new").exists()


def test_writable_mount_leaves_files_of_the_sources_owner(guests: Sandboxes, filled: Path) -> None:
    """What a job writes belongs on the host to whoever owns the source; it cannot touch what is not his."""
    code = """
out({'create': attempt(create, '/data/new'), 'directory': attempt(os.mkdir, '/data/new-directory'),
     'link': attempt(os.symlink, '/etc/passwd', '/data/new-link'), 'remove': attempt(os.unlink, '/data/mine'),
     'roots': attempt(os.open, '/data/roots', os.O_WRONLY), 'all': attempt(os.open, '/data/all', os.O_WRONLY),
     'inside': owner('/data/new')})
"""
    found = guests.ask(WORDS + code, mounted(bind(filled, "/data", "rw")))
    assert found.pop("inside") == "1000:1000"
    assert [found.pop(name) for name in ("create", "directory", "link", "remove")] == [0, None, None, None]
    assert found == {"roots": -13, "all": -13}
    for name in ("new", "new-directory", "new-link"):
        at = (filled / name).lstat()
        assert (at.st_uid, at.st_gid) == (USER, USER)
    assert not (filled / "mine").exists()


def test_no_set_user_id_file_can_be_left_or_used(guests: Sandboxes, filled: Path) -> None:
    """A job cannot leave a program that runs as its owner for whoever starts it, and one that is there is dead."""
    (filled / "program").touch()
    os.chown(filled / "program", USER, USER)
    code = """
out([attempt(os.chmod, '/data/program', 0o4755), attempt(os.chmod, '/data/program', 0o2755),
     attempt(create, '/data/b', 0o4755), attempt(os.mknod, '/data/a', 0o104755)])
"""
    guests.ask(WORDS + code, mounted(bind(filled, "/data", "rw")))
    left = [path.name for path in filled.iterdir() if path.lstat().st_mode & 0o6000]
    assert left == ["set-user-id"]
    result = guests.run(["/data/set-user-id", "whoami"], mounted(bind(filled, "/data")))
    assert result.stdout.startswith(b"uid 1000 euid 1000 ")


def test_targets(guests: Sandboxes, shared: Path) -> None:
    """Below /tmp and /work, over a directory of the image, deep, nested, and single files, all in one sandbox."""
    (shared / "directory" / "inner").mkdir(parents=True)
    (shared / "directory" / "file").write_text("directory")
    (shared / "single").write_text("single")
    directories = ("/tmp/a/b", "/work/a", "/opt", "/data", "/new/deep/path", "/data/inner")
    files = ("/tmp/file", "/work/file", "/files/a", "/etc/extra")
    mounts = [bind(shared / "directory", target) for target in directories]
    mounts += [bind(shared / "single", target) for target in files]
    expected = {f"{target}/file": "directory" for target in directories} | dict.fromkeys(files, "single")
    code = f"out({{path: open(path).read() for path in {list(expected)!r}}})"
    assert guests.ask(code, mounted(*mounts)) == expected


@pytest.mark.parametrize("name", ["sp ace", "back\\slash", "co:lon,ma", "ünï", "\\040"])
def test_odd_names_of_sources_and_targets(guests: Sandboxes, shared: Path, name: str) -> None:
    """No character of a name means anything to us, the runtimes, the kernels' mount options or the proof."""
    (shared / name).mkdir()
    (shared / name / "file").write_text(name)
    code = f"out(open({'/data/' + name + '/file'!r}).read())"
    assert guests.ask(code, mounted(bind(shared / name, f"/data/{name}"))) == name


def test_changes_on_the_host_are_seen_and_the_other_way_round(guests: Sandboxes, shared: Path) -> None:
    """A mount is live: what the host writes or replaces meanwhile the job reads, and the host what the job writes."""
    (shared / "file").write_text("before")
    code = """
first = open('/data/file').read()
open('/data/mine', 'w').write('from inside')
hold(first)
open('/data/seen', 'w').write(open('/data/file').read() + ' ' + ','.join(sorted(os.listdir('/data'))))
"""
    with guests.held(code, mounted(bind(shared, "/data", "rw"))) as held:
        assert held.said == "before"
        assert (shared / "mine").read_text() == "from inside"
        (shared / "other").write_text("replaced, and longer")
        (shared / "other").rename(shared / "file")
        (shared / "added").touch()
    assert held.result is not None
    assert held.result.exit_status == 0, held.result.stderr
    assert (shared / "seen").read_text() == "replaced, and longer added,file,mine,seen"


def test_source_that_became_a_link_since_the_plan_is_refused(guests: Sandboxes, shared: Path) -> None:
    """As at the linux tier: nothing is run."""
    (shared / "source").mkdir()
    fields = mounted(bind(shared / "source", "/data"))
    assert guests.run(["true"], fields).exit_status == 0
    (shared / "source").rmdir()
    (shared / "source").symlink_to("/proc")
    with pytest.raises(MountError):
        guests.run(["true"], fields)


# Images


def test_the_view_of_the_host(guests: Sandboxes) -> None:
    """`--image host` shows the same of the host as at the linux tier: its programs, without its files.

    Only an empty /sys is there in any case: gVisor would put one of its own.
    """
    script = (
        "id -u; ls / | grep -v ^sys; ls /usr/bin /usr/sbin; ls -A /etc /home /root /opt /srv /var /var/lib /run;"
        " head -c 64 /etc/passwd; ls /etc/shadow /etc/hostname"
    )
    seen = [
        guests.run(["sh", "-c", f"{{ {script}; }} 2>&1"], image="host", isolation=tier)
        for tier in ("linux", "gvisor")
    ]
    assert seen[0].stdout.startswith(b"1000\n")
    assert b"\npython3\n" in seen[0].stdout or b"\nbash\n" in seen[0].stdout
    assert seen[1].stdout == seen[0].stdout


@pytest.fixture(scope="module")
def tree(probes: Path) -> Iterator[Path]:
    """A root directory with one static program and nothing else: no /proc, /dev, /tmp, /etc."""
    directory = Path(tempfile.mkdtemp(prefix="ringfence-root-"))
    directory.chmod(0o755)
    shutil.copy(probes / "consume", directory / "consume")
    yield directory
    shutil.rmtree(directory)


def test_a_root_directory_without_anything(tree: Path) -> None:
    """`--rootfs DIR`: what the kernel needs is made in the sandbox, and DIR is left as it was."""
    done = run(*TIER, "--rootfs", str(tree), "--", "/consume", "whoami")
    assert done.stdout.startswith(b"uid 1000 euid 1000 "), done.stderr
    assert (done.returncode, done.stderr) == (0, b"")
    assert os.listdir(tree) == ["consume"]


def sh(name: str, script: str, **more: object) -> list[str]:
    argv = ["/bin/sh", "-c", script]
    result = ringfence.run(argv, image=name, isolation="gvisor", timeout=30, **more)  # type: ignore[arg-type]
    assert result.exit_status == 0, result.stderr
    return result.stdout.decode().splitlines()


def test_an_image_starts_as_it_says(state: str) -> None:
    """Entrypoint, command, environment, working directory and user come from the image; words replace its command."""
    image(
        state,
        "guest:1",
        Entrypoint=["/bin/sh", "-c", 'echo "$0 $1 $COLOUR"; pwd; id -u'],
        Cmd=["own", "words"],
        Env=["COLOUR=red", "PATH=/usr/bin:/bin"],
        WorkingDir="/made/for it",
        User="app",
    )
    first = ringfence.run(image="guest:1", isolation="gvisor", timeout=30)
    assert first.stdout == b"own words red\n/made/for it\n1234\n"
    second = ringfence.run(
        ["given"], image="guest:1", isolation="gvisor", env={"COLOUR": "blue"}, cwd="/srv", timeout=30
    )
    assert second.stdout == b"given  blue\n/srv\n1234\n"
    done = run(*TIER, "--image", "guest:1", "--entrypoint", "/bin/echo", "--user", "77:78", "--", "words")
    assert (done.stdout, done.stderr) == (b"words\n", b"")


def test_layers_are_seen_as_one_with_their_owners(state: str) -> None:
    """Whiteouts hide, opaque directories start anew, a file of the image's user is his to read."""
    image(state, "guest:2", User="app")
    found = sh("guest:2", "cd /srv; ls -a; ls hidden; cat changed secret; stat -c %u secret changed")
    assert found == [".", "..", "changed", "hidden", "secret", "new", "newfor app", "1234", "0"]


def test_volumes_are_writable_within_the_disk_limit(state: str) -> None:
    """They share one bounded tmpfs with the work directory; the rest of the root stays read-only."""
    image(state, "guest:3", Volumes={"/srv/data": {}, "/var/lib/app": {}})
    script = (
        "echo a > /srv/data/f; echo b > /var/lib/app/f; echo c > /work/f; touch /srv/x 2>/dev/null || echo ro;"
        "head -c 6M /dev/zero > /srv/data/big && head -c 6M /dev/zero > /work/big 2>/dev/null || echo full;"
        "cat /srv/data/f /var/lib/app/f"
    )
    assert sh("guest:3", script, overrides={"limits.disk": "8MiB"}) == ["ro", "full", "a", "b"]


def test_the_stop_signal_of_the_image_is_used(state: str) -> None:
    """`stop` sends what the image asks for, so that its program can end in its own way."""
    image(state, "guest:4", StopSignal="SIGUSR1")
    script = "trap 'echo bye; exit 7' USR1; echo ready; while :; do sleep 0.05; done"
    words = ["run", *TIER, "-d", "--image", "guest:4", "--", "/bin/sh", "-c", script]
    sandbox = command(*words).stdout.decode().strip()
    try:
        until(lambda: b"ready" in command("logs", sandbox).stdout)
        assert command("stop", sandbox).returncode == 0
        assert command("logs", sandbox).stdout == b"ready\nbye\n"
        shown = json.loads(command("ps", "--all", "--json").stdout)
        assert [one["exit_status"] for one in shown if one["id"] == sandbox] == [7]
    finally:
        command("rm", "--force", sandbox)


def test_eight_callers_at_once(guests: Sandboxes, home: Path) -> None:
    """Runs of one program at the same time do not disturb each other."""
    code = (
        "import sys, ringfence\n"
        "r = ringfence.run(['echo', sys.argv[1]], isolation='gvisor', timeout=40)\n"
        "sys.stdout.buffer.write(r.stdout)"
    )
    callers = [
        subprocess.Popen([sys.executable, "-c", code, str(number)], stdout=subprocess.PIPE)
        for number in range(8)
    ]
    said = [caller.communicate(timeout=60)[0] for caller in callers]
    assert said == [f"{number}\n".encode() for number in range(8)]
