"""`ringfence doctor` on this machine, as root and as an ordinary user."""

import itertools
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import msgspec
import pytest

import ringfence
from ringfence.host import gvisor, places
from ringfence.host.detect import detect
from ringfence.host.enforce import FIELDS
from ringfence.host.facts import SLOW_TRIAL_S, TRIAL_S, Host, Runtime, host_digest
from ringfence.host.gvisor import gvisor_facts
from ringfence.host.machine import QEMU, lack
from ringfence.host.vmm import vmm_facts
from ringfence.linux.kvm import probe_kvm

SOURCE = str(Path(ringfence.__file__).parents[1])
DOCS = Path(__file__).parents[2] / "docs/doctor.md"
NOBODY = 65534


def doctor(
    *arguments: str, user: int | None = None, **environment: str
) -> "subprocess.CompletedProcess[str]":
    """Run the command, optionally as another user, without a terminal."""
    return subprocess.run(
        [sys.executable, "-m", "ringfence", "doctor", *arguments],
        capture_output=True,
        text=True,
        user=user,
        group=user,
        extra_groups=[] if user else None,
        cwd="/",
        timeout=60,
        env={"PATH": os.environ["PATH"], "PYTHONPATH": SOURCE, "PYTHONDONTWRITEBYTECODE": "1", **environment},
    )


def test_detection_is_deterministic() -> None:
    """Two detections in a row give one digest."""
    assert host_digest(detect()) == host_digest(detect())


def test_facts_agree_with_the_kernel() -> None:
    """What the facts say is what other programs say of the same machine."""
    host = detect()
    release = subprocess.run(["uname", "-r"], capture_output=True, text=True, check=True).stdout.strip()
    assert host.kernel_release == release
    assert host.cpu_count == int(subprocess.run(["nproc", "--all"], capture_output=True, check=True).stdout)
    limit = subprocess.run(["sh", "-c", "ulimit -Hn"], capture_output=True, text=True, check=True).stdout
    known = host.hard_limits["nofile"]
    assert limit.strip() == ("unlimited" if known is None else str(known))
    for runtime in host.runtimes.values():
        said = subprocess.run([runtime.path, "--version"], capture_output=True, text=True, check=True).stdout
        assert said.startswith(runtime.version_text)
        assert runtime.version != (0, 0, 0)
    assert all(os.path.isdir(mount) for mount in host.cgroup.mounts.values())
    if host.block is not None:
        assert Path(f"/sys/dev/block/{host.block.number}/dev").read_text().strip() == host.block.number


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root: what root can do here")
def test_root_gets_a_report() -> None:
    """The report is aligned, has no escape sequences in a pipe, and its last line and status agree."""
    answer = doctor()
    lines = answer.stdout.splitlines()
    assert answer.stderr == ""
    assert "\033" not in answer.stdout
    assert lines[-1] == f"The linux tier can{'' if answer.returncode == 0 else 'not'} run here."
    missing = [line for line in lines if line.startswith("missing")]
    assert answer.returncode == (1 if missing else 0), missing
    for line, following in itertools.pairwise(lines):
        if line.startswith(("warn", "missing")):
            assert following.lstrip().startswith("-> ")
    starts = {line.index(line.split(None, 2)[1]) for line in lines if line.startswith(("ok", "warn"))}
    assert starts == {8}


def test_json_holds_checks_and_facts() -> None:
    """--json is one object with the verdict, every check and the facts behind them."""
    answer = doctor("--json")
    report = json.loads(answer.stdout)
    assert report["ready"] == (answer.returncode == 0)
    assert {check["level"] for check in report["checks"]} <= {"ok", "warn", "missing"}
    assert report["host"]["kernel_release"] == os.uname().release


def with_facts() -> Host:
    host = detect()
    return msgspec.structs.replace(host, vmm=vmm_facts(host) if QEMU in host.runtimes else None)


def test_the_matrix_has_every_field() -> None:
    """--matrix says for every policy field how it is enforced or why it is not, and what to do."""
    text = doctor("--matrix").stdout
    assert all(f" {field} " in text for field in FIELDS)
    lacking = lack(with_facts())
    assert ("microvm: " in text) == (lacking is not None)
    assert ("gvisor: runsc is not installed" in text) == (not places.find("runsc"))
    cells = json.loads(doctor("--matrix", "--json").stdout)["matrix"]
    assert len(cells) == 3 * len(FIELDS)
    assert all(cell["mechanism"] if cell["enforced"] else cell["reason"] and cell["hint"] for cell in cells)
    one = json.loads(doctor("--matrix", "--json", "-i", "linux").stdout)["matrix"]
    assert {cell["tier"] for cell in one} == {"linux"}


