"""The proof of a microVM is worth something: what is weakened behind the plan's words is seen, and nothing runs.

The same as test_proof.py for this tier. A boot takes seconds where it is emulated, so that what shares a cause, such as
the lines of the setup text, is weakened together, and every one of its controls must be named.
"""

import json
import os
import re
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest
from weakenings import ALLOW_DISK, away, no_uts, operation, resource, throttle, without

import ringfence.runtime.bundle as runtime_bundle
import ringfence.runtime.ring as runtime_ring
from boxes import Sandboxes, bind
from commands import run
from ringfence.cgroup.group import Cgroup
from ringfence.errors import HostError, ProofError
from ringfence.plan.document import Machine, Plan
from ringfence.proof.guest import Guest
from ringfence.proof.observe import Subject
from ringfence.proof.prove import failures, prove
from ringfence.sandbox import launch
from ringfence.sandbox.prepare import Request, plan_for
from ringfence.sandbox.run import Pipes, start_job

pytestmark = pytest.mark.requires(
    "root", "crun", "qemu", "kernel", "mkfs.erofs", "cgroup1:memory", "cgroup1:pids", "cgroup1:blkio"
)

MIB = 1 << 20
PARTS = ("vmm", "bridge")


class Weakening(msgspec.Struct, frozen=True):
    """What is done behind the plan's words, and the controls that must not hold then."""

    seen: tuple[str, ...]
    plan: Callable[[Plan], object] | None = None  # changes the plan
    outer: Callable[[dict[str, Any]], object] | None = None  # changes what the ring's runtime is given
    started: Callable[[launch.Running], object] | None = None  # changes the sandbox before its job is made
    without: tuple[str, ...] = ()  # what of Cgroup is not done
    size: int = 0  # of the id range, in place of the right one


def machine(plan: Plan) -> Machine:
    assert plan["machine"] is not None
    return plan["machine"]


def text(**changes: str) -> Callable[[Plan], object]:
    """Change lines of the setup text, each by its beginning: those of "KEY=NAME", or "KEY=/NAME", for KEY__NAME."""

    def change(plan: Plan) -> None:
        lines = machine(plan)["setup"]
        for key, line in changes.items():
            (place,) = [
                place for place, old in enumerate(lines) if re.match(key.replace("__", "=/?") + r"\b", old)
            ]
            lines[place : place + 1] = [line] if line else []

    return change


def insert(line: str, *, before: str) -> Callable[[Plan], object]:
    """Put another line into the setup text."""

    def change(plan: Plan) -> None:
        lines = machine(plan)["setup"]
        lines.insert(next(place for place, old in enumerate(lines) if old.startswith(before)), line)

    return change


def all_of(*changes: Callable[[Plan], object]) -> Callable[[Plan], object]:
    return lambda plan: [change(plan) for change in changes]


def no_filter_of_its_own(plan: Plan) -> None:
    """Start QEMU without -sandbox."""
    argv = machine(plan)["argv"]
    place = argv.index("-sandbox")
    del argv[place : place + 2]


def ring_capability(plan: Plan) -> None:
    plan["oci"]["process"]["capabilities"]["bounding"].append("CAP_CHOWN")


def as_if_kvm(plan: Plan) -> None:
    """Emulate where a hardware boundary was asked for: here what is asked is changed, for nobody can do the rest."""
    (control,) = [control for control in plan["controls"] if control["name"] == "vmm.accelerator"]
    control["asked"] = "tcg" if machine(plan)["accelerator"] == "kvm" else "kvm"


