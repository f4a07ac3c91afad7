"""Without root: the same sandbox from a user's own ids, and a clear word on what a user cannot have."""

import json
import os
import re
import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from commands import RINGFENCE, refused
from ringfence.host.cgroups import cgroup_facts
from users import ACCEPTED, BEYOND, FIRST, GID, NO_CGROUP, OWN_ID, UID, User, make_user, processes_of_ids

pytestmark = pytest.mark.requires("root", "runc", "image:base", "userns")


@pytest.fixture
def user() -> Iterator[User]:
    """A user with 65,536 subordinate ids."""
    yield from make_user(ids=True)


@pytest.fixture
def bare_user() -> Iterator[User]:
    """A user with no id but his own."""
    yield from make_user(ids=False)


def test_the_refusal_names_every_field_that_needs_a_cgroup(user: User) -> None:
    """One line with all of them and the words that accept them."""
    refused(user.run("true"), 125, "limits.memory cannot be enforced", f"--allow-unenforced {NO_CGROUP}")


def test_a_job_is_nobody_of_the_hosts(user: User) -> None:
    """A user and group inside, subordinate ids outside, no groups, the caller's own id only as root inside.

    The job itself sees its ids alone: its user namespace lies in another one, which has the map to the host's.
    """
    code = "import json, os; print(json.dumps([os.getresuid(), os.getresgid(), os.getgroups(), "
    code += "open('/proc/self/uid_map').read().split(), open('/proc/self/gid_map').read().split()]))"
    proof_file = user.place / "home/proof.json"
    done = user.run(*ACCEPTED, "--proof", proof_file, "--", "python3", "-c", code)
    assert done.returncode == 0, done.stderr
    inside = ["0", "0", "1", "1", "1", "4095"]
    assert json.loads(done.stdout) == [[1000] * 3, [1000] * 3, [], inside, inside]
    lines = {line["control"]: line for line in json.loads(proof_file.read_text())["lines"]}
    line = lines["credentials.range"]
    found = re.fullmatch(rf"0 {UID} 1; 1 (\d+) 4095 \(groups: 0 {GID} 1; 1 (\d+) 4095\)", line["observed"])
    assert (line["vantage"], line["ok"], found is not None) == ("observed", True, True), line
    assert found is not None
    assert found[1] == found[2]
    assert FIRST <= int(found[1]) < int(found[1]) + 4095 <= BEYOND


def test_the_proof_holds_and_says_what_is_not_enforced(user: User, tmp_path: Path) -> None:
    """Every asked control is observed, and each accepted field stands there as not enforced, with the reason."""
    proof_file = user.place / "home/proof.json"
    assert user.run(*ACCEPTED, "--proof", proof_file, "--", "true").returncode == 0
    proof = json.loads(proof_file.read_text())
    assert proof["holds"] is True
    # Where AppArmor is on, a policy that leaves the label open goes without one, for want of a profile of ours.
    assert [field for field in proof["unenforced"] if field != "lsm"] == NO_CGROUP.split(",")
    lines = {line["control"]: line for line in proof["lines"]}
    why = {"v2": "no cgroup is delegated"}.get(cgroup_facts().version, "this user may not make groups")
    for field in NO_CGROUP.split(","):
        assert lines[field]["observed"].startswith(f"not enforced: {why}")
        assert lines[field]["ok"] is None
    assert lines["credentials.range"]["ok"] is True
    assert lines["descriptors"]["vantage"] in ("observed", "reported")  # whose /proc/PID/fd a user may read
    assert lines["hostname"]["vantage"] == "not observable"
    assert [
        name for name, line in lines.items() if line["ok"] is None and line["vantage"] == "observed"
    ] == []
    for name in ("namespace.user", "seccomp.mode", "capabilities.bounding", "rlimit.nproc", "mount:/"):
        assert (lines[name]["vantage"], lines[name]["ok"]) == ("observed", True)


def test_threads_are_limited_for_the_sandbox_alone(user: User) -> None:
    """The uid is the sandbox's own, so RLIMIT_NPROC counts its processes and no others."""
    code = (
        "import os, time\nmade = 0\ntry:\n  for _ in range(40):\n    if os.fork() == 0: time.sleep(5); os._exit(0)\n"
        "    made += 1\nexcept BlockingIOError: print(made)"
    )
    done = user.run(*ACCEPTED, "--ulimit", "nproc=8", "--", "python3", "-c", code)
    assert done.stdout == b"7\n", done.stderr


def test_a_user_inside_may_be_chosen_within_the_range(user: User) -> None:
    """Any id but 0, which would be the caller, and below the size of the range."""
    assert user.run(*ACCEPTED, "--user", "7:8", "--", "id", "-G").stdout == b"8\n"
    refused(user.run(*ACCEPTED, "--user", "0", "true"), 125, "would be yourself")
    refused(user.run(*ACCEPTED, "--user", "4096", "true"), 125, "beyond the 4096 ids")


