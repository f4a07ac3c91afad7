"""Bind mounts: what shows inside, what it leaves on the host, and which sources and targets are refused."""

import os
import shutil
import socket
import stat
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

import ringfence
from boxes import USER, Sandboxes, bind
from ringfence.errors import MountError, PolicyError
from ringfence.linux.paths import state_dir
from ringfence.runtime.stage import Ids, Stager
from ringfence.sandbox import launch
from ringfence.sandbox.prepare import Request, plan_for

pytestmark = pytest.mark.requires("root", "compiler")

STRANGER = 61235
# Words for the programs below: an attempt gives its result, or the errno as a negative number.
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
Outside = Callable[..., "subprocess.CompletedProcess[bytes]"]


def mounted(*mounts: dict[str, object]) -> dict[str, object]:
    return {"filesystem.mounts": list(mounts)}


@pytest.fixture
def filled(shared: Path, probes: Path) -> Path:
    """A directory of USER's with files of his, of root's and of a stranger's, and traps."""
    owners = (("mine", USER, 0o600), ("roots", 0, 0o600), ("strangers", STRANGER, 0o600), ("all", 0, 0o644))
    for name, uid, mode in owners:
        (shared / name).write_text(name)
        os.chown(shared / name, uid, uid)
        (shared / name).chmod(mode)
    shutil.copy(probes / "consume", shared / "set-user-id")
    (shared / "set-user-id").chmod(0o4755)
    os.mknod(shared / "node", stat.S_IFCHR | 0o666, os.makedev(1, 3))
    (shared / "node").chmod(0o666)
    (shared / "out").symlink_to("/etc/shadow")
    return shared


def test_read_only_mount(sandboxes: Sandboxes, filled: Path) -> None:
    """The source's owner is the job, everybody else nobody, and nothing can be written."""
    code = """
out({'owners': {name: owner('/data/' + name) for name in ('', 'mine', 'roots', 'strangers', 'all')},
     'mine': attempt(read, '/data/mine'), 'roots': attempt(read, '/data/roots'), 'all': attempt(read, '/data/all'),
     'strangers': attempt(read, '/data/strangers'), 'create': attempt(create, '/data/new'),
     'chmod': attempt(os.chmod, '/data/mine', 0o644), 'out': attempt(read, '/data/out'),
     'node': attempt(read, '/data/node')})
"""
    found = sandboxes.ask(WORDS + code, mounted(bind(filled, "/data")))
    job, nobody = "1000:1000", "65534:65534"
    assert found["owners"] == {"": job, "mine": job, "roots": nobody, "strangers": nobody, "all": nobody}
    assert (found["mine"], found["roots"], found["strangers"], found["all"]) == ("mine", -13, -13, "all")
    assert (found["create"], found["chmod"]) == (-30, -30)
    assert found["out"] == -2  # the base image has no such file, and the host's is not reached
    assert found["node"] == -13


def test_writable_mount_leaves_files_of_the_sources_owner(sandboxes: Sandboxes, filled: Path) -> None:
    """What a job writes belongs on the host to whoever owns the source; it cannot touch what is not his."""
    code = """
out({'create': attempt(create, '/data/new'), 'directory': attempt(os.mkdir, '/data/new-directory'),
     'link': attempt(os.symlink, '/etc/passwd', '/data/new-link'), 'remove': attempt(os.unlink, '/data/mine'),
     'roots': attempt(os.open, '/data/roots', os.O_WRONLY), 'all': attempt(os.open, '/data/all', os.O_WRONLY),
     'give': attempt(os.chown, '/data/new', 0, 0), 'inside': owner('/data/new')})
"""
    found = sandboxes.ask(WORDS + code, mounted(bind(filled, "/data", "rw")))
    assert found.pop("give") in (-1, -75)  # EPERM, or EOVERFLOW: there is no such id on the mount
    assert found.pop("inside") == "1000:1000"
    assert [found.pop(name) for name in ("create", "directory", "link", "remove")] == [0, None, None, None]
    assert found == {"roots": -13, "all": -13}
    for name in ("new", "new-directory", "new-link"):
        at = (filled / name).lstat()
        assert (at.st_uid, at.st_gid) == (USER, USER)
    assert not (filled / "mine").exists()


