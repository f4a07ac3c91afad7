"""Archives between host and sandbox: what is made of them, on both sides, and that every bound holds."""

import contextlib
import io
import os
import stat
import subprocess
import tarfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from archives import END, directory, file, hard_link, header, octal, pax, symlink
from ringfence.errors import ImageError, SandboxError
from ringfence.runtime.spawn import agent_path
from ringfence.sandbox import packing
from ringfence.sandbox.files import destination
from ringfence.sandbox.packing import Archive, Stream, judged, leads_out, pack

LeftOut = list[tuple[bytes, str]]


def receive(archive: bytes, to: Path | str, name: bytes = b"it", most: int | None = None) -> LeftOut:
    """Do what `ringfence cp` does with what comes out of a sandbox."""
    left_out: LeftOut = []
    stream = Stream(io.BytesIO(archive).read, most)
    tree = destination(str(to), name)
    try:
        for path, entry in judged(stream, rooted=True, left_out=lambda *what: left_out.append(what)):
            tree.add(path, entry, stream)
        tree.finish()
    finally:
        tree.close()
    return left_out


def packed(path: Path, *, follow: bool = False) -> bytes:
    """Do what `ringfence cp` does with what goes into a sandbox."""
    out = io.BytesIO()
    pack(str(path), Archive(out.write, b"."), follow=follow, left_out=lambda *_: None)
    return out.getvalue()


def agent(*words: str | Path, stdin: bytes = b"") -> "subprocess.CompletedProcess[bytes]":
    return subprocess.run(
        [agent_path(), *words], input=stdin, capture_output=True, timeout=20, check=False, cwd="/"
    )


def picture(root: Path) -> dict[bytes, tuple[object, ...]]:
    """All that a copy keeps of a tree."""
    found = {}
    for path in [root, *sorted(root.rglob("*"))]:
        status = path.lstat()
        kind = stat.S_IFMT(status.st_mode)
        content = path.read_bytes() if kind == stat.S_IFREG else b""
        target = os.readlink(path) if kind == stat.S_IFLNK else ""
        mode = 0 if kind == stat.S_IFLNK else stat.S_IMODE(status.st_mode)
        seconds = 0 if kind == stat.S_IFLNK else int(status.st_mtime)
        found[os.fsencode(path.relative_to(root))] = (kind, mode, seconds, content, target)
    return found


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """Something of every kind that is copied, under names of every kind."""
    root = tmp_path / "tree"
    deep = root / ("d" * 200) / ("e" * 200)
    deep.mkdir(parents=True)
    (root / "empty").mkdir(mode=0o711)
    (root / "empty file").touch()
    for name, size in (("a", 1), ("block", 512), ("more", 513), ("large", 3_000_001)):
        (root / name).write_bytes(os.urandom(size))
    (deep / "x").write_bytes(b"deep")
    Path(os.fsdecode(os.fsencode(root) + b"/caf\xe9\n\x1b[31m")).write_bytes(b"bytes")
    (root / "ünïcode").write_bytes(b"text")
    (root / "run").write_bytes(b"#!")
    (root / "run").chmod(0o755)
    (root / "closed").mkdir()
    (root / "closed/file").write_bytes(b"!")
    (root / "closed").chmod(0o555)
    (root / "link").symlink_to("empty file")
    (deep / "up").symlink_to("../../run")
    (root / "long link").symlink_to("d" * 200 + "/" + "e" * 200 + "/x")
    for path in root.rglob("*"):
        if not path.is_symlink():
            os.utime(path, (1_000_000_000, 1_234_567_890))
    os.utime(root, (1, 2))
    return root


def test_out_and_in_and_out_again(tree: Path, tmp_path: Path) -> None:
    """Content, names, modes, times and symlinks of a tree come through both packers and both unpackers."""
    out = agent("--pack", tree, "0")
    assert (out.returncode, out.stderr) == (0, b"")
    assert receive(out.stdout, tmp_path / "host") == []
    assert picture(tmp_path / "host") == picture(tree)
    inside = agent("--unpack", tmp_path / "inside", "", stdin=packed(tmp_path / "host"))
    assert (inside.returncode, inside.stderr) == (0, b"")
    assert picture(tmp_path / "inside") == picture(tree)


def test_other_readers_read_it(tree: Path, tmp_path: Path) -> None:
    """GNU tar and Python's reader find in both packers' archives what is in the tree."""
    for place, archive in enumerate((agent("--pack", tree, "0").stdout, packed(tree))):
        root = tmp_path / f"gnu{place}"
        root.mkdir()
        subprocess.run(["tar", "-x", "-p", "-C", root], input=archive, check=True)
        assert picture(root) == picture(tree)
        with tarfile.open(fileobj=io.BytesIO(archive)) as opened:
            assert len(opened.getmembers()) == len(picture(tree))


