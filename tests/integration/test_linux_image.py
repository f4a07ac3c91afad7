"""What a job finds in its root: files with the owners of the image, nothing that it could change for the next run."""

import os
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from boxes import USER, Sandboxes, bind
from ringfence.errors import ImageError
from ringfence.image.find import find
from ringfence.image.store import layer_path, read_record
from ringfence.linux.paths import state_dir

pytestmark = pytest.mark.requires("root", "compiler")

MIB = 1 << 20
# path in the image: owner, group, mode, and what the job (1000:1000) is told when it opens it
FILES = {
    "/etc/shadow": (0, 42, 0o640, 13),
    "/mine": (1000, 1000, 0o600, 0),
    "/of-my-group": (0, 1000, 0o640, 0),
    "/of-a-neighbour": (1001, 1001, 0o600, 13),
    "/of-nobody": (65534, 65534, 0o600, 13),
    "/for-all": (0, 0, 0o644, 0),
}
BEYOND = "/beyond"  # owned by an id that no sandbox has


@pytest.fixture(scope="module")
def tree(probes: Path) -> Iterator[Path]:
    """A root directory of the user's own, with files of many owners."""
    directory = Path(tempfile.mkdtemp(prefix="ringfence-tree-"))
    directory.chmod(0o755)
    for name in ("etc", "proc", "dev"):
        (directory / name).mkdir(mode=0o755)
    shutil.copy(probes / "consume", directory / "consume")
    for path, (uid, gid, mode, _) in {**FILES, BEYOND: (70000, 70000, 0o600, 13)}.items():
        file = directory / path.lstrip("/")
        file.write_text(f"text of {path}\n")
        os.chown(file, uid, gid)
        file.chmod(mode)
    shutil.copy(probes / "consume", directory / "set-user-id")
    (directory / "set-user-id").chmod(0o4755)
    yield directory
    shutil.rmtree(directory)


def state_of(root: Path) -> dict[str, tuple[int, ...]]:
    """Return owner, mode, size and times of change of everything below `root`."""
    found = {}
    for directory, names, files in os.walk(root):
        for name in (*names, *files):
            path = os.path.join(directory, name)
            at = os.lstat(path)
            found[path] = (
                at.st_ino,
                at.st_uid,
                at.st_gid,
                at.st_mode,
                at.st_size,
                at.st_mtime_ns,
                at.st_ctime_ns,
            )
    return found


def test_files_keep_their_owners_and_these_decide(sandboxes: Sandboxes, tree: Path) -> None:
    """Owners inside are those of the image; a 0600 file opens for its own user and for nobody else."""
    result = sandboxes.run(["/consume", "list", *FILES], rootfs=str(tree))
    lines = [line.split(" ", 4) for line in result.stdout.decode().splitlines()]
    for path, owner, mode, error, text in lines:
        uid, gid, expected_mode, expected_error = FILES[path]
        assert (owner, int(mode, 8), int(error)) == (f"{uid}:{gid}", expected_mode, expected_error)
        assert text == ("" if expected_error else f"text of {path}")
    assert len(lines) == len(FILES)


def test_owner_outside_the_range_is_nobody(sandboxes: Sandboxes, tree: Path) -> None:
    """An id that the sandbox does not have is shown as the overflow id, and its files stay closed, to root too."""
    for user in ("1000:1000", "0:0"):
        result = sandboxes.run(["/consume", "list", BEYOND], {"user": user}, rootfs=str(tree))
        assert result.stdout.decode().split(" ")[1:4] == ["65534:65534", "600", "13"]


def test_set_user_id_program_gains_nothing(
    sandboxes: Sandboxes, tree: Path, outside: Callable[..., "subprocess.CompletedProcess[bytes]"]
) -> None:
    """A set-user-ID root program of the image runs as the job; outside it makes an ordinary user root."""
    control = outside([tree / "set-user-id", "whoami"])
    assert control.stdout.startswith(f"uid {USER} euid 0 ".encode())
    result = sandboxes.run(["/set-user-id", "whoami"], rootfs=str(tree))
    assert result.stdout.startswith(b"uid 1000 euid 1000 ")


def test_file_capabilities_gain_nothing(
    sandboxes: Sandboxes,
    tree: Path,
    probes: Path,
    outside: Callable[..., "subprocess.CompletedProcess[bytes]"],
) -> None:
    """Nor do capabilities of a file; outside they are in force."""
    program = tree / "capable"
    shutil.copy(probes / "consume", program)
    program.chmod(0o755)
    # struct vfs_cap_data, version 2, effective: CAP_NET_BIND_SERVICE permitted (linux/capability.h)
    os.setxattr(program, "security.capability", bytes.fromhex("0100000200040000000000000000000000000000"))
    control = outside([program, "whoami"])
    assert b"CapEff:\t0000000000000400" in control.stdout
    result = sandboxes.run(["/capable", "whoami"], rootfs=str(tree))
    assert b"CapEff:\t0000000000000000" in result.stdout