TABLE: dict[str, Weakening] = {
    "another user": Weakening(("credentials.uid", "credentials.gid"), text(uid="uid=1001", gid="gid=1001")),
    "capabilities": Weakening(
        tuple(
            f"capabilities.{kind}"
            for kind in ("inheritable", "permitted", "effective", "bounding", "ambient")
        ),
        text(caps="caps=1"),
    ),
    "rlimits": Weakening(
        ("rlimit.core", "rlimit.fsize", "rlimit.nofile", "rlimit.nproc", "rlimit.stack"),
        text(
            rlimit__4="rlimit=4:4096:4096",
            rlimit__1="",
            rlimit__7="rlimit=7:1024:1024",
            rlimit__6="",
            rlimit__3=f"rlimit=3:{16 * MIB}:{16 * MIB}",
        ),
    ),
    "a writable root": Weakening(("mount:/",), text(overlay=f"overlay={MIB}:100")),
    "larger tmpfs": Weakening(
        ("mount:/tmp", "mount:/work", "mount:/dev/shm"),
        text(
            tmpfs__tmp=f"tmpfs=/tmp:{1 << 30}:16384:1777:0:0",
            tmpfs__work=f"tmpfs=/work:{1 << 30}:16384:755:1000:1000",
            shm=f"shm={16 * MIB}:1048576",
        ),
    ),
    "more mounts": Weakening(
        ("mounts.others",),
        all_of(text(sysfs="sysfs=1"), insert(f"tmpfs=/mnt:{MIB}:16:755:0:0", before="disk=")),
    ),
    "a mount that can be written to": Weakening(
        ("mount:/data",), text(disk=f"disk=vdb:erofs:/data:rw:{MIB}:100")
    ),
    "a mount that is not there": Weakening(("mount:/data",), text(disk="")),
    "no filter of QEMU's own": Weakening(("vmm.seccomp.filters",), no_filter_of_its_own),
    "no filter of the ring": Weakening(
        ("vmm.seccomp.filters", "bridge.seccomp.mode", "bridge.seccomp.filters"),
        lambda plan: plan["oci"]["linux"].pop("seccomp"),  # type: ignore[misc]
    ),
    "a capability of the ring": Weakening(
        ("vmm.capabilities.bounding", "bridge.capabilities.bounding"), ring_capability
    ),
    "another user of the ring": Weakening(
        tuple(f"{part}.credentials.{kind}" for part in PARTS for kind in ("uid", "gid")),
        lambda plan: plan["oci"]["process"]["user"].update(uid=1001, gid=1001),
    ),
    "a short range": Weakening(tuple(f"{part}.credentials.range" for part in PARTS), size=65535),
    "the host's network": Weakening(
        (*(f"{part}.namespace.network" for part in PARTS), "vmm.network.interfaces"), without("network")
    ),
    "fewer namespaces": Weakening(
        tuple(f"{part}.namespace.{kind}" for part in PARTS for kind in ("ipc", "cgroup", "uts")),
        all_of(without("ipc"), without("cgroup")),
        outer=no_uts,
    ),
    "the ring's limits": Weakening(
        ("cgroup.cpu_weight", "cgroup.pids", "cgroup.io.rbps", "cgroup.io.riops", "cgroup.devices"),
        all_of(
            resource("cpu", shares=4096),
            resource("pids", limit=4096),
            throttle("throttleReadBpsDevice"),
            throttle("throttleReadIOPSDevice"),
            lambda plan: plan["oci"]["linux"]["resources"]["devices"].append(ALLOW_DISK),  # type: ignore[arg-type]
        ),
    ),
    "the ring's memory": Weakening(("cgroup.memory_bytes",), resource("memory", limit=1 << 30, swap=1 << 30)),
    "the ring's quota": Weakening(("cgroup.cpu_quota_us",), without=("limit_cpu",)),
    "another cpuset": Weakening(("cgroup.cpuset",), resource("cpu", cpus="0-1")),
    "the bridge elsewhere": Weakening(("bridge.cgroup.membership",), started=away),
    "no hardware": Weakening(("vmm.accelerator",), as_if_kvm),
}

