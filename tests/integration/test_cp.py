"""`ringfence cp` into and out of running sandboxes of every tier, one of each for the whole module."""

import contextlib
import io
import os
import signal
import stat
import subprocess
import tarfile
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from commands import refused
from detached import Cli, until
from needs import PROBES
from ringfence.sandbox import store
from users import ACCEPTED, UID, make_user

TIERS = {
    "linux": ("root", "userns", "image:base", "crun"),
    "gvisor": ("root", "userns", "image:base", "crun", "runsc"),
    "microvm": ("root", "userns", "image:base", "crun", "qemu", "kernel", "mkfs.erofs"),
}


@pytest.fixture(
    scope="module",
    params=[pytest.param(tier, marks=pytest.mark.requires(*needs)) for tier, needs in TIERS.items()],
)
def box(request: pytest.FixtureRequest, home: Path) -> Iterator[Cli]:
    """A detached sandbox "box" that does nothing, with 24 MiB in /tmp."""
    if any(PROBES[need]() for need in TIERS[request.param]):
        pytest.skip("see the mark")
    cli = Cli(home, isolation=request.param)
    options = ("--timeout", "600", "--tmpfs", "/tmp:size=24m")
    cli.detached("sleep", "600", options=options)
    yield cli
    cli("rm", "--force", "box")


def inside(box: Cli, script: str) -> bytes:
    return box("exec", "box", "--", "sh", "-ec", script).stdout


# Files that cost the sandbox nothing, and seconds to be copied.
MANY = "mkdir /tmp/many; cd /tmp/many; truncate -s 16M $(seq 300)"


SWAPPER = """import os
os.chdir('/tmp')
os.makedirs('t/d')
open('t/d/f', 'w').close()
os.symlink('/etc', 's')
print('.', flush=True)
while True:
    for old, new in (('t/d', 'x'), ('s', 't/d'), ('t/d', 's'), ('x', 't/d')):
        os.rename(old, new)
"""


def half_files(where: Path) -> list[str]:
    """Return the files below that are not whole, or not yet called as they should be."""
    found = []
    for path in where.rglob("*"):
        with contextlib.suppress(FileNotFoundError):
            if path.is_file() and (path.name.startswith(".") or path.stat().st_size != 16 << 20):
                found.append(path.name)
    return found


def picture(root: Path) -> dict[bytes, tuple[object, ...]]:
    found = {}
    for path in [root, *sorted(root.rglob("*"))]:
        status = path.lstat()
        kind = stat.S_IFMT(status.st_mode)
        content = path.read_bytes() if kind == stat.S_IFREG else b""
        target = os.readlink(path) if kind == stat.S_IFLNK else ""
        mode = 0 if kind == stat.S_IFLNK else stat.S_IMODE(status.st_mode)
        seconds = int(status.st_mtime) if kind == stat.S_IFREG else 0
        found[os.fsencode(path.relative_to(root))] = (kind, mode, seconds, content, target)
    return found


# These come first: `cli` removes whatever there is at its end.


@pytest.mark.requires("root", "userns", "image:base", "crun")
def test_the_sandbox_ends_in_the_middle(cli: Cli, tmp_path: Path) -> None:
    """A sandbox that is killed while it is copied from is an error, and half a file is not left as if it were one."""
    sandbox = cli.detached("sleep", "60")
    cli("exec", "box", "--", "sh", "-c", MANY)
    (tmp_path / "to").mkdir()
    copy = cli.start(
        "cp", "--max-size", "1000GiB", "box:/tmp/many", str(tmp_path / "to"), stderr=subprocess.PIPE
    )
    until(lambda: half_files(tmp_path / "to"))
    cli("rm", "--force", "box")
    _, said = copy.communicate(timeout=20)
    assert copy.returncode == 125
    assert b"the sandbox ended" in said
    assert half_files(tmp_path / "to") == []
    assert sandbox not in {entry.id for entry in store.entries()}


