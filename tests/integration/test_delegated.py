"""A user who is not root, in a delegated subtree of cgroup v2: every limit holds, and nothing has to be accepted."""

import json
import os
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from commands import RINGFENCE, Done, refused
from ringfence.host.cgroups import cgroup_facts
from users import GID, NO_CGROUP, UID, User, make_user

pytestmark = pytest.mark.requires("cgroup2", "root", "image:base", "userns")

MIB = 1 << 20
CONTROLLERS = ("cpu", "cpuset", "io", "memory", "pids")
# As `systemd-run --user --scope -p Delegate=yes` does it: cgroup-v2.html, "Delegation".
DELEGATED = ("cgroup.procs", "cgroup.threads", "cgroup.subtree_control")
_JOIN = 'echo 0 > "$GROUP/cgroup.procs" && exec "$@"'


class Scope:
    """A user in a group of his own, into which each of his commands comes before it is his."""

    def __init__(self, user: User, runtime: str) -> None:
        self.user = user
        self.runtime = runtime
        above = Path(cgroup_facts().unified)
        self.group = above / "rftest.slice"
        self._made: list[Path] = []
        for place in (above, above / "rftest.slice"):
            place.mkdir(exist_ok=True)
            text = " ".join(f"+{name}" for name in CONTROLLERS)
            (place / "cgroup.subtree_control").write_text(text)
        self.scope = self.group / "run.scope"
        self.scope.mkdir()
        for path in (self.scope, *(self.scope / name for name in DELEGATED)):
            os.chown(path, UID, GID)

    def command(self, *words: str | Path) -> list[str | Path]:
        return ["sh", "-c", _JOIN, "sh", *self.user.command(*words)]

    def environment(self) -> dict[str, str]:
        return {**self.user.environment(), "GROUP": str(self.scope)}

    def run(self, *words: str | Path) -> Done:
        """Run ``ringfence run WORDS`` as this user in his scope."""
        return subprocess.run(
            self.command(RINGFENCE, "run", "--runtime", self.runtime, *words),
            env=self.environment(),
            stdin=subprocess.DEVNULL,
            capture_output=True,
            timeout=120,
        )

    def groups(self) -> list[str]:
        """Return the groups below the scope in which sandboxes would be."""
        return [str(path) for path in self.scope.glob("ringfence/*") if path.is_dir()]

    def remove(self) -> None:
        for path in sorted(self.scope.rglob("*"), reverse=True):
            if path.is_dir():
                path.rmdir()
        self.scope.rmdir()
        self.group.rmdir()


@pytest.fixture(params=["crun", "runc"])
def scope(request: pytest.FixtureRequest) -> Iterator[Scope]:
    """A user with subordinate ids in a delegated scope, with each runtime; no group is left of his sandboxes."""
    for user in make_user(ids=True):
        made = Scope(user, request.param)
        yield made
        deadline = time.monotonic() + 10
        while (found := made.groups()) and time.monotonic() < deadline:
            time.sleep(0.05)
        assert found == []
        made.remove()


def test_nothing_has_to_be_accepted_and_the_proof_holds(scope: Scope) -> None:
    """The untrusted policy as it is: each limit of the cgroup is observed in files of the user's own subtree."""
    proof_file = scope.user.place / "home/proof.json"
    done = scope.run("--proof", proof_file, "--", "true")
    assert done.returncode == 0, done.stderr
    proof = json.loads(proof_file.read_text())
    # Where AppArmor is on, a policy that leaves the label open goes without one, for want of a profile of ours.
    assert (proof["holds"], {*proof["unenforced"]} <= {"lsm"}) == (True, True)
    lines = {line["control"]: line for line in proof["lines"]}
    names = (
        "membership",
        "memory_bytes",
        "swap_bytes",
        "cpu_quota_us",
        "cpu_period_us",
        "cpu_weight",
        "pids",
    )
    for name in names:
        line = lines[f"cgroup.{name}"]
        assert (line["vantage"], line["ok"]) == ("observed", True)
    assert lines["cgroup.memory_bytes"]["source"].startswith(f"{scope.scope}/ringfence/")


def test_memory(scope: Scope) -> None:
    """A job that takes more than its memory is killed, and it is said to be memory."""
    hog = "data = []\nwhile True: data.append(bytearray(1 << 20))"
    done = scope.run("--memory", "48m", "--", "python3", "-c", hog)
    assert done.returncode == 137
    assert b"memory" in done.stderr


def test_processes(scope: Scope) -> None:
    """As many processes as the limit says, and no more."""
    code = (
        "import os, time\nmade = 1\ntry:\n  for _ in range(60):\n    if os.fork() == 0: time.sleep(30); os._exit(0)\n"
        "    made += 1\nexcept BlockingIOError: print(made)"
    )
    done = scope.run("--pids-limit", "12", "--", "python3", "-c", code)
    assert done.stdout == b"12\n", done.stderr


def test_cpu(scope: Scope) -> None:
    """Half a CPU is half a CPU, in the kernel's own count."""
    code = (
        "import os, time\nstart = os.times()\nend = time.monotonic() + 2\nwhile time.monotonic() < end: pass\n"
        "now = os.times()\nprint((now.user + now.system - start.user - start.system) / (now.elapsed - start.elapsed))"
    )
    done = scope.run("--cpus", "0.5", "--", "python3", "-c", code)
    assert done.returncode == 0, done.stderr
    assert 0.15 < float(done.stdout) < 0.65


def test_two_at_the_same_time(scope: Scope) -> None:
    """The launcher that moved itself aside in the scope does not stand in the way of the next one."""
    words = scope.command(RINGFENCE, "run", "--runtime", scope.runtime, "--", "sh", "-c", "echo in; sleep 20")
    first = subprocess.Popen(words, env=scope.environment(), stdin=subprocess.DEVNULL, stdout=subprocess.PIPE)
    try:
        assert first.stdout is not None
        assert first.stdout.read(3) == b"in\n"
        # Controllers are handed on now, so the kernel admits no process to the scope itself.
        join = _JOIN.replace("$GROUP", "$GROUP/ringfence-caller")
        command = ["sh", "-c", join, "sh", *scope.user.command(RINGFENCE, "run", "--runtime", scope.runtime)]
        second = subprocess.run(
            [*command, "--", "echo", "second"],
            env=scope.environment(),
            stdin=subprocess.DEVNULL,
            capture_output=True,
            timeout=120,
        )
        assert second.stdout == b"second\n", second.stderr
    finally:
        first.terminate()
        first.communicate(timeout=60)


def test_without_delegation_the_fields_are_named(scope: Scope) -> None:
    """The same user outside of his scope may make no group: refused as on v1, with the way to get one."""
    done = scope.user.run("--runtime", scope.runtime, "true")
    refused(done, 125, "limits.memory cannot be enforced", f"--allow-unenforced {NO_CGROUP}")