# What no setup text weakens alone, and where else it is seen to fail; by the beginnings of names.
ELSEWHERE = {
    "credentials.groups": "test_proof_guest.py",  # the guest leaves all groups whatever it is told
    "no_new_privileges": "test_the_guest_refuses_a_text_without",
    "seccomp": "test_the_guest_refuses_a_text_without",
    "hostname": "test_parts_of_another_sandbox_prove_nothing",
    "kernel": "test_proof_guest.py",
    "network.interfaces": "test_proof_guest.py",
    "descriptors": "test_proof_guest.py",
    "mount:/proc": "test_guest_boot.py",  # the guest's own, and the same in every machine
    "mount:/dev": "test_guest_boot.py",
    "cgroup.swap_bytes": "test_proof.py",
    "cgroup.cpu_period_us": "test_proof.py",
    "vmm": "a process of the host has next to none of it",
    "bridge": "the same",
}


@pytest.fixture
def plan(machines: Sandboxes, shared: Path) -> Plan:
    """A plan with every kind of control that this host has."""
    overrides = {
        "isolation": "microvm",
        "filesystem.mounts": [bind(shared, "/data")],
        "limits.cpuset": "0",
    }
    request = Request(runtime=machines.runtime, overrides=overrides, allow_emulation=True)
    plan: Plan = json.loads(json.dumps(plan_for(request)))  # as from the cache: no list is in it twice
    return plan


def started(
    plan: Plan, said: list[bytes], before_job: Callable[[launch.Running], object] | None = None
) -> Iterator[launch.Running]:
    """Start a job that says a word, as far as the proof lets it come; what came out of it is put into `said`."""
    running = launch.prepare(plan, name="", argv=["echo"], detached=False, remove=True)
    pipes = Pipes(running.owner())
    try:
        launch.start(running)
        if before_job is not None:
            before_job(running)
        start_job(running, [b"/bin/echo", b"ran"], [], None, pipes.theirs)
        pipes.close_theirs()
        yield running
        assert running.wait_gone(20)
    finally:
        running.close()
        pipes.close_theirs()
        said.append(os.read(next(iter(pipes._outputs)), 100))
        pipes.close()


def test_unchanged_plan_holds_and_its_job_runs(plan: Plan) -> None:
    """The control: nothing weakened, the proof holds, the word is said."""
    said: list[bytes] = []
    for running in started(plan, said):
        assert running.proof is not None
        assert failures(running.proof) == []
    assert said == [b"ran\n"]


def plain(name: str) -> str:
    """Return the name of a control without the number of the disk that it is about."""
    return re.sub(r":\d+:\d+$", "", name)


def test_every_control_is_seen_to_fail_somewhere(plan: Plan) -> None:
    """No control of a plan is left out of the tables, and none is in them that does not exist."""
    names = {plain(control["name"]) for control in plan["controls"]}
    covered = {control for weakening in TABLE.values() for control in weakening.seen}
    assert covered <= names
    left = {name for name in names - covered if not name.startswith(tuple(ELSEWHERE))}
    assert left == set()


@pytest.mark.parametrize("name", TABLE)
def test_weakened_control_is_seen(name: str, plan: Plan, monkeypatch: pytest.MonkeyPatch) -> None:
    """The proof names exactly what was weakened, the error names the first of it, and the job has not run."""
    weakening = TABLE[name]
    if weakening.plan is not None:
        weakening.plan(plan)
    if weakening.outer is not None:
        change_config(weakening.outer, monkeypatch)
    for method in weakening.without:
        monkeypatch.setattr(Cgroup, method, lambda *_: None)
    if weakening.size:
        real = runtime_ring.make_userns

        def make(agent: str, uids: Any, gids: Any) -> int:
            smaller = [(0, uids[0][1], weakening.size)], [(0, gids[0][1], weakening.size)]
            return real(agent, *smaller)

        monkeypatch.setattr(runtime_ring, "make_userns", make)
    seen: list[launch.Running] = []
    said: list[bytes] = []

    def before_job(running: launch.Running) -> None:
        seen.append(running)
        if weakening.started is not None:
            weakening.started(running)

    with pytest.raises(ProofError):
        for _ in started(plan, said, before_job):
            pass
    proof = seen[0].proof
    assert proof is not None
    assert {plain(line["control"]) for line in proof["lines"] if line["ok"] is False} == set(weakening.seen)
    assert said == [b""]


