"""Hostile files: what a job, or whoever has taken its kernel over, sends to `ringfence cp` stays where it was asked to.

Each attack that aims outside is first tried on extractors that trust the archive, so that it is known to work.
"""

import io
import os
import subprocess
import tarfile
from collections.abc import Callable
from pathlib import Path

import pytest

from archives import END, directory, file, hard_link, header, long_name, octal, pax, symlink
from ringfence.errors import ImageError, SandboxError
from ringfence.sandbox.files import destination
from ringfence.sandbox.packing import Stream, judged

# Pythons from before the filters have only the trusting way.
TRUSTED = {"filter": "fully_trusted"} if hasattr(tarfile, "fully_trusted_filter") else {}
SECRET = b"the host's own\n"
TOP = directory(b".")


@pytest.fixture
def outside(tmp_path: Path) -> Path:
    """What must not change: a directory with one file, beside the target of the copy."""
    place = tmp_path / "outside"
    place.mkdir(mode=0o755)
    (place / "secret").write_bytes(SECRET)
    return place


def look(outside: Path) -> list[tuple[object, ...]]:
    """All that an archive could change outside."""
    found = [outside, *sorted(outside.rglob("*"))]
    return [
        (path, status.st_mode, status.st_uid, status.st_nlink, path.read_bytes() if path.is_file() else b"")
        for path, status in ((path, path.lstat()) for path in found)
    ]


def receive(archive: bytes, target: Path, name: bytes = b"it") -> list[bytes]:
    """Do what `ringfence cp` does with what comes out of a sandbox; return what was left out."""
    left_out: list[bytes] = []
    stream = Stream(io.BytesIO(archive).read, 1 << 20)
    tree = destination(str(target), name)
    try:
        for path, entry in judged(stream, rooted=True, left_out=lambda path, _: left_out.append(path)):
            tree.add(path, entry, stream)
        tree.finish()
    finally:
        tree.close()
    return left_out


def with_gnu_tar(archive: bytes, root: Path) -> None:
    subprocess.run(
        ["tar", "-x", "-p", "-P", "-f", "-"], cwd=root, input=archive, capture_output=True, check=False
    )


def with_tarfile(archive: bytes, root: Path) -> None:
    with tarfile.open(fileobj=io.BytesIO(archive)) as opened:
        for member in opened:
            member.name = member.name.rstrip("/")
        try:
            opened.extractall(root, **TRUSTED)
        except (OSError, KeyError):
            pass


def _escapes(outside: str) -> dict[str, bytes]:
    there = os.fsencode(outside)
    beside = b"../outside"
    return {
        "absolute path": file(there + b"/pwned", b"x"),
        "dot dot": file(beside + b"/pwned", b"x"),
        "dot dot below": directory(b"./a") + file(b"./a/../../outside/pwned", b"x"),
        "dot dot in a long name": long_name(b"./" * 60 + beside + b"/pwned") + file(b"a", b"x"),
        "dot dot in pax": pax([(b"path", beside + b"/pwned")]) + file(b"a", b"x"),
        "absolute symlink": symlink(b"./s", there) + file(b"./s/pwned", b"x"),
        "relative symlink": symlink(b"./s", beside) + file(b"./s/pwned", b"x"),
        "symlink by way of another": directory(b"./d")
        + symlink(b"./d/up", b"../d")
        + symlink(b"./s", b"d/up/../../outside")
        + file(b"./s/pwned", b"x"),
        "symlink to here and up": symlink(b"./a", b".")
        + symlink(b"./s", b"a/../outside")
        + file(b"./s/pwned", b"x"),
        "long symlink": pax([(b"linkpath", b"./" * 100 + beside)])
        + symlink(b"./s", b"x")
        + file(b"./s/pwned", b"x"),
        "directory through a symlink": symlink(b"./s", there) + directory(b"./s/pwned"),
        "symlink through a symlink": symlink(b"./s", there) + symlink(b"./s/pwned", b"/etc"),
        "directory's mode through a symlink": symlink(b"./s", there) + directory(b"./s", 0o700),
        "file over a symlink": symlink(b"./s", there + b"/secret") + file(b"./s", b"x"),
        "hard link": hard_link(b"./h", there + b"/secret"),
        "relative hard link": hard_link(b"./h", beside + b"/secret"),
        "write through a hard link": hard_link(b"./h", there + b"/secret") + file(b"./h", b"x"),
        "directory becomes a symlink": directory(b"./s") + symlink(b"./s", there) + file(b"./s/pwned", b"x"),
    }


