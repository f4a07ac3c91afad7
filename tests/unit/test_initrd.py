"""The first file system of a guest, as bytes."""

import shutil
import subprocess
from pathlib import Path

import pytest

from ringfence.runtime.initrd import initrd

MODULES = [("b.ko", b"second\n"), ("a-1_x.ko", b"x" * 5)]


def listing(archive: bytes) -> list[tuple[str, str, int]]:
    """Mode, name and size of each entry, read back by the letter of the format."""
    found: list[tuple[str, str, int]] = []
    at = 0
    while True:
        assert archive[at : at + 6] == b"070701"
        fields = [int(archive[at + 6 + 8 * i : at + 14 + 8 * i], 16) for i in range(13)]
        name = archive[at + 110 : at + 110 + fields[11] - 1].decode()
        at += -(-(110 + fields[11]) // 4) * 4
        if name == "TRAILER!!!":
            assert at == len(archive)
            return found
        assert fields[2:4] == [0, 0], "it belongs to root"
        assert fields[5] == 0, "no time of the build"
        found.append((oct(fields[1]), name, fields[6]))
        at += -(-fields[6] // 4) * 4


def test_agent_and_console() -> None:
    """The archive holds the agent as init, a console, and nothing else."""
    assert listing(initrd(b"ELF")) == [
        ("0o40755", "dev", 0),
        ("0o20600", "dev/console", 0),
        ("0o100755", "init", 3),
    ]


def test_modules_in_their_order() -> None:
    """Modules come along with a list that says in which order they are loaded."""
    archive = initrd(b"ELF", MODULES)
    assert [name for _, name, _ in listing(archive)][3:] == [
        "modules",
        "modules/b.ko",
        "modules/a-1_x.ko",
        "modules.list",
    ]
    assert b"b.ko\na-1_x.ko\n" in archive


def test_same_bytes() -> None:
    """Two archives of the same parts are the same; other parts, or another order, give another one."""
    assert initrd(b"ELF", MODULES) == initrd(b"ELF", MODULES)
    assert len({initrd(b"ELF"), initrd(b"ELE"), initrd(b"ELF", MODULES), initrd(b"ELF", MODULES[::-1])}) == 4


@pytest.mark.skipif(shutil.which("cpio") is None, reason="cpio is not installed")
def test_unpacks(tmp_path: Path) -> None:
    """Another program reads it: contents come out as they went in."""
    archive = initrd(bytes(range(256)) * 7, MODULES)
    command = ["cpio", "-idm", "--quiet", "--no-absolute-filenames", "init", "modules/*", "modules.list"]
    subprocess.run(command, cwd=tmp_path, input=archive, check=True)
    assert (tmp_path / "init").read_bytes() == bytes(range(256)) * 7
    assert (tmp_path / "init").stat().st_mode & 0o777 == 0o755
    assert {name: (tmp_path / "modules" / name).read_bytes() for name, _ in MODULES} == dict(MODULES)


@pytest.mark.parametrize(
    "name", ["", "a", "../a.ko", "a/b.ko", "a b.ko", "a.ko\n", ".ko", "ä.ko", "x" * 61 + ".ko"]
)
def test_names_that_are_none(name: str) -> None:
    """A module cannot be a path, or anything else that the guest would read differently."""
    with pytest.raises(ValueError, match="no name of a module"):
        initrd(b"", [(name, b"")])


def test_list_fits_the_guest() -> None:
    """No module comes twice, and the list of the most that there may be fits what the guest reads of it."""
    with pytest.raises(ValueError, match="modules"):
        initrd(b"", [("a.ko", b""), ("a.ko", b"")])
    many = [(f"{i:060}"[-57:] + ".ko", b"") for i in range(65)]
    with pytest.raises(ValueError, match="modules"):
        initrd(b"", many)
    assert sum(len(name) + 1 for name, _ in many[:64]) < 4096
    initrd(b"", many[:64])