def test_no_set_user_id_file_can_be_left(sandboxes: Sandboxes, shared: Path, outside: Outside) -> None:
    """A job cannot leave a program that runs as its owner for whoever starts it; outside its owner can."""
    (shared / "program").touch()
    os.chown(shared / "program", USER, USER)
    control = outside(["chmod", "4755", shared / "program"])
    assert (control.returncode, (shared / "program").stat().st_mode & 0o7777) == (0, 0o4755)
    (shared / "program").chmod(0o755)
    code = """
fd = os.open('/data/program', os.O_RDONLY)
out([attempt(os.chmod, '/data/program', 0o4755), attempt(os.chmod, '/data/program', 0o2755),
     attempt(os.fchmod, fd, 0o6755), attempt(os.mknod, '/data/a', 0o104755), attempt(create, '/data/b', 0o4755),
     attempt(os.open, '/data', os.O_TMPFILE | os.O_RDWR, 0o4755), attempt(os.chmod, '/data/program', 0o700)])
"""
    found = sandboxes.ask(WORDS + code, mounted(bind(shared, "/data", "rw")))
    assert found == [-1] * 6 + [None]
    assert [path.name for path in shared.iterdir() if path.stat().st_mode & 0o6000] == []


def test_set_user_id_program_and_device_of_a_mount_are_dead(
    sandboxes: Sandboxes, filled: Path, outside: Outside
) -> None:
    """nosuid and nodev hold on mounts; outside both are alive for an ordinary user."""
    assert outside([filled / "set-user-id", "whoami"]).stdout.startswith(f"uid {USER} euid 0 ".encode())
    assert outside(["cat", filled / "node"]).returncode == 0
    result = sandboxes.run(["/data/set-user-id", "whoami"], mounted(bind(filled, "/data", "rw")))
    assert result.stdout.startswith(b"uid 1000 euid 1000 ")
    assert sandboxes.run(["cat", "/data/node"], mounted(bind(filled, "/data", "rw"))).exit_status == 1


@pytest.mark.parametrize("part", ["source", "parent"])
def test_source_that_becomes_a_symlink_after_the_plan(sandboxes: Sandboxes, shared: Path, part: str) -> None:
    """A symlink put in place of a source, or of a directory above it, is refused at the start."""
    source = shared / "parent" / "source"
    source.mkdir(parents=True)
    plan = plan_for(Request(runtime=sandboxes.runtime, overrides=mounted(bind(source, "/data"))))
    victim = source if part == "source" else source.parent
    victim.rename(shared / "moved")
    victim.symlink_to(shared / "moved" if part == "parent" else "/etc")
    running = launch.prepare(plan, name="", argv=["true"], detached=False, remove=True)
    try:
        with pytest.raises(MountError, match="changed since the plan"):
            launch.start(running)
    finally:
        running.close()


def test_symlink_as_source_is_judged_by_where_it_leads(sandboxes: Sandboxes, shared: Path) -> None:
    """A symlink to a harmless directory works; one to /proc or to Ringfence's state is refused by its name."""
    (shared / "real").mkdir()
    (shared / "good").symlink_to("real")
    assert sandboxes.run(["ls", "/data"], mounted(bind(shared / "good", "/data"))).exit_status == 0
    for name, target in (("kernel", "/proc"), ("state", state_dir()), ("all", "/"), ("loop", "loop")):
        (shared / name).symlink_to(target)
        with pytest.raises(MountError, match=name):
            sandboxes.run(["true"], mounted(bind(shared / name, "/data")))


REFUSED = """
/ /proc /proc/self/root /proc/1/ns /sys /sys/fs/cgroup /dev /dev/null /dev/shm /run /var /var/run /var/lib /etc /root
/home /var/lib/ringfence /var/lib/ringfence/images /run/ringfence /run/ringfence/ranges /nonexistent
"""


@pytest.mark.parametrize("source", REFUSED.split())
def test_sources_that_are_refused(sandboxes: Sandboxes, source: str) -> None:
    """The host as a whole, the kernel's trees, and Ringfence's own directories with all that holds them."""
    with pytest.raises((MountError, PolicyError), match="source"):
        sandboxes.run(["true"], mounted(bind(source, "/data")))


def test_own_run_directory_is_refused_wherever_it_is(sandboxes: Sandboxes, home: Path) -> None:
    """Also a run directory that was chosen by RINGFENCE_RUN_DIR, and its parent, whatever the policy allows."""
    for source in (home, home / "sandboxes", home.parent):
        with pytest.raises(MountError, match="Ringfence's own"):
            sandboxes.run(["true"], mounted(bind(source, "/data", allow_dangerous=True)))


@pytest.mark.parametrize("kind", ["docker.sock", "socket", "fifo"])
def test_ways_to_speak_to_the_host_are_refused(sandboxes: Sandboxes, shared: Path, kind: str) -> None:
    """Sockets, whatever their name, and FIFOs; whoever writes allow_dangerous at the mount gets them."""
    path = shared / kind
    if kind == "fifo":
        os.mkfifo(path)
    else:
        with socket.socket(socket.AF_UNIX) as server:
            server.bind(str(path))
    with pytest.raises((MountError, PolicyError), match="source"):
        sandboxes.run(["true"], mounted(bind(path, "/data")))
    if kind == "docker.sock":  # and the directory it lies in
        with pytest.raises((MountError, PolicyError), match="source"):
            sandboxes.run(["true"], mounted(bind(shared, "/data")))
    allowed = mounted(bind(path, "/data", allow_dangerous=True))
    assert sandboxes.run(["test", "-e", "/data"], allowed).exit_status == 0