@pytest.mark.requires("root", "userns", "image:base", "crun")
def test_a_race_in_the_sandbox_leads_nowhere(cli: Cli, tmp_path: Path) -> None:
    """A job that swaps directories and symlinks as fast as it can gets nothing else copied."""
    cli.detached("python3", "-c", SWAPPER)
    cli.wait_for_log("box", b".")
    deadline = time.monotonic() + 5
    for place in range(30):
        target = tmp_path / str(place)
        done = cli("cp", "box:/tmp/t", str(target), status=None)
        assert done.returncode in (0, 1), done.stderr
        for path in target.rglob("*"):
            assert path.relative_to(target).parts in {("d",), ("d", "f")}, path
            assert not path.is_symlink()
        if time.monotonic() > deadline:
            break


@pytest.mark.requires("root", "runc", "image:base", "userns")
def test_without_root(tmp_path: Path) -> None:
    """A user copies into his own sandbox and out of it; what comes out is his."""
    with contextlib.contextmanager(make_user)(ids=True) as user:
        home = user.place / "home"
        detached = user.run("-d", "--name", "box", *ACCEPTED, "--", "sleep", "60")
        assert detached.returncode == 0, detached.stderr
        (home / "f").write_bytes(b"text")
        (home / "f").chmod(0o644)
        for words in (("cp", str(home / "f"), "box:/tmp/g"), ("cp", "box:/tmp/g", str(home / "back"))):
            done = user(*words)
            assert done.returncode == 0, done.stderr
        assert (home / "back").read_bytes() == b"text"
        assert (home / "back").stat().st_uid == UID
        refused(user("cp", "box:/etc/hostname", "/etc/x"), 125, "Permission denied")
        assert user("rm", "--force", "box").returncode == 0


# One sandbox of each tier


def test_a_tree_goes_in_and_comes_out(box: Cli, tmp_path: Path) -> None:
    """Names, content, modes, times of files and links are as before; inside all is the job's, outside the caller's."""
    tree = tmp_path / "tree"
    deep = tree / ("d" * 150) / ("e" * 150)
    deep.mkdir(parents=True)
    Path(os.fsdecode(os.fsencode(tree) + b"/caf\xe9\n ")).write_bytes(b"bytes")
    (deep / "large").write_bytes(os.urandom(2_000_001))
    (tree / "run").write_bytes(b"#!")
    (tree / "run").chmod(0o4755)
    (tree / "closed").mkdir()
    (tree / "closed/f").write_bytes(b"x")
    (tree / "closed").chmod(0o555)
    (tree / "link").symlink_to("run")
    (deep / "up").symlink_to("../../run")
    os.utime(tree / "run", (1, 1_000_000_000))
    box("cp", str(tree), "box:/tmp/tree")
    owners = inside(
        box, "cd /tmp/tree; id -u; find . -print0 | xargs -0 stat -c %u | sort -u; stat -c %a run; cat link"
    )
    assert owners.split() == [b"1000", b"1000", b"755", b"#!"]
    box("cp", "box:/tmp/tree", str(tmp_path / "back"))
    (tree / "run").chmod(0o755)
    assert picture(tmp_path / "back") == picture(tree)
    assert {path.lstat().st_uid for path in (tmp_path / "back").rglob("*")} == {0}
    inside(box, "chmod -R u+w /tmp/tree; rm -r /tmp/tree")


