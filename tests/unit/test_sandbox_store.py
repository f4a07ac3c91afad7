"""The record of sandboxes: found again after any crash, and cleaned up only by whoever can have the lock."""

import fcntl
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from ringfence.errors import HostError, SandboxError, UsageError
from ringfence.linux import paths
from ringfence.runtime.base import Instance
from ringfence.sandbox import launch, reap, store


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """State, run directory and id ranges of the test's own."""
    for name in ("run", "state"):
        monkeypatch.setenv(f"RINGFENCE_{name.upper()}_DIR", str(tmp_path / name))
    monkeypatch.setattr(paths, "ROOT_RUN", str(tmp_path / "run"))
    return tmp_path / "run/sandboxes"


def record(**more: object) -> dict[str, object]:
    return {"name": "", "detached": False, "remove": True, "base": 0, "rootless": os.geteuid() != 0, **more}


def names(home: Path) -> list[str]:
    return sorted(path.name for path in home.iterdir())


def test_what_is_written_is_read_back(home: Path) -> None:
    """Also what no UTF-8 is, such as a file name of another time."""
    entry = store.create()
    assert entry.record() == {}
    entry.write_record(record(argv=["a\udcff", "b\n"], name="web"))
    assert store.find("web").record() == record(argv=["a\udcff", "b\n"], name="web")
    assert entry.ended() == {}
    entry.write_ended({"exit_status": 3})
    assert entry.ended() == {"exit_status": 3}
    assert names(Path(entry.directory)) == ["ended.json", "lock", "record.json"]
    assert Path(entry.directory).stat().st_mode & 0o077 == 0
    entry.unlock()


def test_a_sandbox_is_found_by_id_its_beginning_or_name(home: Path) -> None:
    """An ambiguous or unknown name is a usage error that says what to do."""
    first, second = store.create(), store.create()
    first.write_record(record(name="web"))
    second.write_record(record(name="db"))
    assert store.find(first.id).id == store.find(first.id[:6]).id == store.find("web").id == first.id
    assert store.name_taken("db")
    assert not store.name_taken("d")
    with pytest.raises(UsageError, match="no sandbox 'nosuch'"):
        store.find("nosuch")
    with pytest.raises(UsageError, match="no sandbox"):
        store.find(first.id[:3])  # too short to be meant
    os.rename(second.directory, home / (first.id[:8] + "0000"))
    with pytest.raises(UsageError, match="the beginning of 2 ids"):
        store.find(first.id[:8])


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"\xff\xfe", b"{}" + b" " * (1 << 20) + b"x"])
def test_a_damaged_record_is_no_record(home: Path, content: bytes) -> None:
    """Nothing is guessed, and nothing breaks that walks over all sandboxes."""
    entry = store.create()
    Path(entry.path("record.json")).write_bytes(content)
    assert entry.record() == {} or content.startswith(b"{}")
    assert [found.id for found in store.entries()] == [entry.id]
    entry.unlock()
    assert reap.sweep().ids == [entry.id]
    assert names(home) == []


def test_a_record_is_not_read_through_a_link(home: Path, tmp_path: Path) -> None:
    """What lies in a sandbox's directory is a file of ours or nothing."""
    entry = store.create()
    (tmp_path / "elsewhere").write_text('{"name": "x"}')
    os.symlink(tmp_path / "elsewhere", entry.path("record.json"))
    assert entry.record() == {}


def test_the_lock_says_who_lives(home: Path) -> None:
    """It is held by an open description: as long as anybody shares it, the sandbox lives."""
    entry = store.create()
    shared = os.dup(entry.lock_fd)  # as an agent does
    seen = store.find(entry.id)
    assert seen.alive()
    assert not seen.try_lock()
    entry.unlock()
    assert seen.alive()
    os.close(shared)
    assert not seen.alive()
    assert seen.try_lock()
    assert not store.find(entry.id).try_lock()
    seen.unlock()


HOLDER = """
import sys, time
from ringfence.sandbox import store
entry = store.create()
entry.write_record({"name": "held", "detached": False})
print(entry.id, flush=True)
time.sleep(60)
"""


@pytest.fixture
def holder() -> Iterator["subprocess.Popen[str]"]:
    """Another process that has made a sandbox and lives."""
    process = subprocess.Popen([sys.executable, "-c", HOLDER], stdout=subprocess.PIPE, text=True)
    yield process
    process.kill()
    process.communicate()


def test_a_sweep_takes_the_dead_and_leaves_the_living(home: Path, holder: "subprocess.Popen[str]") -> None:
    """kill -9 needs no more than the next sweep."""
    assert holder.stdout is not None
    theirs = holder.stdout.readline().strip()
    mine = store.create()
    mine.write_record(record())
    mine.unlock()
    assert reap.sweep().ids == [mine.id]
    assert names(home) == [theirs]
    os.kill(holder.pid, signal.SIGKILL)
    holder.wait()
    assert reap.sweep().ids == [theirs]
    assert names(home) == []


