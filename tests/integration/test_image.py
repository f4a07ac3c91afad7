"""The image `base` and other bootstraps, the view of the host, and what a killed bootstrap leaves."""

import json
import os
import signal
import stat
import subprocess
import sys
from pathlib import Path

import pytest

from commands import RINGFENCE, ringfence
from imagetrees import contents, files_of
from ringfence.image import store, trees
from ringfence.image.host import host_view
from ringfence.image.packages import debian_packages
from ringfence.image.record import ImageRecord
from ringfence.image.skeleton import MOUNT_POINTS
from ringfence.linux.paths import state_dir

pytestmark = pytest.mark.requires("root")


def in_new_namespaces(script: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Run a shell script in mount and PID namespaces of its own; all it mounts goes with it."""
    command = ["unshare", "--mount", "--propagation", "private", "--pid", "--fork", "--kill-child"]
    return subprocess.run(
        [*command, "sh", "-ec", script, "sh", *arguments], capture_output=True, text=True, timeout=60
    )


@pytest.fixture(scope="module")
def base() -> ImageRecord:
    digest = store.resolve(state_dir(), "base:latest")
    if digest is None:
        pytest.skip("needs the image base: ringfence image bootstrap base")
    return store.read_record(state_dir(), digest)


@pytest.fixture(scope="module")
def rootfs(base: ImageRecord) -> Path:
    [layer] = files_of(Path(state_dir()), base.digest)
    return layer


def test_base_runs_python_with_its_library_and_a_shell_as_the_sandbox_user(rootfs: Path) -> None:
    """An ordinary user in base has Python with its compiled modules, and a shell with coreutils."""
    program = "import asyncio, bz2, ctypes, lzma, pwd, sqlite3, ssl, zlib; print(pwd.getpwuid(1000).pw_dir)"
    command = ["chroot", "--userspec=1000:1000", rootfs]
    said = subprocess.run([*command, "python3", "-c", program], capture_output=True, text=True, check=True)
    assert said.stdout == "/work\n"
    said = subprocess.run(
        [*command, "sh", "-c", "id -un; ls / | sort | head -1"], capture_output=True, text=True
    )
    assert said.stdout == "sandbox\nbin\n"


def test_the_compiled_modules_of_base_are_used(rootfs: Path) -> None:
    """Python takes every module of its start from a .pyc; files without their packages' times would not let it."""
    said = subprocess.run(
        ["chroot", rootfs, "python3", "-v", "-c", "import json"], capture_output=True, text=True, check=True
    )
    assert said.stderr.count(".pyc matches ") > 5
    assert "stale" not in said.stderr


def test_base_holds_nothing_of_the_host_and_nothing_dangerous(rootfs: Path) -> None:
    """No devices, sockets or FIFOs, no set-uid or writable files, no owner but root, no secrets."""
    for directory, names, files in os.walk(rootfs):
        for name in (*names, *files):
            found = os.lstat(os.path.join(directory, name))
            kind = stat.S_IFMT(found.st_mode)
            assert kind in (stat.S_IFDIR, stat.S_IFREG, stat.S_IFLNK), os.path.join(directory, name)
            assert kind == stat.S_IFLNK or not found.st_mode & 0o7022, os.path.join(directory, name)
            assert (found.st_uid, found.st_gid) == (0, 0)
    for path in ("etc/shadow", "etc/apt", "var/lib/apt", "var/cache/apt", "usr/share/doc", "usr/share/man"):
        assert not (rootfs / path).exists(), path
    assert all(os.listdir(rootfs / name) == [] for name in MOUNT_POINTS)


def test_every_user_can_read_base_and_none_can_change_it(rootfs: Path) -> None:
    """A uid that owns nothing on this host reaches the files, and writes none of them."""
    script = 'test -x "$1" && ! test -w "$1" && ! test -w "$2"'
    user = ("setpriv", "--reuid=1234567", "--regid=1234567", "--clear-groups")
    said = subprocess.run([*user, "sh", "-c", script, "sh", rootfs / "usr/bin/python3", rootfs])
    assert said.returncode == 0


def test_the_record_says_what_base_is_made_of(base: ImageRecord, rootfs: Path) -> None:
    """Suite, packages asked for and the versions of all packages are there."""
    facts = json.loads(ringfence("image", "inspect", "base").stdout)
    assert facts["digest"] == base.digest
    assert facts["config"]["cmd"] == ["python3"]
    assert "Debian " in facts["history"][0]["created_by"]
    assert {"python3", "libc6", "dash", "coreutils"} <= set(facts["packages"])
    said = subprocess.run(
        ["dpkg-query", f"--admindir={rootfs}/var/lib/dpkg", "--show", "--showformat=${Package} ${Version}\n"],
        capture_output=True,
        text=True,
        check=True,
    )
    assert dict(line.split() for line in said.stdout.splitlines()) == facts["packages"]


def test_the_host_view_is_enough_to_run_the_hosts_programs_and_shows_no_more() -> None:
    """In the assembled view python3 runs and imports ssl; homes, other /etc files and /var are not there."""
    script = """
        mount -t tmpfs none /mnt
        "$1" -c "$2" /mnt/root
        for path in $3; do mount --bind "$path" "/mnt/root$path"; done
        exec chroot --userspec=1000:1000 /mnt/root python3 -c "$4"
    """
    write = (
        "import os, pathlib, sys; from ringfence.image.host import host_view\n"
        "from ringfence.image.skeleton import MOUNT_POINTS\n"
        "view, root = host_view(), pathlib.Path(sys.argv[1])\n"
        "for path in (*view.binds, *MOUNT_POINTS): os.makedirs(root / path.lstrip('/'), exist_ok=True)\n"
        "for path, content in view.files:\n"
        "    file = root / path.lstrip('/'); file.parent.mkdir(parents=True, exist_ok=True)\n"
        "    file.write_bytes(content)\n"
        "for path, target in view.symlinks: (root / path.lstrip('/')).symlink_to(target)"
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


def test_a_bootstrap_does_nothing_when_base_is_there(base: ImageRecord) -> None:
    """The second time it says so at once, and the image stays the same."""
    said = ringfence("image", "bootstrap", "base")
    assert said.returncode == 0
    assert b"already there" in said.stderr
    assert store.resolve(state_dir(), "base:latest") == base.digest


@pytest.mark.requires("mmdebstrap")
def test_base_is_the_same_image_in_another_store(base: ImageRecord, tmp_path: Path) -> None:
    """Bootstrapped again from the same packages, elsewhere and at another time, it has the same digest."""
    (tmp_path / "state").mkdir(mode=0o711)
    environment = {"RINGFENCE_STATE_DIR": str(tmp_path / "state")}
    suite = base.history[0].created_by.partition("Debian ")[2].partition(":")[0]
    words = ("image", "bootstrap", "base", "--suite", suite, "--json")
    said = ringfence(*words, env=environment, timeout=110)
    if b"mmdebstrap ended with status" in said.stderr:
        pytest.skip(f"needs Debian packages to bootstrap from: {said.stderr.decode()}")
    again = json.loads(said.stdout)
    here, there = (
        debian_packages([str(path) for path in files_of(Path(state), digest)])
        for state, digest in ((state_dir(), base.digest), (str(tmp_path / "state"), again["digest"]))
    )
    if here != there:
        pytest.skip("needs the packages that base was made of: Debian has newer ones")
    assert again["digest"] == base.digest


@pytest.mark.requires("mmdebstrap")
@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGTERM])
def test_a_killed_bootstrap_leaves_no_process_no_mount_and_no_image(
    tmp_path: Path, how: signal.Signals
) -> None:
    """Killed while packages are unpacked: mmdebstrap goes too, nothing is mounted, there is no base to run.

    What kill -9 leaves is an unused file, and `prune` removes it.
    """
    state = tmp_path / "state"
    state.mkdir(mode=0o711)
    with Bootstrapping(state) as process:
        mounted = [path for path in trees.mount_points("/") if path.startswith(str(state))]
        assert mounted == [], "mmdebstrap mounts in the host's own namespace"
        process.send_signal(how)
        assert process.wait(30) == (-how if how == signal.SIGKILL else 130)
        assert process.stderr
        process.stderr.read()
    with store.named(str(state), "base%3Alatest"):  # comes only when all that held the lock is gone
        assert processes_in(state) == []
        assert [path for path in trees.mount_points("/") if path.startswith(str(state))] == []
        assert store.names(str(state)) == {}
        left = contents(state)
        assert all(".import-" in name for name in left)
        assert how == signal.SIGKILL or left == []
    assert ringfence("image", "prune", env={"RINGFENCE_STATE_DIR": str(state)}).returncode == 0
    assert contents(state) == []


class Bootstrapping:
    """A bootstrap into `state` that has begun to unpack packages; killed in the end if it still runs."""

    def __init__(self, state: Path) -> None:
        self.state = state

    def __enter__(self) -> subprocess.Popen[str]:
        self.process = subprocess.Popen(
            [RINGFENCE, "image", "bootstrap", "base"],
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


def test_a_tree_with_something_mounted_in_it_is_never_removed(tmp_path: Path) -> None:
    """A leftover with a mount in it is refused and keeps its files; control: a plain rm would not stop."""
    program = (
        "import sys; from ringfence.image import trees; from ringfence.errors import ImageError\n"
        "try: trees.remove_tree(sys.argv[1])\n"
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
