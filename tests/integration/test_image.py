"""Images on the real host: what a bootstrap makes, what a killed one leaves, what the commands say."""

import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from ringfence.errors import ImageError
from ringfence.image import store
from ringfence.image.find import find
from ringfence.image.host import host_view, write_skeleton
from ringfence.image.model import Image
from ringfence.image.skeleton import MOUNT_POINTS
from ringfence.linux.paths import state_dir

RINGFENCE = (sys.executable, "-m", "ringfence")

needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="chroot and mount need root")
needs_mmdebstrap = pytest.mark.skipif(
    shutil.which("mmdebstrap") is None, reason="mmdebstrap is not installed"
)


def ringfence(*arguments: str, state: Path | None = None) -> subprocess.CompletedProcess[str]:
    environment = dict(os.environ) | ({"RINGFENCE_STATE_DIR": str(state)} if state else {})
    return subprocess.run(
        [*RINGFENCE, *arguments],
        env=environment,
        capture_output=True,
        text=True,
        stdin=subprocess.DEVNULL,
        timeout=60,
    )


def in_new_namespaces(script: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Run a shell script in mount and PID namespaces of its own; all it mounts goes with it."""
    command = [
        "unshare",
        "--mount",
        "--propagation",
        "private",
        "--pid",
        "--fork",
        "--kill-child",
        "sh",
        "-ec",
        script,
    ]
    return subprocess.run([*command, "sh", *arguments], capture_output=True, text=True, timeout=60)


@pytest.fixture(scope="module")
def base() -> Image:
    try:
        return find("base", None, state_dir=state_dir())
    except ImageError as missing:
        pytest.skip(f"needs the base image: {missing}")


@needs_root
def test_base_runs_python_with_its_library_and_a_shell_as_the_sandbox_user(base: Image) -> None:
    """An ordinary user in base has Python with its compiled modules, and a shell with coreutils."""
    program = "import asyncio, bz2, ctypes, lzma, pwd, sqlite3, ssl, zlib; print(pwd.getpwuid(1000).pw_dir)"
    command = ["chroot", "--userspec=1000:1000", base.rootfs]
    said = subprocess.run([*command, "python3", "-c", program], capture_output=True, text=True, check=True)
    assert said.stdout == "/work\n"
    said = subprocess.run(
        [*command, "sh", "-c", "id -un; ls / | sort | head -1"], capture_output=True, text=True
    )
    assert said.stdout == "sandbox\nbin\n"


def test_base_holds_nothing_of_the_host_and_nothing_dangerous(base: Image) -> None:
    """No devices, sockets or FIFOs, no set-uid or writable files, no owner but root, no secrets."""
    for directory, names, files in os.walk(base.rootfs):
        for name in (*names, *files):
            found = os.lstat(os.path.join(directory, name))
            kind = found.st_mode & 0o170000
            assert kind in (0o040000, 0o100000, 0o120000), os.path.join(directory, name)
            assert kind == 0o120000 or not found.st_mode & 0o7022, os.path.join(directory, name)
            assert (found.st_uid, found.st_gid) == (
                os.lstat(base.rootfs).st_uid,
                os.lstat(base.rootfs).st_gid,
            )
    for path in ("etc/shadow", "etc/apt", "var/lib/apt", "var/cache/apt", "usr/share/doc", "usr/share/man"):
        assert not os.path.exists(os.path.join(base.rootfs, path)), path
    assert all(os.listdir(os.path.join(base.rootfs, name)) == [] for name in MOUNT_POINTS)


def test_every_directory_on_the_way_to_base_can_be_searched_by_mapped_users(base: Image) -> None:
    """A uid that owns nothing on this host reaches the files, and writes none of them."""
    if os.geteuid() != 0:
        pytest.skip("needs root to become another user")
    target = os.path.join(base.rootfs, "usr/bin/python3")
    said = subprocess.run(
        [
            *("setpriv", "--reuid=1234567", "--regid=1234567", "--clear-groups"),
            *("sh", "-c", 'test -x "$1" && ! test -w "$1" && ! test -w "$2"', "sh", target, base.rootfs),
        ]
    )
    assert said.returncode == 0


def test_the_manifest_says_what_base_is_made_of(base: Image) -> None:
    """Suite, digest and package versions are on record, and the size is that of the files."""
    said = ringfence("image", "inspect", "base")
    facts = json.loads(said.stdout)
    assert facts["digest"] == base.digest == facts["manifest"]["digest"]
    assert facts["manifest"]["suite"] in ("bookworm", "trixie")
    assert {"python3", "libc6", "dash", "coreutils"} <= set(facts["manifest"]["packages"])
    inodes = {}
    for directory, _, files in os.walk(base.rootfs):
        for found in (os.lstat(os.path.join(directory, name)) for name in files):
            if found.st_mode & 0o170000 == 0o100000:
                inodes[found.st_ino] = found.st_size
    assert facts["manifest"]["size_bytes"] == sum(inodes.values())


@needs_root
def test_the_host_view_is_enough_to_run_the_hosts_programs_and_shows_no_more() -> None:
    """In the assembled view python3 runs and imports ssl; homes, other /etc files and /var are not there."""
    script = """
        mount -t tmpfs none /mnt
        "$1" -c "$2" /mnt/root
        for path in $3; do mount --bind "$path" "/mnt/root$path"; done
        exec chroot --userspec=1000:1000 /mnt/root python3 -c "$4"
    """
    write = (
        "import sys; from ringfence.image.host import *; from ringfence.image.skeleton import MOUNT_POINTS\n"
        "write_skeleton(host_view(), sys.argv[1], MOUNT_POINTS)"
    )
    inside = (
        "import os, pwd, ssl\n"
        "print(pwd.getpwuid(os.getuid()).pw_name)\n"
        "print([p for p in '/root /home /var /opt /etc/shadow /etc/ssl/private /etc/ssh'.split()"
        " if os.path.exists(p)])\n"
        "print(sorted(os.listdir('/proc') + os.listdir('/run')))"
    )
    said = in_new_namespaces(script, sys.executable, write, " ".join(host_view().binds), inside)
    assert said.stdout.splitlines() == ["sandbox", "[]", "[]"], said.stderr


def test_a_bootstrap_does_nothing_when_base_is_there(base: Image) -> None:
    """The second time it says so at once, and the build stays the same."""
    said = ringfence("image", "bootstrap", "base")
    assert said.returncode == 0
    assert "already there" in said.stderr or "using root's" in said.stderr
    assert find("base", None, state_dir=state_dir()).digest == base.digest


@needs_mmdebstrap
@needs_root
@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGTERM])
def test_a_killed_bootstrap_leaves_no_process_no_mount_and_no_image(
    tmp_path: Path, how: signal.Signals
) -> None:
    """Killed while packages are unpacked: mmdebstrap goes too, nothing is mounted, there is no base to run.

    What kill -9 leaves is an unused directory, and the next image command can remove it.
    """
    state = tmp_path / "state"
    state.mkdir(mode=0o711)
    with Bootstrapping(state) as process:
        mounted = [path for path in store.mount_points("/") if path.startswith(str(state))]
        assert mounted == [], "mmdebstrap mounts in the host's own namespace"
        process.send_signal(how)
        assert process.wait(30) == (-how if how == signal.SIGKILL else 130)
        assert process.stderr
        process.stderr.read()
    with store.locked(str(state), lambda: None):  # comes only when all that held the lock is gone
        assert processes_in(state) == []
        assert [path for path in store.mount_points("/") if path.startswith(str(state))] == []
        assert store.manifest(str(state), "base") is None
        left = os.listdir(state / "images/base")
        assert all(name.startswith(store.BUILDING) for name in left)
        assert how == signal.SIGKILL or left == []
        store.sweep(str(state), "base")
        assert os.listdir(state / "images/base") == []
    refused = ringfence("image", "inspect", "base", state=state)
    assert refused.returncode == 125
    assert "ringfence image bootstrap base" in refused.stderr


class Bootstrapping:
    """A bootstrap into `state` that has begun to unpack packages; killed in the end if it still runs."""

    def __init__(self, state: Path) -> None:
        self.state = state

    def __enter__(self) -> subprocess.Popen[str]:
        self.process = subprocess.Popen(
            [*RINGFENCE, "image", "bootstrap", "base"],
            env=dict(os.environ) | {"RINGFENCE_STATE_DIR": str(self.state)},
            stderr=subprocess.PIPE,
            stdin=subprocess.DEVNULL,
            text=True,
        )
        assert self.process.stderr
        said = []
        for line in self.process.stderr:
            said.append(line)
            if "extracting" in line:
                return self.process
        self.process.wait()
        pytest.skip(f"needs Debian packages to bootstrap from: {''.join(said)}")

    def __exit__(self, *_: object) -> None:
        self.process.kill()
        self.process.wait()
        assert self.process.stderr
        self.process.stderr.close()


def processes_in(directory: Path) -> list[str]:
    """Command names of live processes whose root, working directory or files lie in `directory`."""
    found = []
    for process in filter(str.isdigit, os.listdir("/proc")):
        try:
            links = [os.readlink(f"/proc/{process}/{name}") for name in ("root", "cwd")]
            if any(link.startswith(str(directory)) for link in links):
                found.append(Path(f"/proc/{process}/comm").read_text().strip())
        except OSError:
            continue
    return found


@needs_root
def test_a_tree_with_something_mounted_in_it_is_never_removed(tmp_path: Path) -> None:
    """A leftover with a mount in it is refused and keeps its files; control: a plain rm would not stop."""
    program = (
        "import sys; from ringfence.image import store; from ringfence.errors import ImageError\n"
        "try: store.remove_tree(sys.argv[1])\n"
        "except ImageError as error: print(error)"
    )
    script = """
        mkdir -p "$1/tree/a b/dev" "$1/host"; echo precious > "$1/host/file"
        mount --bind "$1/host" "$1/tree/a b/dev"
        "$2" -c "$3" "$1/tree"
        test -e "$1/host/file" && echo kept
        rm -rf "$1/tree" 2> /dev/null || true
        test -e "$1/host/file" || echo gone without the check
    """
    said = in_new_namespaces(script, str(tmp_path), sys.executable, program)
    assert "is mounted; unmount it" in said.stdout, said.stderr
    assert said.stdout.splitlines()[1:] == ["kept", "gone without the check"]


@needs_root
def test_an_image_in_use_is_not_removed(tmp_path: Path) -> None:
    """While a process has a build mounted `image rm` refuses, and nothing is missing."""
    build = tmp_path / "state/images/base" / ("sha256-" + "5" * 64)
    (build / "rootfs/etc").mkdir(parents=True)
    (build.parent / "current").symlink_to(build.name)
    (tmp_path / "state").chmod(0o711)
    holder = subprocess.Popen(
        [
            *("unshare", "--mount", "--propagation", "private", "sh", "-ec"),
            *('mount --bind "$1" /mnt; echo ready; read line', "sh", str(build / "rootfs")),
        ],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    )
    try:
        assert holder.stdout
        assert holder.stdout.readline() == b"ready\n"
        refused = ringfence("image", "rm", "base", state=tmp_path / "state")
        assert refused.returncode == 125
        assert "in use by a sandbox" in refused.stderr
        assert (build / "rootfs/etc").is_dir()
    finally:
        holder.communicate(b"\n")
    # Another base on this host may be in use by a sandbox that the machine runs: the check errs on that side.
    if not store.in_use("base"):
        assert ringfence("image", "rm", "base", state=tmp_path / "state").stdout == "base\n"
        assert os.listdir(tmp_path / "state/images") == ["lock"]


@pytest.fixture
def empty_state(tmp_path: Path) -> Iterator[Path]:
    (tmp_path / "state").mkdir(mode=0o711)
    yield tmp_path / "state"


@pytest.mark.parametrize(
    ("arguments", "status", "words"),
    [
        (("rm", "host"), 125, "nothing to remove"),
        (("rm", "base"), 125, "no built image 'base'"),
        (("rm", "../images"), 125, "no built image"),
        (("inspect", "nonsense"), 125, "no image 'nonsense'"),
        (("bootstrap", "alpine"), 2, "invalid choice"),
        (("bootstrap", "base", "--suite", "sid"), 2, "invalid choice"),
        ((), 2, "COMMAND"),
    ],
)
def test_nonsense_is_one_clear_error(
    empty_state: Path, arguments: tuple[str, ...], status: int, words: str
) -> None:
    """Wrong words end in an error that says what is wrong, without a traceback, and change nothing."""
    said = ringfence("image", *arguments, state=empty_state)
    assert said.returncode == status
    assert words in said.stderr
    assert "Traceback" not in said.stderr
    assert said.stdout == ""


def test_the_list_shows_what_is_there_and_what_is_not(empty_state: Path) -> None:
    """Both images stand in the list, also as JSON; a base that is not built says so."""
    table = ringfence("image", "ls", state=empty_state).stdout
    assert [line.split()[:2] for line in table.splitlines()[1:]] == [["host", "ready"], ["base", "not"]]
    rows = json.loads(ringfence("image", "ls", "--json", state=empty_state).stdout)
    assert [(row["name"], row["state"]) for row in rows] == [("host", "ready"), ("base", "not built")]


def test_a_skeleton_is_written_from_the_real_host(tmp_path: Path) -> None:
    """The skeleton of this host is small: no content of /usr, and the linker's cache is there."""
    write_skeleton(host_view(), str(tmp_path / "skeleton"), MOUNT_POINTS)
    sizes = [path.lstat().st_size for path in (tmp_path / "skeleton").rglob("*") if path.is_file()]
    assert sum(sizes) < 4 << 20
    assert (tmp_path / "skeleton/etc/ld.so.cache").exists()
