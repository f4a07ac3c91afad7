"""The linux tier on a kernel with cgroup v2 alone: a small set of its tests, run in one virtual machine.

`make test-cgroup2` runs all of them there. The first time the machine's packages are fetched, which takes minutes.
"""

import os
import re

import pytest

import cgroup2machine

# What differs between the versions: limits and their readings, both runtimes, root and a user with a delegated group.
CHOSEN = (
    "test_cgroup.py::test_kill_stops_a_fork_bomb",
    "test_cgroup.py::test_usage_and_oom_kills_are_counted",
    "test_cgroup.py::test_limits_of_a_real_container_are_read_back[crun-group made by the runtime]",
    "test_cgroup.py::test_limits_of_a_real_container_are_read_back[runc-group made before]",
    "test_limits.py::test_memory[crun]",
    "test_limits.py::test_memory[runc]",
    "test_limits.py::test_cpu_quota[crun]",
    "test_limits.py::test_fork_bomb[runc]",
    "test_limits.py::test_disk_writes_are_throttled[crun]",
    "test_proof.py::test_unchanged_plan_holds_and_its_job_runs[crun]",
    "test_proof.py::test_unchanged_plan_holds_and_its_job_runs[runc]",
    "test_proof.py::test_weakened_control_is_seen[crun-cgroup.membership]",
    "test_proof.py::test_weakened_control_is_seen[crun-cgroup.io.wbps]",
    "test_delegated.py::test_nothing_has_to_be_accepted_and_the_proof_holds[crun]",
    "test_delegated.py::test_nothing_has_to_be_accepted_and_the_proof_holds[runc]",
    "test_delegated.py::test_memory[crun]",
    "test_rootless.py::test_a_writable_root_is_thrown_away",
)


@pytest.mark.timeout(1200)
def test_the_linux_tier_on_cgroup_v2() -> None:
    """Each chosen test passes in the machine; one that is skipped there would show nothing, and fails this."""
    reason = cgroup2machine.lack()
    if reason and os.environ.get("RINGFENCE_STRICT"):
        pytest.fail(reason, pytrace=False)
    if reason:
        pytest.skip(f"needs a virtual machine: {reason}")
    said = bytearray()
    words = cgroup2machine.pytest_words(
        ["-rA", "-q", "--tb=short", *(f"tests/integration/{one}" for one in CHOSEN)]
    )
    status = cgroup2machine.run(words, timeout_s=600, say=print, out=said.extend)
    text = said.decode(errors="replace").replace("\r\n", "\n")
    passed = set(re.findall(r"^PASSED tests/integration/(.+)$", text, re.M))
    assert (status, sorted(set(CHOSEN) - passed)) == (0, []), text[-20_000:]