def test_mounts_show_what_others_may_see(user: User) -> None:
    """A job is another user to the caller's files: it reads and writes what everybody may, and nothing else."""
    data = user.place / "home/data"
    data.mkdir()
    (data / "public").write_text("public")
    (data / "private").write_text("private")
    for path, mode in ((data, 0o777), (data / "public", 0o644), (data / "private", 0o600)):
        os.chown(path, UID, GID)
        path.chmod(mode)
    code = "cat /data/public; cat /data/private; echo x > /data/new && stat -c ' %u' /data/new"
    done = user.run(*ACCEPTED, "-v", f"{data}:/data", "--", "sh", "-c", code)
    assert done.stdout == b"public"
    assert b"private: Permission denied" in done.stderr
    assert b"Read-only file system" in done.stderr
    writes = ("--allow-unenforced", "limits.io.write,limits.io.write_iops")
    done = user.run(*ACCEPTED, *writes, "-v", f"{data}:/data:rw", "--", "sh", "-c", code)
    assert done.stdout == b"public 1000\n"
    assert FIRST < (data / "new").stat().st_uid < BEYOND


def test_a_writable_root_is_thrown_away(user: User) -> None:
    """The job writes to its own directories of the overlay; the next run has a fresh one."""
    words = (*ACCEPTED, "--read-only=false", "--", "sh", "-c")
    code = "test ! -e /work/kept && echo x > /work/kept && grep ' / ' /proc/self/mountinfo"
    for _ in range(2):
        done = user.run(*words, code)
        assert done.returncode == 0, done.stderr
        assert b" rw,nosuid,nodev" in done.stdout


def test_crun_on_hybrid_cgroups_is_refused(user: User) -> None:
    """A user cannot hide the second hierarchy from it; the other runtime is named."""
    if not Path("/sys/fs/cgroup/unified/cgroup.controllers").exists():
        pytest.skip("needs hybrid cgroups")
    refused(user.run(*ACCEPTED, "--runtime", "crun", "true"), 125, "hybrid cgroups", "--runtime runc")


def test_without_subordinate_ids_the_hint_is_how_to_get_them(bare_user: User) -> None:
    """An identity of its own is part of the policy, and so are threads counted by it."""
    done = bare_user.run(*ACCEPTED, "true")
    refused(
        done,
        125,
        "no range in /etc/subuid",
        "usermod --add-subuids",
        "--allow-unenforced user,limits.threads",
    )


def test_with_the_callers_own_id_alone(bare_user: User) -> None:
    """Accepted in so many words, the job is the caller, as 0 inside, without capabilities; all else holds."""
    proof_file = bare_user.place / "home/proof.json"
    code = "import json, os; s = dict(line.split(':\\t', 1) for line in open('/proc/self/status')); "
    code += "open('/work/x', 'w'); print(json.dumps([os.getuid(), open('/proc/self/uid_map').read().split(), "
    code += "s['CapEff'], s['CapBnd'], s['NoNewPrivs']]))"
    done = bare_user.run(*ACCEPTED, *OWN_ID, "--proof", proof_file, "--", "python3", "-c", code)
    assert done.returncode == 0, done.stderr
    none = "0" * 16 + "\n"
    assert json.loads(done.stdout) == [0, ["0", "0", "1"], none, none, "1\n"]
    proof = json.loads(proof_file.read_text())
    observed = {line["control"]: line["observed"] for line in proof["lines"]}
    assert observed["credentials.range"] == f"0 {UID} 1 (groups: 0 {GID} 1)"
    assert proof["holds"] is True
    assert {"user", "limits.threads"} < set(proof["unenforced"])
    assert not {"rlimit.nproc", "credentials.groups"} & {line["control"] for line in proof["lines"]}
    refused(bare_user.run(*ACCEPTED, *OWN_ID, "--user", "7", "true"), 125, "needs subordinate ids")


@pytest.mark.parametrize("moment_s", [0.06, 0.12, 0.2, 0.5])
def test_a_killed_launcher_leaves_nothing(user: User, moment_s: float) -> None:
    """kill -9: the sandbox dies with it, and the user's next run removes what was recorded."""
    command = user.command(RINGFENCE, "run", *ACCEPTED, "--", "sleep", "60")
    process = subprocess.Popen(command, env=user.environment(), stdin=subprocess.DEVNULL)
    time.sleep(moment_s)
    process.send_signal(signal.SIGKILL)  # every program of the way replaced the one before
    process.wait()
    deadline = time.monotonic() + 10
    while (user.remains() or processes_of_ids()) and time.monotonic() < deadline:
        assert user.run(*ACCEPTED, "true").returncode == 0
    assert user.remains() == []
    assert processes_of_ids() == []