def test_a_detached_sandbox_keeps_its_record_and_log_until_it_is_removed(home: Path) -> None:
    """After its end it is settled: no lock, so it is neither alive nor to be swept again."""
    entry = store.create()
    entry.write_record(record(detached=True, remove=False, name="job"))
    Path(entry.log_path()).write_bytes(b"")
    Path(entry.path("config.json")).write_text("{}")
    entry.mark_started()
    entry.unlock()
    assert reap.sweep().ids == [entry.id]
    assert reap.sweep().ids == []
    assert names(Path(entry.directory)) == ["ended.json", "record.json", "started"]
    found = store.find("job")
    assert not found.alive()
    assert os.path.exists(found.log_path())
    found.remove()
    assert names(home) == []
    assert not os.path.exists(found.log_path())


def test_a_detached_sandbox_whose_job_was_never_let_go_leaves_nothing(home: Path) -> None:
    """Its launcher was killed before it printed an id: nobody could ask for its log."""
    entry = store.create()
    entry.write_record(record(detached=True, remove=False, name="job"))
    entry.unlock()
    assert reap.sweep().ids == [entry.id]
    assert names(home) == []


@pytest.mark.parametrize("prefix", [".new-", ".gone-"])
def test_what_a_crash_left_half_made_or_half_removed(home: Path, prefix: str) -> None:
    """It is removed unless somebody may still be at it."""
    store.sandboxes_dir()
    (home / f"{prefix}abc/runtime").mkdir(parents=True)
    (home / f"{prefix}abc/lock").touch()
    guard = os.open(home, os.O_RDONLY)
    fcntl.flock(guard, fcntl.LOCK_SH)  # as whoever makes one
    assert store.remove_unfinished() == []
    os.close(guard)
    assert store.remove_unfinished() == [f"{prefix}abc"]
    assert names(home) == []


def test_removing_follows_no_link(home: Path, tmp_path: Path) -> None:
    """A link in a directory of ours is removed, and not what it points at."""
    (tmp_path / "precious").mkdir()
    (tmp_path / "precious/file").touch()
    entry = store.create()
    os.symlink(tmp_path / "precious", entry.path("link"))
    entry.remove()
    entry.unlock()
    assert (tmp_path / "precious/file").exists()


def test_a_log_without_its_sandbox_is_a_stray(home: Path) -> None:
    """After a reboot the run directory is empty and the state directory is not."""
    entry = store.create()
    Path(entry.log_path()).touch()
    stray = Path(entry.log_path()).with_name("0123456789ab")
    stray.touch()
    assert store.remove_stray_logs() == ["0123456789ab"]
    assert os.path.exists(entry.log_path())
    entry.unlock()


def test_a_disk_that_does_not_take_it_leaves_nothing(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The line says where there is no room, and the half-made directory is gone."""
    store.sandboxes_dir()

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(store.os, "rename", full)
    with pytest.raises(SandboxError, match="No space left on device") as caught:
        store.create()
    assert "RINGFENCE_RUN_DIR" in caught.value.hint
    assert names(home) == []


CHURN = """
import os
from ringfence.linux import paths
from ringfence.runtime.base import Instance
from ringfence.sandbox import launch, reap, store
paths.ROOT_RUN = os.environ["RINGFENCE_RUN_DIR"]
for turn in range(40):
    entry = store.create()
    entry.write_record({"name": "", "detached": False})
    if turn % 2:
        entry.remove()  # an ordinary end
    entry.unlock()  # or a crash
    swept = reap.sweep()
    assert not swept.problems, swept.problems
    store.remove_unfinished()
"""


def test_sweeping_at_the_same_time_as_others(home: Path) -> None:
    """Many that make, remove, crash and sweep: none sees an error, and nothing is left in the end."""
    workers = [subprocess.Popen([sys.executable, "-c", CHURN], stderr=subprocess.PIPE) for _ in range(6)]
    said = [worker.communicate(timeout=60)[1] for worker in workers]
    assert [worker.returncode for worker in workers] == [0] * 6, b"".join(said).decode()
    reap.sweep()
    assert names(home) == []


def test_what_cannot_be_removed_is_not_held_either(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A process that goes on after a failure leaves the lock to `gc`, which may have more luck."""

    def stuck(_: store.Entry) -> None:
        raise HostError("processes do not die")

    entry = store.create()
    plan = {"cgroup": {}, "cgroup_limits": False}
    instance = Instance(id=entry.id, directory=entry.directory, staging="", base=0, cgroup_path="")
    running = launch.Running(plan, entry, instance, "")  # type: ignore[arg-type]
    with monkeypatch.context() as patch:
        patch.setattr(reap, "discard", stuck)
        with pytest.raises(HostError, match="do not die"):
            running.close()
    assert not entry.alive()
    assert reap.sweep().ids == [entry.id]