def test_programs_of_the_host_are_not_writable(sandboxes: Sandboxes) -> None:
    """/usr may be shown, and is refused as soon as a job could write to it."""
    assert sandboxes.run(["test", "-d", "/data/bin"], mounted(bind("/usr", "/data"))).exit_status == 0
    with pytest.raises(MountError, match="writable"):
        sandboxes.run(["true"], mounted(bind("/usr", "/data", "rw")))


def test_device_node_is_no_mount(sandboxes: Sandboxes) -> None:
    """Not even with allow_dangerous: mounts are nodev, and devices have a field of their own."""
    with pytest.raises(MountError, match="list it under devices"):
        sandboxes.run(["true"], mounted(bind("/dev/null", "/data/null", allow_dangerous=True)))


@pytest.fixture
def node() -> Iterator[str]:
    """A device node that everybody may open on the host, of a device that no sandbox has by default."""
    path = "/dev/ringfence-test"
    os.mknod(path, stat.S_IFCHR, os.stat("/dev/fuse").st_rdev)
    os.chmod(path, 0o666)
    yield path
    os.unlink(path)


@pytest.mark.skipif(not os.path.exists("/dev/fuse"), reason="no /dev/fuse")
def test_device_of_the_policy(sandboxes: Sandboxes, node: str) -> None:
    """`devices` gives a node of the host with the access that is written and no more; without it there is none."""
    code = WORDS + f"out([attempt(os.open, {node!r}, mode) > 0 for mode in (os.O_RDONLY, os.O_RDWR)])"
    assert sandboxes.ask(code) == [False, False]
    assert sandboxes.ask(code, {"devices": [f"{node}:r"]}) == [True, False]
    assert sandboxes.ask(code, {"devices": [f"{node}:rw"]}) == [True, True]


def test_whole_host_is_never_shown(sandboxes: Sandboxes) -> None:
    """/ holds Ringfence's own state: not even allow_dangerous shows it."""
    with pytest.raises(MountError, match="Ringfence's own"):
        sandboxes.run(["true"], mounted(bind("/", "/data", allow_dangerous=True)))