def test_a_tier_that_is_not_there_fails() -> None:
    """-i with a tier that cannot run here exits 1 and says why; an unknown one is a usage error."""
    answer = doctor("-i", "microvm")
    assert (answer.returncode == 1) == ("The microvm tier cannot run here." in answer.stdout)
    works = detect().kvm == "works"
    assert works or "missing KVM " in " ".join(answer.stdout.split())
    assert works or "--allow-emulation goes without a hardware boundary" in answer.stdout
    assert doctor("-i", "nosuch").returncode == 2
    assert doctor("surplus").returncode == 2


def processes_with(word: str) -> list[str]:
    """Return the command lines of this machine's processes that hold `word`, those of others as well."""
    found = []
    for directory in Path("/proc").glob("[0-9]*"):
        try:
            line = (directory / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
        except OSError:
            continue
        if word in line:
            found.append(line)
    return found


def gone(word: str, patience_s: float = 2.0) -> bool:
    """Whether soon no process has `word` on its command line: the kernel ends a pid namespace in its own time."""
    deadline = time.monotonic() + patience_s
    while processes_with(word):
        if time.monotonic() > deadline:
            return False
        time.sleep(0.02)
    return True


def mounts() -> set[str]:
    """Return the mount points of this process."""
    return {line.split()[4] for line in Path("/proc/self/mountinfo").read_text().splitlines()}


def test_kvm_is_judged_by_running_a_guest() -> None:
    """The trial ends in time, leaves no process, and its reason and the facts agree."""
    before = time.monotonic()
    reason = probe_kvm(1.0)
    assert time.monotonic() - before < 1.5
    assert gone("linux/kvm.py")
    host = detect()
    assert host.kvm_reason == reason
    assert (host.kvm == "works") == (reason == "")
    assert "\n" not in reason
    if not os.path.exists("/dev/kvm"):
        assert host.kvm == "absent"


@pytest.mark.skipif(not os.access("/dev/kvm", os.R_OK | os.W_OK), reason="needs /dev/kvm to open")
def test_a_guest_that_takes_too_long_is_killed() -> None:
    """A trial that is not over in time is killed and is no success."""
    assert probe_kvm(0.001) == "the guest did not finish within 0.001 s"
    assert gone("linux/kvm.py")


@pytest.mark.requires("userns")
@pytest.mark.parametrize("then", ["sleep 60.25", "setsid sleep 60.25 & exec sleep 60.25"])
def test_a_runsc_that_hangs_is_killed(then: str, tmp_path: Path) -> None:
    """Each platform gets its time, and then nothing of the trial is left: no process, no mount, no file."""
    program = tmp_path / "runsc"
    flags = (*gvisor._RUN_FLAGS, *gvisor._GLOBAL_FLAGS)
    listed = "".join(f"printf '  -{flag} value\\n'\n" for flag in flags)
    program.write_text(f"#!/bin/sh\ncase $1 in help|flags)\n{listed} exit;; esac\ntouch $2/state\n{then}\n")
    program.chmod(0o755)
    home = tmp_path / "run"
    home.mkdir()
    host = msgspec.structs.replace(
        detect(), runtimes={"runsc": Runtime(path=str(program))}, run_dir=str(home)
    )
    before, mounted = time.monotonic(), mounts()
    facts = gvisor_facts(host)
    took_s = time.monotonic() - before
    assert facts is not None
    assert (facts.missing, facts.platforms) == ((), ())
    reason = f"did not run a program within {SLOW_TRIAL_S:g} s"
    assert (facts.reasons["systrap"], facts.reasons["ptrace"]) == (reason, reason)
    expected_s = 2 * SLOW_TRIAL_S + (TRIAL_S if host.kvm == "works" else 0)
    assert expected_s <= took_s < expected_s + 2.5
    assert gone("sleep 60.25")
    assert mounts() == mounted
    assert os.listdir(home) == []


@pytest.mark.skipif(not places.find("runsc"), reason="runsc is not installed")
def test_runsc_is_judged_by_running_a_program() -> None:
    """Each platform either ran a program or has a reason, and of the trials nothing is left."""
    host: Host = detect()
    mounted, states = mounts(), Path("/var/run/runsc").exists()
    facts = gvisor_facts(host)
    assert facts is not None
    if not facts.missing:
        assert set(facts.platforms) | set(facts.reasons) == {"kvm", "systrap", "ptrace"}
    assert not set(facts.platforms) & set(facts.reasons)
    assert gone(f"--root {host.run_dir} --platform=")
    assert mounts() == mounted
    assert Path("/var/run/runsc").exists() == states
    answer = doctor("-i", "gvisor")
    assert answer.returncode == (0 if "missing" not in answer.stdout else 1)
    assert ("gVisor platform" in answer.stdout) == bool(facts.platforms)


def other_user_can_import() -> bool:
    """Whether user nobody can read this source tree: not so below a closed home directory."""
    if os.geteuid() != 0:
        return False
    command = [sys.executable, "-c", "import msgspec, ringfence"]
    environment = {"PYTHONPATH": SOURCE, "PYTHONDONTWRITEBYTECODE": "1"}
    try:
        done = subprocess.run(
            command, user=NOBODY, group=NOBODY, extra_groups=[], cwd="/", env=environment, capture_output=True
        )
    except PermissionError:
        return False
    return done.returncode == 0


needs_other_user = pytest.mark.skipif(
    not other_user_can_import(), reason="needs root, and a source tree that other users can read"
)


@needs_other_user
def test_an_ordinary_user_learns_what_is_missing(tmp_path: Path) -> None:
    """Rootless, the same questions get that user's answers, each with what to do; nothing crashes."""
    home = Path(f"/tmp/ringfence-doctor-{os.getpid()}")
    try:
        for place in (home, home / "state", home / "run"):
            place.mkdir(mode=0o700)
            os.chown(place, NOBODY, NOBODY)
        answer = doctor(
            "--json",
            user=NOBODY,
            HOME=str(home),
            RINGFENCE_STATE_DIR=str(home / "state"),
            RINGFENCE_RUN_DIR=str(home / "run"),
        )
        report = json.loads(answer.stdout)
        levels = {check["name"]: check for check in report["checks"]}
        assert report["host"]["euid"] == NOBODY
        assert report["host"]["capabilities"] == []
        if not report["host"]["cgroup"]["writable"]:
            assert levels["cgroup"]["level"] == "missing"
            assert levels["cgroup"]["advice"]
            assert answer.returncode == 1
        assert levels["user namespaces"]["level"] == "missing"  # nobody has no range in /etc/subuid
        assert levels["kernel"]["level"] == "ok"
    finally:
        for place in (home / "run", home / "state", home):
            place.rmdir()


@needs_other_user
@pytest.mark.parametrize("delegated", [True, False])
def test_a_delegated_v2_scope_is_recognised(delegated: bool) -> None:
    """A user who owns a v2 group may use it with its controllers; one who does not own it may not."""
    root = Path(f"/tmp/ringfence-scope-{os.getpid()}")
    scope = root / "user.slice/run-1.scope"
    program = (
        "import sys, json, msgspec\n"
        "from ringfence.host.cgroups import facts_from\n"
        f"mount = '41 31 0:38 / {root} rw - cgroup2 cgroup2 rw'\n"
        "facts = facts_from(mount, '0::/user.slice/run-1.scope/ringfence-caller', '')\n"
        "print(msgspec.json.encode(facts).decode())"
    )
    try:
        scope.mkdir(parents=True)
        for place, controllers in ((root, "cpu cpuset io memory pids"), (scope, "memory pids")):
            for name in ("cgroup.controllers", "cgroup.procs", "cgroup.subtree_control"):
                (place / name).write_text(controllers)
        given = (scope, scope / "cgroup.procs", scope / "cgroup.subtree_control")
        for place in given if delegated else ():
            os.chown(place, NOBODY, NOBODY)
        said = subprocess.run(
            [sys.executable, "-c", program],
            user=NOBODY,
            group=NOBODY,
            extra_groups=[],
            capture_output=True,
            check=True,
            cwd="/",
            env={"PYTHONPATH": SOURCE, "PYTHONDONTWRITEBYTECODE": "1"},
        )
        facts = json.loads(said.stdout)
    finally:
        import shutil

        shutil.rmtree(root)
    assert (facts["version"], facts["delegated"], facts["writable"]) == ("v2", delegated, delegated)
    assert facts["controllers"] == (["memory", "pids"] if delegated else [])
    assert facts["base"] == ("/user.slice/run-1.scope/ringfence" if delegated else "/ringfence")


def test_the_page_shows_real_output() -> None:
    """docs/doctor.md names every policy field and every check that the command prints."""
    page = DOCS.read_text()
    assert all(f" {field} " in page for field in FIELDS)
    checks = json.loads(doctor("--json").stdout)["checks"]
    assert [check["name"] for check in checks if check["name"] not in page] == []
