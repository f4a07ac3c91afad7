"""The cache of plans is a shortcut: whatever a plan was made from, a kept one never says anything else."""

import json
import os
import threading
from pathlib import Path

import pytest

from boxes import bind
from commands import ringfence
from ringfence.errors import MountError, PolicyError
from ringfence.policy.model import Policy
from ringfence.sandbox import prepare
from ringfence.sandbox.prepare import Request, plan_for

pytestmark = pytest.mark.requires("root", "crun", "image:base", "userns")


@pytest.fixture(autouse=True)
def _place(home: Path) -> None:
    """Everything here happens in the run directory of the session."""


def policy_in(directory: Path, pids: int) -> Path:
    path = directory / "policy.yaml"
    path.write_text(f"extends: untrusted\nlimits: {{pids: {pids}, threads: {pids}}}\n")
    return path


def pids_of(path: Path) -> int:
    return plan_for(Request(policy=str(path)))["oci"]["linux"]["resources"]["pids"]["limit"] - 1


def test_a_relative_path_starts_at_the_directory_of_each_run(shared: Path) -> None:
    """The same words in another directory are another plan."""
    mounts = json.dumps([{"source": "./data", "target": "/data"}])
    for name in ("one", "two", "one"):
        (shared / name / "data").mkdir(parents=True, exist_ok=True)
        words = ("plan", "--json", "--set", f"filesystem.mounts={mounts}", "true")
        stage = json.loads(ringfence(*words, cwd=shared / name).stdout)["stage"]
        assert [op["source"] for op in stage if op.get("at") == "/data"] == [str(shared / name / "data")]


def test_a_policy_that_changes_while_a_plan_is_made_of_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is kept is never found under the newer text."""
    path, load = policy_in(tmp_path, 60), prepare.policy_for

    def slow(request: Request) -> Policy:
        found = load(request)
        policy_in(tmp_path, 50)
        return found

    with monkeypatch.context() as patch:
        patch.setattr(prepare, "policy_for", slow)
        assert pids_of(path) == 60
    assert pids_of(path) == 50


def test_a_policy_of_the_same_size_and_time_is_another_one(tmp_path: Path) -> None:
    """A modification time can be set by whoever writes the file; that of the change of its inode cannot."""
    path = policy_in(tmp_path, 60)
    assert pids_of(path) == 60
    before = path.stat()
    policy_in(tmp_path, 50)
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert pids_of(path) == 50


def test_a_runtime_socket_that_turns_up_in_a_source(shared: Path) -> None:
    """A directory that may no longer be shown is not shown because of a kept plan."""
    request = Request(overrides={"filesystem.mounts": [bind(shared, "/data")]})
    plan_for(request)
    (shared / "docker.sock").touch()
    with pytest.raises(MountError, match=r"the runtime socket docker\.sock"):
        plan_for(request)


def test_a_policy_that_became_wrong_is_refused(tmp_path: Path) -> None:
    """Also after a plan of it was kept."""
    path = policy_in(tmp_path, 60)
    assert pids_of(path) == 60
    path.write_text("limits: {pids: many}\n")
    with pytest.raises(PolicyError, match="many"):
        pids_of(path)


def test_threads_of_one_process_may_keep_the_same_plan_at_once(shared: Path) -> None:
    """A cold cache and many callers: none of them removes or misses another one's half-written file."""
    plan = plan_for(Request(policy=str(policy_in(shared, 23))))
    path = str(shared / "kept")
    barrier, failed = threading.Barrier(8), []

    def caller() -> None:
        barrier.wait()
        try:
            for _ in range(100):
                prepare._keep(path, plan, {})
                assert prepare._cached(path) == plan
        except BaseException as error:  # noqa: BLE001 - told to the main thread
            failed.append(error)

    threads = [threading.Thread(target=caller) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failed == []
    assert os.listdir(shared).count("kept") == 1
    assert not [name for name in os.listdir(shared) if name.startswith("kept.")]
