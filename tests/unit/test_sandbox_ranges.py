"""Host id ranges: never two sandboxes with the same ids, whoever asks at the same time."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from ringfence.errors import SandboxError
from ringfence.linux import paths
from ringfence.sandbox import ranges

SIZE = 65536


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A place for ranges of the test's own, for root and for users."""
    monkeypatch.setattr(paths, "ROOT_RUN", str(tmp_path / "run"))
    monkeypatch.setenv("RINGFENCE_RUN_DIR", str(tmp_path / "run"))
    return tmp_path / "run/ranges"


def given_out(home: Path) -> list[int]:
    return sorted(int(path.name) for path in home.glob("[0-9]*"))


def test_a_range_is_recorded_with_its_sandbox(home: Path) -> None:
    """Whole ranges, aligned, in the part of the ids that no other allocator uses."""
    base = ranges.allocate(SIZE, "/run/x")
    assert 0x70000000 <= base <= 0x80000000 - SIZE
    assert (base - 0x70000000) % SIZE == 0
    assert (home / str(base)).read_text() == "/run/x"
    assert (home / str(base)).stat().st_mode & 0o077 == 0


def test_only_the_owner_gives_a_range_back(home: Path) -> None:
    """Another sandbox, a second release and a base of nobody change nothing."""
    base = ranges.allocate(SIZE, "/run/x")
    ranges.release(base, "/run/y")
    assert given_out(home) == [base]
    ranges.release(base, "/run/x")
    ranges.release(base, "/run/x")
    ranges.release(0, "/run/x")
    assert given_out(home) == []


def test_what_crashed_sandboxes_had_is_given_back(home: Path, tmp_path: Path) -> None:
    """A range whose sandbox has no directory any more is free; that of a living one is not."""
    living, dead = tmp_path / "living", tmp_path / "dead"
    living.mkdir()
    bases = [ranges.allocate(SIZE, str(directory)) for directory in (living, dead)]
    assert list(ranges.abandoned()) == bases[1:]
    assert given_out(home) == bases[:1]


def test_all_in_use_is_said_with_the_way_out(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every range is given out once, none twice, and then it is an error."""
    monkeypatch.setattr(ranges, "_BEYOND", ranges._FIRST + 8 * SIZE)
    bases = {ranges.allocate(SIZE, f"/run/{place}") for place in range(8)}
    assert len(bases) == 8
    with pytest.raises(SandboxError, match="all 8 id ranges are in use") as caught:
        ranges.allocate(SIZE, "/run/9")
    assert "ringfence gc" in caught.value.hint
    ranges.release(
        min(bases), next(f"/run/{place}" for place in range(8) if owner(min(bases)) == f"/run/{place}")
    )
    assert ranges.allocate(SIZE, "/run/9") == min(bases)


def owner(base: int) -> str:
    return Path(paths.ROOT_RUN, "ranges", str(base)).read_text()


def subordinate(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, uids: str, gids: str) -> None:
    """Let the module read these files for /etc/subuid and /etc/subgid."""
    (tmp_path / "subuid").write_text(uids)
    (tmp_path / "subgid").write_text(gids)
    real = ranges._subordinate
    monkeypatch.setattr(ranges, "_subordinate", lambda path: real(str(tmp_path / os.path.basename(path))))


def test_ids_that_others_were_given_are_left_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A range that /etc/subuid or /etc/subgid hands out in part is not used at all."""
    first = ranges._FIRST
    monkeypatch.setattr(ranges, "_BEYOND", first + 8 * SIZE)
    uids = f"somebody:{first + SIZE + 5}:1\nbad line\nx:y:z\n"
    gids = f"group:{first + 3 * SIZE - 1}:2\nlow:100000:65536\nhigh:{ranges._BEYOND}:65536\n"
    subordinate(tmp_path, monkeypatch, uids, gids)
    bases = {ranges.allocate(SIZE, f"/run/{place}") for place in range(5)}
    assert bases == {first + place * SIZE for place in (0, 4, 5, 6, 7)}
    with pytest.raises(SandboxError, match="all 5"):
        ranges.allocate(SIZE, "/run/6")


def test_a_users_ranges_are_in_both_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By name or number, where users and groups overlap, in whole ranges."""
    me = os.geteuid()
    subordinate(tmp_path, monkeypatch, f"{me}:100000:10000\nother:500000:65536\n", f"{me}:104000:65536\n")
    assert ranges.allocate(4096, "/run/x", rootless=True) == 104000
    with pytest.raises(SandboxError, match="all 1 id ranges"):
        ranges.allocate(4096, "/run/y", rootless=True)


def test_too_few_ids_are_not_called_used_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The line says what is missing and how to get it."""
    subordinate(tmp_path, monkeypatch, f"{os.geteuid()}:100000:1000\n", "")
    with pytest.raises(SandboxError, match="no 4096 ids in a row") as caught:
        ranges.allocate(4096, "/run/x", rootless=True)
    assert "--add-subuids" in caught.value.hint


def test_a_place_that_others_can_write_to_is_refused(home: Path) -> None:
    """Whoever could remove a record could have a range given out twice."""
    home.mkdir(parents=True)
    home.chmod(0o777)
    with pytest.raises(SandboxError, match="can be changed by others"):
        ranges.allocate(SIZE, "/run/x")


WORKER = """
import sys
from ringfence.linux import paths
paths.ROOT_RUN = sys.argv[1]
from ringfence.sandbox import ranges
ranges._BEYOND = ranges._FIRST + 64 * 65536
sys.stdin.read(1)
print(*(ranges.allocate(65536, f"/run/{sys.argv[2]}-{i}") for i in range(4)))
"""


def test_sixteen_processes_at_once_get_disjoint_ranges(tmp_path: Path) -> None:
    """Exactly as many as there are, and no range twice."""
    workers = [
        subprocess.Popen(
            [sys.executable, "-c", WORKER, str(tmp_path / "run"), str(place)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        for place in range(16)
    ]
    for worker in workers:  # all are waiting by now
        assert worker.stdin is not None
        worker.stdin.write(".")
        worker.stdin.flush()
    answers = [worker.communicate(timeout=60)[0].split() for worker in workers]
    assert all(worker.returncode == 0 for worker in workers)
    bases = [int(base) for answer in answers for base in answer]
    assert len(bases) == len(set(bases)) == 64