def test_sizes_beyond_eight_gigabytes(tmp_path: Path) -> None:
    """A file of 9 GiB has its size in both packers' archives, in a form that all readers know."""
    large = tmp_path / "large"
    large.touch()
    os.truncate(large, 9 << 30)
    with subprocess.Popen([agent_path(), "--pack", large, "0"], stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        head = process.stdout.read(2048)
        process.kill()
    ours = io.BytesIO()
    with contextlib.suppress(ValueError):
        pack(str(large), Archive(_no_more_than(ours, 4096), b"."), follow=False, left_out=lambda *_: None)
    for archive in (head, ours.getvalue()):
        with tarfile.open(fileobj=io.BytesIO(archive), mode="r|") as opened:
            member = opened.next()
            assert member is not None
            assert member.size == 9 << 30


def _no_more_than(out: io.BytesIO, most: int) -> Callable[[bytes | memoryview], None]:
    def write(data: bytes | memoryview) -> None:
        out.write(data)
        if out.tell() > most:
            raise ValueError

    return write


# Where a copy goes: docker's rules


FILE = file(b".", b"new") + END
TREE = directory(b".") + file(b"./f", b"new") + END


def by_host(archive: bytes, to: str, name: str) -> bool:
    try:
        receive(archive, to, name.encode())
    except SandboxError:
        return False
    return True


def by_agent(archive: bytes, to: str, name: str) -> bool:
    return agent("--unpack", to, name, stdin=archive).returncode == 0


@pytest.mark.parametrize("unpack", [by_host, by_agent])
@pytest.mark.parametrize(
    ("archive", "to", "name", "made"),
    [
        (FILE, "missing", "it", "missing"),
        (FILE, "missing/", "it", None),
        (FILE, "no/where", "it", None),
        (FILE, "file", "it", "file"),
        (FILE, "file/", "it", None),
        (FILE, "dir", "it", "dir/it"),
        (FILE, "dir/", "it", "dir/it"),
        (FILE, "dir", "sub", None),
        (FILE, "dir", "old", "dir/old"),
        (FILE, "dir", "", None),
        (FILE, "to-dir", "it", "dir/it"),
        (TREE, "missing", "it", "missing/f"),
        (TREE, "missing/", "it", "missing/f"),
        (TREE, "no/where", "it", None),
        (TREE, "file", "it", None),
        (TREE, "file/", "it", None),
        (TREE, "dir", "it", "dir/it/f"),
        (TREE, "dir", "sub", "dir/sub/f"),
        (TREE, "dir", "old", None),
        (TREE, "dir", "", "dir/f"),
        (TREE, "to-dir/", "it", "dir/it/f"),
        (TREE, "to-dir", "", "dir/f"),
        (TREE, "dir", "link", None),
    ],
)
def test_where_it_goes(
    archive: bytes,
    to: str,
    name: str,
    made: str | None,
    *,
    unpack: Callable[[bytes, str, str], bool],
    tmp_path: Path,
) -> None:
    """Both unpackers agree on where a copy goes, and on what is refused; what is refused changes nothing."""
    (tmp_path / "dir/sub").mkdir(parents=True)
    (tmp_path / "dir/old").write_bytes(b"old")
    (tmp_path / "dir/link").symlink_to("sub")
    (tmp_path / "file").write_bytes(b"old")
    (tmp_path / "to-dir").symlink_to("dir")
    before = picture(tmp_path)
    assert unpack(archive, f"{tmp_path}/{to}", name) == (made is not None)
    after = {path: what[3] for path, what in picture(tmp_path).items()}
    if made is None:
        assert after == {path: what[3] for path, what in before.items()}
    else:
        assert after[made.encode()] == b"new"
        assert set(after) - set(before) <= {made.encode(), os.path.dirname(made).encode()}


def test_what_was_there_is_replaced_and_not_written_through(tmp_path: Path) -> None:
    """A symlink or hard link in the place of a file gives way; what it leads to stays."""
    for place, unpack in enumerate((by_host, by_agent)):
        root = tmp_path / str(place)
        root.mkdir()
        (root / "secret").write_bytes(b"secret")
        (root / "s").symlink_to("secret")
        os.link(root / "secret", root / "h")
        archive = directory(b".") + file(b"./s", b"new") + file(b"./h", b"new") + END
        assert unpack(archive, str(root), "")
        assert {path.name: path.read_bytes() for path in root.iterdir()} == {
            "secret": b"secret",
            "s": b"new",
            "h": b"new",
        }
        assert not (root / "s").is_symlink()


@pytest.mark.requires("root")
@pytest.mark.parametrize("unpack", [by_host, by_agent])
def test_no_privileged_bits(unpack: Callable[[bytes, str, str], bool], tmp_path: Path) -> None:
    """Set-uid, set-gid and sticky bits are gone, and owners are the caller, whatever an archive says."""
    archive = (
        directory(b".", 0o7777, uid=0, gid=5)
        + file(b"./f", b"x", mode=0o6755, uid=1234, gid=1234)
        + directory(b"./d", 0o3777, uid=7)
        + END
    )
    assert unpack(archive, f"{tmp_path}/new", "")
    for path, mode in (("", 0o777), ("f", 0o755), ("d", 0o777)):
        found = (tmp_path / "new" / path).stat()
        assert (stat.S_IMODE(found.st_mode), found.st_uid, found.st_gid) == (mode, 0, 0)


# Bounds


def test_no_more_bytes_than_allowed(tmp_path: Path) -> None:
    """An archive is cut off where the bound is, by what comes and not by what a header says; no half file stays."""
    archive = directory(b".") + file(b"./a", bytes(5000)) + file(b"./b", bytes(5000)) + END
    with pytest.raises(SandboxError, match="more than 9000 bytes come out"):
        receive(archive, tmp_path / "new", most=9000)
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["a"]
    receive(archive, tmp_path / "all", most=len(archive))


def test_no_more_entries_than_allowed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Names are bounded as well: they cost the host more than bytes do."""
    monkeypatch.setattr(packing, "MOST_ENTRIES", 3)
    three = directory(b".") + file(b"./a") + file(b"./b")
    receive(three + END, tmp_path / "three")
    with pytest.raises(SandboxError, match="more than 3 files"):
        receive(three + file(b"./c") + END, tmp_path / "four")


@pytest.mark.parametrize(
    "endless",
    [
        file(b"x", b"9 path=a\n" * 50, kind=b"x"),
        file(b"x", b"a" * 600, kind=b"g"),
        file(b"././@LongLink", b"a" * 600, kind=b"L", magic=b"ustar  \0"),
    ],
)
def test_headers_without_end_are_bounded(endless: bytes, tmp_path: Path) -> None:
    """Extended headers that no entry follows count for the bound of bytes."""

    def source(size: int) -> bytes:
        return (endless * (size // len(endless) + 1))[: size // len(endless) * len(endless)]

    stream = Stream(source, 5_000_000)
    with pytest.raises(SandboxError, match="more than 5000000 bytes"):
        list(judged(stream, rooted=True, left_out=lambda *_: None))


# Symlinks


@pytest.mark.parametrize(
    ("link", "depth", "out"),
    [
        (b"a", 0, False),
        (b"a/b", 0, False),
        (b"./a", 0, False),
        (b".", 0, False),
        (b"..", 1, False),
        (b"../a", 1, False),
        (b"../../a/b", 2, False),
        (b".././../a", 2, False),
        (b"/", 5, True),
        (b"/etc/passwd", 5, True),
        (b"..", 0, True),
        (b"../a", 0, True),
        (b"../../a", 1, True),
        (b"a/..", 3, True),
        (b"a/../b", 3, True),
        (b"../a/..", 3, True),
        (b"", 0, True),
        (b"a" * 4096, 0, True),
    ],
)
def test_which_symlinks_lead_out(link: bytes, depth: int, out: bool) -> None:
    """Absolute targets, more ".." than there are directories, and any ".." behind a name."""
    assert leads_out(link, depth) == out


@settings(max_examples=300, deadline=None)
@given(st.data())
def test_no_symlink_that_is_made_leads_out(data: st.DataObject) -> None:
    """Whatever symlinks an archive has, none that is made resolves to anything outside, by the kernel's own rules."""
    names = st.sampled_from([b"a", b"b", b"..", b".", b""])
    parts = [directory(b"."), directory(b"./a"), directory(b"./a/a")]
    for place in range(data.draw(st.integers(1, 6))):
        home = data.draw(st.sampled_from([b".", b"./a", b"./a/a"]))
        target = b"/".join(data.draw(st.lists(names, min_size=1, max_size=5)))
        parts.append(symlink(home + b"/" + data.draw(st.sampled_from([b"b", b"s%d" % place])), target))
    with _directory() as root:
        for name in "ab":
            (root / name).mkdir()
        receive(b"".join(parts) + END, root / "x")
        for path in (root / "x").rglob("*"):
            with contextlib.suppress(OSError, RuntimeError):  # those that lead nowhere
                resolved = path.resolve(strict=True)
                assert resolved.is_relative_to(root / "x"), (os.readlink(path), resolved)


@contextlib.contextmanager
def _directory() -> Iterator[Path]:
    import tempfile

    with tempfile.TemporaryDirectory() as name:
        yield Path(os.path.realpath(name))


# Broken archives


@settings(max_examples=400, deadline=None)
@given(st.data())
def test_any_bytes_end_in_one_error(data: st.DataObject) -> None:
    """Mutated archives are read or refused by either unpacker, and nothing is made beside the target."""
    archive = bytearray(
        directory(b".")
        + pax([(b"path", b"./" + b"n" * 120)])
        + file(b"x", b"content" * 200)
        + symlink(b"./s", b"x")
        + directory(b"./d")
        + file(b"./d/f", b"y")
        + hard_link(b"./h", b"./d/f")
        + END
    )
    for _ in range(data.draw(st.integers(1, 4))):
        at = data.draw(st.integers(0, len(archive) - 1))
        archive[at : at + data.draw(st.integers(0, 3))] = data.draw(st.binary(max_size=4))
    with _directory() as root:
        with contextlib.suppress(SandboxError, ImageError):
            receive(bytes(archive), root / "x")
        assert {path.name for path in root.iterdir()} <= {"x"}


@pytest.mark.parametrize(
    ("archive", "words"),
    [
        (b"", ""),
        (END, ""),
        (file(b".", b"x")[:700], "middle"),
        (file(b"./f", b"x") + END, "not where it belongs"),
        (directory(b".") + directory(b".") + END, "not where it belongs"),
        (file(b".", b"x") + file(b"./f", b"x") + END, "below what is no directory"),
        (directory(b".") + file(b"./no/f", b"x") + END, "its directory is not there"),
        (directory(b".") + file(b"./f") + file(b"./f/g") + END, "goes through a file"),
        (directory(b".") + header(b"./f", checksum=1) + END, "checksum"),
        (
            directory(b".")
            + header(b"./f", kind=b"S", magic=b"ustar  \0", patches={483: octal(9, 12)})
            + END,
            "holes",
        ),
    ],
)
def test_unsound_archives(archive: bytes, words: str, tmp_path: Path) -> None:
    """What is no archive of agent/pack.h is refused in one line."""
    if not words:
        assert receive(archive, tmp_path / "x") == []
        assert not (tmp_path / "x").exists()
        return
    with pytest.raises((SandboxError, ImageError), match=words) as refused:
        receive(archive, tmp_path / "x")
    assert "\n" not in str(refused.value)


def test_the_agent_says_what_it_leaves_out(tree: Path, tmp_path: Path) -> None:
    """Of what cannot be copied it packs nothing, says which, with the reason, and exits with 1; of nothing with 2."""
    os.mkfifo(tree / "fifo")
    done = agent("--pack", tree, "0")
    assert (done.returncode, done.stderr) == (1, b"0 ./fifo\0")
    missing = agent("--pack", tmp_path / "missing", "0")
    assert (missing.returncode, missing.stdout) == (2, b"")
    assert missing.stderr == b"2 " + os.fsencode(tmp_path) + b"/missing\0"
    # A directory too deep to be named has an end, too.
    here = os.open(tree, os.O_RDONLY)
    for _ in range(300):
        os.mkdir("n" * 20, dir_fd=here)
        below = os.open("n" * 20, os.O_RDONLY, dir_fd=here)
        os.close(here)
        here = below
    os.close(here)
    deep = agent("--pack", tree, "0")
    assert deep.returncode == 1
    assert b"36 ./nnnnn" in deep.stderr
    assert receive(deep.stdout, tmp_path / "host") == []
    subprocess.run(["rm", "-rf", tree], check=True)


def test_a_file_that_shrinks(tmp_path: Path) -> None:
    """A file that is shorter than its size said keeps its place with zeros, is told, and what follows is whole."""
    # The kernel says 4096 of it, and it has less to read.
    done = agent("--pack", Path("/sys/kernel/mm"), "0")
    assert done.returncode in (0, 1)
    with tarfile.open(fileobj=io.BytesIO(done.stdout)) as opened:
        sizes = [member.size for member in opened if member.isfile()]
    assert sizes
    assert b"5 ./" in done.stderr
    receive(done.stdout, tmp_path / "mm")
