"""The gVisor tier without root: the same parts, of a user's own ids, and a clear word where there are none."""

import json
import os
from collections.abc import Iterator

import pytest

from commands import refused
from users import ACCEPTED, GID, NO_CGROUP, OWN_ID, UID, User, make_user, processes_of_ids

pytestmark = pytest.mark.requires("root", "runc", "runsc", "image:base", "userns")
GVISOR = ("-i", "gvisor")


@pytest.fixture
def user() -> Iterator[User]:
    """A user with 65,536 subordinate ids."""
    yield from make_user(ids=True)


@pytest.fixture
def bare_user() -> Iterator[User]:
    """A user with no id but his own."""
    yield from make_user(ids=False)


def test_what_nothing_here_enforces_is_refused(user: User) -> None:
    """A kernel of its own makes no cgroup: the same fields as at the linux tier, in one line."""
    refused(
        user.run(*GVISOR, "true"), 125, "limits.memory cannot be enforced", f"--allow-unenforced {NO_CGROUP}"
    )


def test_the_proof_holds_and_nobody_is_the_caller(user: User) -> None:
    """All of it was observed or reported; what is the caller's own is only what is root inside, without rights."""
    file = user.place / "home/proof.json"
    done = user.run(*GVISOR, *ACCEPTED, "--proof", file, "--", "sh", "-c", "id -u; id -G; cat /proc/version")
    assert (done.returncode, done.stderr) == (0, b"")
    assert done.stdout.startswith(b"1000\n1000\nLinux version 4.4.0")
    proof = json.loads(file.read_text())
    assert proof["holds"] is True
    assert proof["unenforced"] == NO_CGROUP.split(",")
    lines = {line["control"]: line for line in proof["lines"]}
    wrong = [name for name, line in lines.items() if line["ok"] is False]
    assert wrong == []
    for part, number in (("sentry", 4095), ("gofer", 0), ("door", 0)):
        for kind in ("uid", "gid"):
            line = lines[f"{part}.credentials.{kind}"]
            assert (line["observed"], line["vantage"], line["ok"]) == (number, "observed", True)
    for name in ("kernel", "credentials.uid", "network.interfaces"):
        assert (lines[name]["vantage"], lines[name]["ok"]) == ("reported", True)
    for name in ("sentry.program", "sentry.seccomp.mode", "door.capabilities.bounding", "mount:/"):
        assert (lines[name]["vantage"], lines[name]["ok"]) == ("observed", True)


def test_a_detached_sandbox_lives_and_ends(user: User) -> None:
    """exec, logs, ps, stop: through the door, to an agent behind another kernel, as root does it."""
    started = user.run(*GVISOR, *ACCEPTED, "-d", "--name", "box", "--", "sh", "-c", "echo out; sleep 60")
    assert (started.returncode, started.stderr) == (0, b"")
    try:
        done = user("exec", "box", "sh", "-c", "id -u; cat; exit 3")
        assert (done.returncode, done.stdout, done.stderr) == (3, b"1000\n", b"")
        assert user("logs", "box").stdout == b"out\n"
        (row,) = json.loads(user("ps", "--json").stdout)
        assert (row["isolation"], row["name"]) == ("gvisor", "box")
        # The sentry: a subordinate id to the host. The control of what is asked again below.
        assert processes_of_ids() != []
        assert user("stop", "--time", "0", "box").returncode == 0
    finally:
        user("rm", "--force", "box")
    assert user.remains() == []
    assert processes_of_ids() == []


def test_files_are_the_jobs(user: User) -> None:
    """A writable root and the work directory take files of the job's ids, and are thrown away."""
    code = "test ! -e /work/kept && echo x > /work/kept && stat -c '%u %g' /work/kept && id -u"
    for _ in range(2):
        done = user.run(*GVISOR, *ACCEPTED, "--read-only=false", "--", "sh", "-c", code)
        assert (done.returncode, done.stdout, done.stderr) == (0, b"1000 1000\n1000\n", b"")


def test_mounts_show_what_others_may_see(user: User) -> None:
    """The gofer is the caller, who may read his own files; the job is another user, whom the sentry tells no."""
    data = user.place / "home/data"
    data.mkdir()
    for name, mode in (("public", 0o644), ("private", 0o600)):
        (data / name).write_text(name)
        (data / name).chmod(mode)
    data.chmod(0o755)
    for path in (data, *data.iterdir()):
        os.chown(path, UID, GID)
    done = user.run(
        *GVISOR, *ACCEPTED, "-v", f"{data}:/data", "--", "sh", "-c", "cat /data/public /data/private"
    )
    assert done.stdout == b"public", done.stderr
    assert b"private: Permission denied" in done.stderr


def test_without_subordinate_ids_it_is_refused(bare_user: User) -> None:
    """The sentry must not be the caller: one id is not enough, also for who accepts that the job has it."""
    refused(
        bare_user.run(*GVISOR, *ACCEPTED, "true"), 125, "no range in /etc/subuid", "usermod --add-subuids"
    )
    done = bare_user.run(*GVISOR, *ACCEPTED, *OWN_ID, "true")
    refused(done, 125, "ids of its own", "--add-subuids")