def test_submounts_do_not_come_along(sandboxes: Sandboxes, shared: Path) -> None:
    """What is mounted below a source is not shown: a bind is of one file system."""
    (shared / "below").mkdir()
    script = (
        f'mount -t tmpfs none {shared}/below && touch {shared}/below/secret && ls {shared}/below && exec "$@"'
    )
    code = f"""
import ringfence
fields = {{'filesystem.mounts': [{bind(shared, "/data")!r}]}}
result = ringfence.run(['ls', '/data/below'], runtime={sandboxes.runtime!r}, overrides=fields)
print(result.exit_status, result.stdout)
"""
    apart = ["unshare", "--mount", "--propagation", "private", "sh", "-c", script, "sh"]
    done = subprocess.run([*apart, sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.stdout == "secret\n0 b''\n", done.stderr


def test_targets(sandboxes: Sandboxes, shared: Path) -> None:
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
    assert sandboxes.ask(code, mounted(*mounts)) == expected


def test_work_directory_can_be_a_mount(sandboxes: Sandboxes, shared: Path) -> None:
    """A mount at /work takes the place of the tmpfs."""
    result = sandboxes.run(["sh", "-c", "pwd; echo hello > result"], mounted(bind(shared, "/work", "rw")))
    assert (result.stdout, result.exit_status) == (b"/work\n", 0)
    assert (shared / "result").read_text() == "hello\n"


@pytest.mark.parametrize(
    "target", ["/", "/proc", "/proc/self", "/dev/x", "/sys/x", "/tmp", "relative", "/a/../b"]
)
def test_targets_that_are_refused(sandboxes: Sandboxes, shared: Path, target: str) -> None:
    """What is Ringfence's own inside, and what is no plain absolute path."""
    with pytest.raises(PolicyError, match="target"):
        sandboxes.run(["true"], mounted(bind(shared, target)))


def test_target_through_a_link_in_an_earlier_mount(sandboxes: Sandboxes, shared: Path) -> None:
    """What a former job left in a writable mount cannot send a later mount elsewhere."""
    (shared / "outer").mkdir()
    (shared / "outer" / "inner").symlink_to("/etc")
    (shared / "source").mkdir()
    with pytest.raises(MountError, match="symlink"):
        sandboxes.run(
            ["true"], mounted(bind(shared / "outer", "/data"), bind(shared / "source", "/data/inner"))
        )


@pytest.mark.parametrize("target", ["/work", "/tmp/place"])
def test_nothing_is_made_through_a_link_in_an_earlier_mount(
    sandboxes: Sandboxes, shared: Path, target: str
) -> None:
    """Below /tmp and /work mount points are made, but not inside another mount: a job may have put a link there."""
    for name in ("outer", "source", "victim"):
        (shared / name).mkdir()
    (shared / "outer" / "link").symlink_to(shared / "victim")
    (shared / "file").touch()
    outer = bind(shared / "outer", target, "rw")
    for source, inner in (
        ("source", "link/made"),
        ("file", "link/made"),
        ("source", "made"),
        ("file", "made"),
    ):
        with pytest.raises(MountError, match=r"symlink|make it in the mount around it"):
            sandboxes.run(["true"], mounted(outer, bind(shared / source, f"{target}/{inner}")))
        assert os.listdir(shared / "victim") == []
        assert os.listdir(shared / "outer") == ["link"]
    (shared / "outer" / "made").mkdir()
    (shared / "source" / "here").touch()
    result = sandboxes.run(
        ["ls", f"{target}/made"], mounted(outer, bind(shared / "source", f"{target}/made"))
    )
    assert (result.stdout, result.exit_status) == (b"here\n", 0)


def test_the_stager_follows_no_link(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever a plan says, directories and files are made in no other place than it says."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "victim").mkdir()
    (tmp_path / "root").mkdir()
    (tmp_path / "root" / "link").symlink_to(tmp_path / "victim")
    stager = Stager(str(tmp_path), Ids(base=0, uid=0, gid=0, userns=-1), "")
    with pytest.raises(MountError, match="symlink"):
        stager.run([{"op": "directory", "at": "root/link/made/deep", "mode": 0o755, "owner": "root"}])
    with pytest.raises(MountError, match="symlink"):
        stager.run([{"op": "file", "at": "root/link/made", "text": "", "mode": 0o644}])
    stager.run([{"op": "directory", "at": "root/a/b", "mode": 0o700, "owner": "root"}])
    assert stat.S_IMODE((tmp_path / "root/a/b").stat().st_mode) == 0o700
    assert os.listdir(tmp_path / "victim") == []


def test_target_below_a_link_of_the_image(sandboxes: Sandboxes, shared: Path) -> None:
    """/bin is a symlink to usr/bin in the image: /bin/tool would hide all of /bin, and is refused."""
    (shared / "tool").write_text("#!/bin/sh\necho tool\n")
    (shared / "tool").chmod(0o755)
    with pytest.raises(MountError, match="symlink"):
        sandboxes.run(["true"], mounted(bind(shared / "tool", "/bin/tool")))
    result = sandboxes.run(["tool"], mounted(bind(shared / "tool", "/usr/bin/tool")))
    assert (result.stdout, result.exit_status) == (b"tool\n", 0)


ODD = """quo"te's com,ma co:lon back\\slash \\040 ünï #x $HOME -rf %s * a=b upperdir=x ro,suid"""


@pytest.mark.parametrize("name", [*ODD.split(), "sp ace", " "])
def test_odd_names_of_sources_and_targets(sandboxes: Sandboxes, shared: Path, name: str) -> None:
    """No character of a name means anything to us, the runtime, the kernel's mount options or the proof."""
    (shared / name).mkdir()
    (shared / name / "file").write_text(name)
    code = f"out(open({'/data/' + name + '/file'!r}).read())"
    assert sandboxes.ask(code, mounted(bind(shared / name, f"/data/{name}"))) == name


@pytest.mark.parametrize("name", ["new\nline", "tab\t", "escape\x1b[31m", "nul\0"])
def test_control_characters_are_refused(sandboxes: Sandboxes, shared: Path, name: str) -> None:
    """In one line that shows them."""
    for mount in (bind(shared / name, "/data"), bind(shared, f"/{name}")):
        with pytest.raises((PolicyError, MountError)) as caught:
            sandboxes.run(["true"], mounted(mount))
        assert str(caught.value).isprintable()


def test_names_that_are_no_utf8(sandboxes: Sandboxes, shared: Path) -> None:
    """Such a source works, or is refused with one line that shows it; never a traceback."""
    path = os.fsencode(shared) + b"/\xff\xfe"
    os.mkdir(path)
    try:
        result = sandboxes.run(["ls", "/data"], mounted(bind(os.fsdecode(path), "/data")))
    except ringfence.RingfenceError as error:
        assert str(error).isprintable()
    else:
        assert result.exit_status == 0