def test_dockers_rules(box: Cli, tmp_path: Path) -> None:
    """A directory takes the copy under its name, or the content of SRC/.; a path that is not there is made."""
    (tmp_path / "d").mkdir()
    (tmp_path / "d/f").write_bytes(b"one")
    inside(box, "mkdir /tmp/there")
    box("cp", str(tmp_path / "d"), "box:/tmp/there")
    box("cp", f"{tmp_path}/d/.", "box:/tmp/there/")
    box("cp", str(tmp_path / "d"), "box:tmp/new")
    box("cp", str(tmp_path / "d/f"), "box:/tmp/there/g")
    assert inside(box, "cd /tmp; find there new | sort").split() == [
        b"new",
        b"new/f",
        b"there",
        b"there/d",
        b"there/d/f",
        b"there/f",
        b"there/g",
    ]
    (tmp_path / "out").mkdir()
    box("cp", "box:/tmp/there", str(tmp_path / "out"))
    box("cp", "box:/tmp/new/.", f"{tmp_path}/out/")
    box("cp", "box:/tmp/there/g", "name", cwd=tmp_path)
    found = {str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*") if path.is_file()}
    assert found == {"d/f", "name", "out/f", "out/there/d/f", "out/there/f", "out/there/g"}
    inside(box, "rm -r /tmp/there /tmp/new")


def test_archives_by_pipe(box: Cli, tmp_path: Path) -> None:
    """A tar by pipe is unpacked inside, hard links with it; one that comes out is checked as files would be."""
    (tmp_path / "f").write_bytes(b"x" * 600)
    os.link(tmp_path / "f", tmp_path / "g")
    (tmp_path / "s").symlink_to("/etc/hostname")
    archive = subprocess.run(["tar", "c", "-C", tmp_path, "."], capture_output=True, check=True).stdout
    inside(box, "mkdir /tmp/t")
    box("cp", "-", "box:/tmp/t", stdin=archive)
    assert inside(box, "cd /tmp/t; stat -c %h f g; readlink s").split() == [b"2", b"2", b"/etc/hostname"]
    out = box("cp", "box:/tmp/t", "-", status=1)
    assert b"left out 's': is a symlink to '/etc/hostname', which leads out" in out.stderr
    with tarfile.open(fileobj=io.BytesIO(out.stdout)) as opened:
        assert sorted(opened.getnames()) == ["t", "t/f", "t/g"]
    refused(box("cp", "-", "box:/tmp/missing", stdin=archive, status=125), 125, "'/tmp/missing/'")
    refused(box("cp", "-", "box:/tmp/t", stdin=b"no tar" * 200, status=125), 125, "no sound archive")
    inside(box, "rm -r /tmp/t")


def test_what_is_left_out_is_said(box: Cli, tmp_path: Path) -> None:
    """What the job cannot read, and what is no file, is not copied; the exit status is 1, and the rest is there."""
    inside(
        box, "cd /tmp; mkdir l; cd l; mkfifo p; echo y > y; echo n > n; chmod 0 n; ln -s /etc out; ln -s y in"
    )
    done = box("cp", "box:/tmp/l", str(tmp_path / "l"), status=1)
    assert sorted(path.name for path in (tmp_path / "l").iterdir()) == ["in", "y"]
    for words in (
        b"left out './p': is no file",
        b"left out './n': Permission denied",
        b"'out': is a symlink",
    ):
        assert words in done.stderr
    inside(box, "chmod 600 /tmp/l/n; rm -r /tmp/l")


def test_refusals(box: Cli, tmp_path: Path) -> None:
    """Each failure is one line with the reason from inside; nothing appears outside."""
    target = str(tmp_path / "new")
    (tmp_path / "f").write_bytes(bytes(25 << 20))
    here = str(tmp_path / "f")
    refused(box("cp", "box:/missing", target, status=125), 125, "'/missing'", "No such file")
    refused(box("cp", here, "box:/no/where", status=125), 125, "'/no", "No such file")
    refused(box("cp", here, "box:/etc/f", status=125), 125, "'/etc/f'")
    refused(box("cp", here, "box:/tmp/f", status=125), 125, "No space left")
    refused(box("cp", here, "box:/etc/hostname/", status=125), 125, "Not a directory")
    refused(box("cp", "box:/etc/hostname", f"{here}/", status=125), 125, "Not a directory")
    refused(box("cp", "box:/etc/hostname", "/dev/null", status=125), 125, "neither a file nor a directory")
    assert b"nothing was copied" in box("cp", "box:/dev/null", target, status=125).stderr
    refused(box("cp", "box:/etc", here, status=125), 125, "in the way")
    refused(box("cp", "nobody:/etc", target, status=2), 2, "no sandbox 'nobody'")
    refused(box("cp", here, target, status=2), 2, "one of SRC and DST")
    refused(box("cp", "box:/a", "box:/b", status=2), 2, "one of SRC and DST")
    assert [path.name for path in tmp_path.iterdir()] == ["f"]
    assert inside(box, "ls /tmp") == b""


def test_a_link_is_followed_only_when_asked(box: Cli, tmp_path: Path) -> None:
    """SRC that is a symlink leads to no other file of either side, unless -L says so."""
    inside(box, "ln -s /etc/hostname /tmp/ln")
    refused(box("cp", "box:/tmp/ln", str(tmp_path / "x"), status=125), 125, "which leads out", "-L")
    box("cp", "-L", "box:/tmp/ln", str(tmp_path / "x"))
    assert (tmp_path / "x").read_bytes() == inside(box, "cat /etc/hostname")
    (tmp_path / "ln").symlink_to("/etc/shadow")
    box("cp", str(tmp_path / "ln"), "box:/tmp/ln2")
    assert inside(box, "readlink /tmp/ln2") == b"/etc/shadow\n"
    (tmp_path / "ln3").symlink_to("x")
    box("cp", "-L", str(tmp_path / "ln3"), "box:/tmp/ln3")
    assert inside(box, "test ! -L /tmp/ln3; cat /tmp/ln3") == (tmp_path / "x").read_bytes()
    inside(box, "rm /tmp/ln*")


def test_no_more_comes_out_than_allowed(box: Cli, tmp_path: Path) -> None:
    """A file that costs the sandbox nothing does not fill the host's disk; no part of it is left there."""
    inside(box, "truncate -s 16M /tmp/sparse")
    done = box("cp", "--max-size", "3MiB", "box:/tmp/sparse", str(tmp_path / "x"), status=125)
    refused(done, 125, "more than 3145728 bytes", "--max-size")
    assert list(tmp_path.iterdir()) == []
    inside(box, "rm /tmp/sparse")


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupted_copy_leaves_nothing(number: int, box: Cli, tmp_path: Path) -> None:
    """Ctrl-C in the middle ends the job in the sandbox, too, and takes the half of a file away."""
    inside(box, MANY)
    (tmp_path / "to").mkdir()
    copy = box.start(
        "cp", "--max-size", "1000GiB", "box:/tmp/many", str(tmp_path / "to"), stderr=subprocess.PIPE
    )
    until(lambda: half_files(tmp_path / "to"))
    copy.send_signal(number)
    _, said = copy.communicate(timeout=20)
    assert copy.returncode == 130
    assert b"Traceback" not in said
    assert half_files(tmp_path / "to") == []
    until(
        lambda: b"--pack" not in inside(box, "cat /proc/*/cmdline 2>/dev/null || true").replace(b"\0", b" ")
    )
    inside(box, "rm -r /tmp/many")


def test_it_has_the_rights_of_a_job(box: Cli) -> None:
    """What copies is the job's user, without capabilities, under the job's filter, and is seen there while it does."""
    writer = box.start("cp", "-", "box:/tmp", stdin=subprocess.PIPE, stderr=subprocess.PIPE)
    lines = "grep -E '^(Uid|CapEff|CapBnd|NoNewPrivs|Seccomp):'"
    script = f"for p in /proc/[0-9]*; do grep -q -- '[-]-unpack' $p/cmdline && {lines} $p/status; done; true"
    held = until(lambda: inside(box, f"set +e; {script}"))
    assert held == inside(box, f"{lines} /proc/self/status")
    assert held.split()[1] == b"1000"
    writer.kill()
    writer.communicate()
    until(lambda: not inside(box, f"set +e; {script}") or None)