# What a trusting extractor does to the outside with these is to have given the name of a file in there to others.
@pytest.mark.parametrize("attack", sorted(_escapes("/x")))
def test_nothing_leads_outside(attack: str, outside: Path, tmp_path: Path) -> None:
    """What fools an extractor that trusts the archive changes nothing outside of the target, and leaves no way out."""
    archive = TOP + _escapes(str(outside))[attack] + END
    before = look(outside)
    target = tmp_path / "target"
    try:
        receive(archive, target)
    except (SandboxError, ImageError) as refused:
        assert "\n" not in str(refused)
    assert look(outside) == before
    assert {path.name for path in tmp_path.iterdir()} <= {"target", "outside"}
    for path in target.rglob("*") if target.exists() else ():
        assert path.resolve().is_relative_to(target), path
        assert path.is_dir() or path.read_bytes() != SECRET
    if attack != "directory becomes a symlink":  # which GNU tar and Python do not do, either
        assert _fooled(archive, outside, tmp_path), "no attack: nothing to prove"


def _fooled(archive: bytes, outside: Path, tmp_path: Path) -> bool:
    fooled = False
    for extract in (with_gnu_tar, with_tarfile):
        before = look(outside)
        root = tmp_path / extract.__name__
        root.mkdir()
        extract(archive, root)
        if look(outside) != before:
            fooled = True
            for path in outside.iterdir():
                path.rmdir() if path.is_dir() and not path.is_symlink() else path.unlink()
            outside.chmod(0o755)
            (outside / "secret").write_bytes(SECRET)
    return fooled


@pytest.mark.parametrize(
    "make",
    [
        lambda place, there: (place / "s").symlink_to(there),
        lambda place, there: (place / "s").symlink_to("../outside"),
    ],
)
def test_symlinks_that_were_there_are_not_followed(
    make: Callable[[Path, Path], None], outside: Path, tmp_path: Path
) -> None:
    """A symlink in the target, such as an earlier job has left in a shared directory, leads no write out."""
    target = tmp_path / "target"
    target.mkdir()
    before = look(outside)
    make(target, outside)
    for archive in (file(b"./s/pwned", b"x"), directory(b"./s") + file(b"./s/pwned", b"x")):
        with pytest.raises(SandboxError, match=r"goes through a symlink|in the way"):
            receive(TOP + archive + END, target, b"")
    receive(TOP + file(b"./s", b"x") + END, target, b"")
    assert (target / "s").read_bytes() == b"x"
    assert not (target / "s").is_symlink()
    assert look(outside) == before


@pytest.mark.parametrize("link", [b"/etc/passwd", b"../x", b"x", b"outside/secret"])
def test_what_was_copied_itself_is_no_way_out(link: bytes, tmp_path: Path) -> None:
    """What was asked for is refused when it is a symlink, which would lead wherever the job likes."""
    with pytest.raises(SandboxError, match=r"which leads out.*-L"):
        receive(symlink(b".", link) + END, tmp_path / "new")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.requires("root")
@pytest.mark.parametrize("kind", [b"3", b"4", b"6"])
def test_no_device_nodes(kind: bytes, tmp_path: Path) -> None:
    """Devices and FIFOs are left out and told; a trusting extractor makes them."""
    node = header(b"./null", kind=kind, patches={329: octal(1, 8), 337: octal(3, 8)})
    assert receive(TOP + node + file(b"./f", b"x") + END, tmp_path / "new") == [b"null"]
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["f"]
    with_gnu_tar(TOP + node + END, tmp_path)
    assert not (tmp_path / "null").is_file()
    assert os.path.lexists(tmp_path / "null")


def test_nothing_special_is_replaced(tmp_path: Path) -> None:
    """A FIFO, socket or device of the host's stays, whatever is called as it is."""
    os.mkfifo(tmp_path / "f")
    with pytest.raises(SandboxError, match="neither a file nor a directory"):
        receive(file(b".", b"x") + END, tmp_path / "f")
    (tmp_path / "it").mkdir()
    os.mkfifo(tmp_path / "it/f")
    for archive in (file(b"./f", b"x"), symlink(b"./f", b"x"), directory(b"./f")):
        with pytest.raises(SandboxError, match="in the way"):
            receive(TOP + archive + END, tmp_path)
    with pytest.raises(SandboxError, match="neither a file nor a directory"):
        receive(file(b".", b"x") + END, Path("/dev/null"))


def test_names_cannot_forge_messages(tmp_path: Path) -> None:
    """Control characters in names reach a terminal as escapes only."""
    with pytest.raises(SandboxError) as refused:
        receive(TOP + file(b"./\x1b]0;owned\x07\n/x", b"x") + END, tmp_path / "new")
    assert str(refused.value).isprintable()