def test_image_is_untouched_by_a_job_that_tries_everything(sandboxes: Sandboxes) -> None:
    """A job that is root in a writable root removes what it can; the next one finds all of it, and so does the host."""
    base = find(None, None, state_dir=state_dir())
    (layer,) = read_record(base.state, base.digest).layers
    root = Path(layer_path(base.state, layer.diff_id)) / "fs"
    before = state_of(root)
    destroy = (
        "echo x > /etc/new; rm -rf /usr/share /usr/lib/python3 /etc/passwd; chmod -R 777 /etc; ls /usr/share"
    )
    result = sandboxes.run(["sh", "-c", destroy], {"filesystem.root": "writable", "user": "0:0"})
    assert b"No such file" in result.stderr or b"cannot access" in result.stderr
    assert state_of(root) == before
    assert sandboxes.run(["ls", "/etc/new", "/etc/passwd", "/usr/share"]).stdout.startswith(b"/etc/passwd\n")


def test_writable_root_is_bounded_and_forgotten(sandboxes: Sandboxes) -> None:
    """`filesystem.root: writable` takes what `limits.disk` allows, and nothing is there in the next run."""
    fill = """
def fill(path):
    written = 0
    try:
        with open(path, 'wb', buffering=0) as file:
            while True: written += file.write(bytes(1 << 16))
    except OSError as error: return [written, error.errno]
out([os.path.exists('/work/filled'), fill('/work/filled'), os.access('/usr', os.W_OK)])
"""
    limits = {"filesystem.root": "writable", "limits.disk": "8MiB", "limits.file_size": "64MiB"}
    for _ in range(2):
        there, (written, error), system = sandboxes.ask(fill, limits)
        assert (there, error, system) == (False, 28, False)
        assert 7 * MIB <= written <= 8 * MIB


def test_agent_cannot_be_changed(sandboxes: Sandboxes) -> None:
    """Where a job may replace the agent's file, it is the sandbox's own copy, in the next run the old one again."""
    agent = Path(__file__).parents[2] / "src/ringfence/_agent/ringfence-agent"
    before = agent.read_bytes()
    code = """
def attempt():
    try:
        os.chmod('/.ringfence', 0o777)
        with open('/.ringfence', 'r+b') as file: file.write(b'x')
    except OSError as error: return error.errno
def replace():
    try:
        os.unlink('/.ringfence')
        with open('/.ringfence', 'w') as file: file.write('x')
    except OSError as error: return error.errno
out([attempt(), replace()])
"""
    assert sandboxes.ask(code) == [30, 30]
    assert sandboxes.ask(code, {"filesystem.root": "writable"}) == [1, 13]
    # Root of the sandbox may: ETXTBSY for the running file, and a new one in its own layer.
    assert sandboxes.ask(code, {"filesystem.root": "writable", "user": "0:0"}) == [26, None]
    assert agent.read_bytes() == before


def test_image_host_shows_programs_and_no_data(sandboxes: Sandboxes) -> None:
    """The image `host` has the host's programs, but no home, no /var, no /run and no other file of /etc."""
    code = """
out({'python': sys.executable, 'there': sorted(os.listdir('/')), 'etc': sorted(os.listdir('/etc')),
     'data': [path for path in ('/root', '/home', '/var', '/run', '/srv', '/opt') if os.path.exists(path)],
     'usr': os.access('/usr/bin/python3', os.X_OK), 'passwd': open('/etc/passwd').read()})
"""
    found = sandboxes.ask(code, image="host")
    assert found["python"] == "/usr/bin/python3"
    assert found["data"] == []
    assert "/etc/shadow" not in found["etc"]  # type: ignore[operator]
    assert "shadow" not in found["etc"]  # type: ignore[operator]
    assert str(found["passwd"]).count("\n") == 3


@pytest.mark.parametrize(
    "source", ["/", "/proc", "/sys", "/dev", "/var/lib/ringfence", "/run/ringfence", "/var"]
)
def test_root_directories_that_are_refused(sandboxes: Sandboxes, source: str) -> None:
    """The host's own root, the kernel's trees and Ringfence's own state are no images."""
    with pytest.raises(ImageError):
        sandboxes.run(["/true"], rootfs=source)


def test_links_of_an_image_do_not_lead_out(sandboxes: Sandboxes, tree: Path) -> None:
    """Symlinks of an image, in place of directories that are mounted on as well, resolve inside the root."""
    hostile = tree / f"hostile-{sandboxes.runtime}"
    hostile.mkdir()
    shutil.copy(tree / "consume", hostile / "consume")
    for name in ("tmp", "work", "dev", "proc", "etc", "sys"):
        (hostile / name).symlink_to("/root")
    (hostile / "up").symlink_to("../../../../../../etc/shadow")
    result = sandboxes.run(["/consume", "list", "/up", "/tmp", "/work"], rootfs=str(hostile))
    lines = [line.split(" ") for line in result.stdout.decode().splitlines()]
    assert lines[0][3] == "2"
    assert [line[3] for line in lines[1:]] == ["0", "0"]


def test_probe_directory_is_not_part_of_the_image(sandboxes: Sandboxes, probes: Path) -> None:
    """A mount's own target appears for that run alone."""
    elsewhere = bind(probes, "/elsewhere")
    assert sandboxes.run(["ls", "/elsewhere"], {"filesystem.mounts": [elsewhere]}).exit_status == 0
    assert sandboxes.run(["ls", "/elsewhere"]).exit_status == 2