def change_config(change: Callable[[dict[str, Any]], object], monkeypatch: pytest.MonkeyPatch) -> None:
    """Change a config.json when it is written."""
    real = runtime_bundle._write

    def write(path: str, content: bytes, mode: int) -> None:
        if path.endswith("/config.json"):
            oci = json.loads(content)
            change(oci)
            content = json.dumps(oci).encode()
        real(path, content, mode)

    monkeypatch.setattr(runtime_bundle, "_write", write)


@pytest.mark.parametrize(
    "change", [{"nnp": "nnp=0"}, {"nnp": ""}, {"seccomp": ""}, {"seccomp": "seccomp="}], ids=str
)
def test_the_guest_refuses_a_text_without(change: dict[str, str], plan: Plan) -> None:
    """Without no_new_privs or a filter nothing is set up at all, and the guest's own words say what was wrong."""
    text(**change)(plan)
    said: list[bytes] = []
    with pytest.raises(HostError, match="the microVM could not start the sandbox"):
        for _ in started(plan, said):
            pass
    assert said == [b""]


def test_another_program_in_qemus_place(plan: Plan, shared: Path) -> None:
    """A copy of QEMU is not the program that was planned, as alike as it may be."""
    program = machine(plan)["program"]
    copy = shared / "qemu"
    shutil.copy(program, copy)
    operation(plan, program.removeprefix("/"), "bind").update(source=str(copy))
    with pytest.raises(ProofError, match=r"vmm\.program"):
        for _ in started(plan, []):
            pass


def test_parts_of_another_sandbox_prove_nothing(plan: Plan) -> None:
    """The parts of one sandbox are not taken for those of another: ids, name and cgroup are its own."""
    running = launch.prepare(plan, name="", argv=["sleep"], detached=False, remove=True)
    try:
        for other in started(plan, []):
            guest = other.guest
            assert guest is not None
            subject = Subject(
                pid=other.job_pid, base=running.instance.base, size=65536, cgroup=running.cgroup, rules=()
            )
            stolen = Guest(report=guest.report, parts=guest.parts)
            proof = prove(plan, running.instance, subject, reported_descriptors=3, guest=stolen)
            failed = {line["control"] for line in proof["lines"] if line["ok"] is False}
    finally:
        running.close()
    assert not proof["holds"]
    for part in PARTS:
        assert {f"{part}.credentials.range", f"{part}.cgroup.membership"} <= failed
    assert "hostname" in failed


def test_proof_file_of_a_run(tmp_path: Path) -> None:
    """`--proof FILE` has every control of the plan, says who saw it, and that no hardware is the boundary if so."""
    file = tmp_path / "proof.json"
    done = run("-i", "microvm", "--allow-emulation", "--proof", file, "--", "true")
    assert (done.returncode, done.stderr) == (0, b"")
    proof = json.loads(file.read_text())
    assert (proof["holds"], proof["isolation"]) == (True, "microvm")
    lines = {line["control"]: line for line in proof["lines"]}
    first = int(lines["vmm.credentials.range"]["observed"].split()[1])
    assert lines["vmm.credentials.range"]["observed"] == f"0 {first} 65536"
    assert lines["vmm.program"]["observed"].endswith("qemu-system-x86_64")
    for name in ("kernel", "credentials.uid", "mount:/", "rlimit.nofile", "mounts.others"):
        assert lines[name]["vantage"] == "reported", name
    for part in PARTS:
        assert lines[f"{part}.namespace.user"]["vantage"] == "observed"
    emulated = lines["vmm.accelerator"]["observed"] == "tcg"
    assert ("isolation" in proof["unenforced"]) == emulated
    if emulated:
        assert "no hardware boundary" in str(lines["isolation"]["observed"])
