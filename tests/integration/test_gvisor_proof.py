"""The proof of a gVisor sandbox is worth something: what is weakened behind the plan's words is seen, and nothing runs.

The same as test_proof.py for the other tier; what stands for a control's weakening is in TABLE.
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
from weakenings import ALLOW_DISK, drop, operation, resource, throttle, without, writable_root

import ringfence.runtime.bundle as runtime_bundle
import ringfence.runtime.ring as runtime_ring
from boxes import UNTHROTTLED, Sandboxes, bind
from commands import run
from ringfence.cgroup.group import Cgroup
from ringfence.errors import HostError, ProofError
from ringfence.plan.document import Plan
from ringfence.proof.guest import Guest
from ringfence.proof.prove import failures, prove
from ringfence.sandbox import launch
from ringfence.sandbox.prepare import Request, plan_for
from ringfence.sandbox.run import Pipes, start_job

pytestmark = pytest.mark.requires(
    "root", "compiler", "runsc", "cgroup1:memory", "cgroup1:pids", "cgroup1:blkio"
)

MIB = 1 << 20
PARTS = ("sentry", "gofer", "door")


class Weakening(msgspec.Struct, frozen=True):
    """What is done behind the plan's words, and the controls that must not hold then."""

    seen: tuple[str, ...]
    plan: Callable[[Plan], object] | None = None  # changes the plan
    inner: Callable[[dict[str, Any]], object] | None = None  # changes what runsc is given
    outer: Callable[[dict[str, Any]], object] | None = None  # changes what the ring's runtime is given
    started: Callable[[launch.Running], object] | None = None  # changes the sandbox before its job is made
    without: tuple[str, ...] = ()  # what of Cgroup is not done
    size: int = 0  # of the id range, in place of the right one


def process(plan: Plan) -> dict[str, Any]:
    assert plan["guest"] is not None
    return plan["guest"]["oci"]["process"]  # type: ignore[return-value]


def user(**ids: object) -> Callable[[Plan], object]:
    return lambda plan: process(plan)["user"].update(ids)


def limit(name: str, value: int | None) -> Callable[[Plan], object]:
    """Change one of the job's limits, or leave it what gVisor begins with."""

    def change(plan: Plan) -> None:
        limits = process(plan)["rlimits"]
        limits[:] = [found for found in limits if found["type"] != name]
        if value is not None:
            limits.append({"type": name, "soft": value, "hard": value})

    return change


def option(target: str, old: str, new: str) -> Callable[[Plan], object]:
    """Change an option of a mount that gVisor makes."""

    def change(plan: Plan) -> None:
        assert plan["guest"] is not None
        mounts = plan["guest"]["oci"]["mounts"]
        options = next(mount for mount in mounts if mount["destination"] == target)["options"]
        options[options.index(old)] = new

    return change


def flag(name: str, value: str) -> Callable[[Plan], object]:
    """Give one of runsc's flags another value."""

    def change(plan: Plan) -> None:
        assert plan["guest"] is not None
        flags = plan["guest"]["flags"]
        (old,) = [word for word in flags if word.startswith(f"--{name}=")]
        flags[flags.index(old)] = f"--{name}={value}"

    return change


def another_mount(config: dict[str, Any]) -> None:
    config["mounts"].append({"destination": "/mnt", "type": "tmpfs", "source": "none", "options": ["nosuid"]})


def hidden_mount(config: dict[str, Any]) -> None:
    config["mounts"].append(
        {"destination": "/work", "type": "tmpfs", "source": "none", "options": ["nosuid"]}
    )


def root_to_write(plan: Plan) -> None:
    writable_root(plan)
    assert plan["guest"] is not None
    plan["guest"]["oci"]["root"]["readonly"] = False  # or runsc itself mounts it read-only for the gofer


def no_uts(config: dict[str, Any]) -> None:
    del config["hostname"]
    spaces = config["linux"]["namespaces"]
    spaces[:] = [space for space in spaces if space["type"] != "uts"]


def served_too(plan: Plan) -> None:
    """Mount something below the root that the gofer serves."""
    place = plan["stage"].index(operation(plan, "root/work", "tmpfs"))  # type: ignore[arg-type]
    more = {"op": "tmpfs", "at": "root/mnt", "size_bytes": MIB, "inodes": 16, "mode": 0o755, "owner": "root"}
    plan["stage"].insert(place, more)  # type: ignore[arg-type]


def job_capabilities(plan: Plan) -> None:
    process(plan)["capabilities"].update({key: ["CAP_CHOWN"] for key in ("bounding", "inheritable")})


def away(running: launch.Running) -> None:
    """Move the sentry, and so the job, out of the memory cgroup."""
    assert running.cgroup is not None
    assert running.guest is not None
    Path(running.cgroup.layout.mounts["memory"], "cgroup.procs").write_text(
        str(running.guest.parts["sentry"])
    )


TABLE: dict[str, Weakening] = {
    "credentials.uid": Weakening(("credentials.uid",), user(uid=1001)),
    "credentials.gid": Weakening(("credentials.gid",), user(gid=1001)),
    "credentials.groups": Weakening(("credentials.groups",), user(additionalGids=[5])),
    "capabilities.bounding": Weakening(
        ("capabilities.inheritable", "capabilities.bounding"), job_capabilities
    ),
    "seccomp.mode": Weakening(("seccomp.mode",), flag("oci-seccomp", "false")),
    "rlimit.core": Weakening(("rlimit.core",), limit("RLIMIT_CORE", 4096)),
    "rlimit.fsize": Weakening(("rlimit.fsize",), limit("RLIMIT_FSIZE", None)),
    "rlimit.nofile": Weakening(("rlimit.nofile",), limit("RLIMIT_NOFILE", 1024)),
    "rlimit.nproc": Weakening(("rlimit.nproc",), limit("RLIMIT_NPROC", None)),
    "rlimit.stack": Weakening(("rlimit.stack",), limit("RLIMIT_STACK", 16 * MIB)),
    "hostname": Weakening(("hostname",), inner=lambda config: config.update(hostname="another")),
    "mount:/dev/shm": Weakening(
        ("mount:/dev/shm",), lambda plan: operation(plan, "shm", "tmpfs").update(inodes=1 << 20)
    ),
    "guest.mount:/sys": Weakening(("guest.mount:/sys",), option("/sys", "ro", "rw")),
    "guest.mounts.others": Weakening(("guest.mounts.others",), inner=another_mount),
    "guest.mounts.others, hidden": Weakening(("guest.mounts.others",), inner=hidden_mount),
    "cgroup.memory_bytes": Weakening(("cgroup.memory_bytes",), without=("limit_memory",)),
    "cgroup.cpu_quota_us": Weakening(("cgroup.cpu_quota_us",), without=("limit_cpu",)),
    "cgroup.cpu_weight": Weakening(("cgroup.cpu_weight",), resource("cpu", shares=4096)),
    "cgroup.cpuset": Weakening(("cgroup.cpuset",), resource("cpu", cpus="0-1")),
    "cgroup.pids": Weakening(("cgroup.pids",), resource("pids", limit=4096)),
    "cgroup.io.rbps": Weakening(("cgroup.io.rbps",), throttle("throttleReadBpsDevice")),
    "cgroup.io.riops": Weakening(("cgroup.io.riops",), throttle("throttleReadIOPSDevice")),
    "cgroup.devices": Weakening(
        ("cgroup.devices",),
        lambda plan: plan["oci"]["linux"]["resources"]["devices"].append(ALLOW_DISK),  # type: ignore[arg-type]
    ),
    "sentry.cgroup.membership": Weakening(("sentry.cgroup.membership",), started=away),
    "mount:/": Weakening(("mount:/",), root_to_write),
    "mount:/tmp": Weakening(
        ("mount:/tmp",), lambda plan: operation(plan, "root/tmp", "tmpfs").update(inodes=1 << 20)
    ),
    "mount:/work": Weakening(("mount:/work",), lambda plan: drop(plan, "root/work", "tmpfs")),
    "mount:/probe": Weakening(
        ("mount:/probe",), lambda plan: operation(plan, "/probe", "bind").update(read_only=False)
    ),
    "mount:/data": Weakening(("mount:/data",), lambda plan: drop(plan, "/data", "bind")),
    "mounts.others": Weakening(("mounts.others",), served_too),
    "door.seccomp.mode": Weakening(
        ("sentry.seccomp.filters", "gofer.seccomp.filters", "door.seccomp.mode", "door.seccomp.filters"),
        lambda plan: plan["oci"]["linux"].pop("seccomp"),  # type: ignore[misc]
    ),
    "gofer.credentials.range": Weakening(("gofer.credentials.range", "door.credentials.range"), size=65535),
    # The sentry and the gofer make these for themselves; the door has those of the ring.
    "door.namespace.ipc": Weakening(("door.namespace.ipc",), without("ipc")),
    "door.namespace.network": Weakening(("door.namespace.network",), without("network")),
    "door.namespace.uts": Weakening(("door.namespace.uts",), outer=no_uts),
    "namespace.cgroup": Weakening(tuple(f"{part}.namespace.cgroup" for part in PARTS), without("cgroup")),
}


@pytest.fixture
def plan(guests: Sandboxes, shared: Path) -> Plan:
    """A plan with every kind of control that this host has; the job could leave a mark in `shared`."""
    overrides = {
        "isolation": "gvisor",
        "filesystem.mounts": [bind(guests.probes, "/probe"), bind(shared, "/data", "rw")],
        "limits.cpuset": "0",
    }
    request = Request(runtime=guests.runtime, overrides=overrides, allow_unenforced=UNTHROTTLED)
    plan: Plan = json.loads(json.dumps(plan_for(request)))  # as from the cache: no list is in it twice
    return plan


def started(
    plan: Plan, before_job: Callable[[launch.Running], object] | None = None
) -> Iterator[launch.Running]:
    """Start a job that leaves a mark, as far as the proof lets it come."""
    running = launch.prepare(plan, name="", argv=["touch"], detached=False, remove=True)
    try:
        launch.start(running)
        if before_job is not None:
            before_job(running)
        pipes = Pipes(running.owner())
        try:
            start_job(running, [b"/usr/bin/touch", b"/data/mark"], [], None, pipes.theirs)
        finally:
            pipes.close()
        yield running
        assert running.wait_gone(10)
    finally:
        running.close()


def test_unchanged_plan_holds_and_its_job_runs(plan: Plan, shared: Path) -> None:
    """The control: nothing weakened, the proof holds, the mark is there."""
    for running in started(plan):
        assert running.proof is not None
        assert failures(running.proof) == []
    assert (shared / "mark").exists()


def plain(name: str) -> str:
    """Return the name of a control without the number of the disk that it is about."""
    return re.sub(r":\d+:\d+$", "", name)


# Controls that no plan can weaken alone, and where else they are seen to fail.
ELSEWHERE = {
    "capabilities.permitted": "test_proof_guest.py",  # a job that is not root has none in gVisor
    "capabilities.effective": "test_proof_guest.py",
    "no_new_privileges": "test_proof_guest.py",  # the agent sees to it as well
    "kernel": "test_proof_guest.py",
    "network.interfaces": "test_proof_guest.py",
    "descriptors": "test_proof_guest.py",
    "cgroup.swap_bytes": "test_proof.py",
    "cgroup.cpu_period_us": "test_proof.py",
}


def test_every_control_is_seen_to_fail_somewhere(plan: Plan) -> None:
    """No control of a plan is left out of the tables, and none is in them that does not exist."""
    names = {plain(control["name"]) for control in plan["controls"]}
    covered = {control for weakening in TABLE.values() for control in weakening.seen}
    of_parts = {name for name in names if name.startswith(tuple(f"{part}." for part in PARTS))}
    assert (
        covered | set(ELSEWHERE) | of_parts == names
    )  # a process of the host has next to none of the parts'


@pytest.mark.parametrize("name", TABLE)
def test_weakened_control_is_seen(
    name: str, plan: Plan, shared: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The proof names exactly what was weakened, the error names it, and the job has not run."""
    weakening = TABLE[name]
    if weakening.plan is not None:
        weakening.plan(plan)
    change_config(weakening, monkeypatch)
    for method in weakening.without:
        monkeypatch.setattr(Cgroup, method, lambda *_: None)
    if weakening.size:
        real = runtime_ring.make_userns

        def make(agent: str, uids: Any, gids: Any) -> int:
            smaller = [(0, uids[0][1], weakening.size)], [(0, gids[0][1], weakening.size)]
            return real(agent, *smaller)

        monkeypatch.setattr(runtime_ring, "make_userns", make)
    seen: list[launch.Running] = []

    def before_job(running: launch.Running) -> None:
        seen.append(running)
        if weakening.started is not None:
            weakening.started(running)

    with pytest.raises(ProofError, match=weakening.seen[0].replace(".", r"\.")):
        for _ in started(plan, before_job):
            pass
    proof = seen[0].proof
    assert proof is not None
    assert {plain(line["control"]) for line in proof["lines"] if line["ok"] is False} == set(weakening.seen)
    assert not (shared / "mark").exists()


def change_config(weakening: Weakening, monkeypatch: pytest.MonkeyPatch) -> None:
    """Change a config.json when it is written."""
    real = runtime_bundle._write

    def write(path: str, content: bytes, mode: int) -> None:
        change = weakening.inner if path.endswith("/bundle/config.json") else weakening.outer
        oci: Any = json.loads(content)
        if change is not None:
            change(oci)
        real(path, json.dumps(oci).encode(), mode)

    monkeypatch.setattr(runtime_bundle, "_write", write)


def test_flags_that_open_a_way_out_do_not_start(plan: Plan, shared: Path) -> None:
    """A sentry that is to open files by itself cannot: the ring does not give it what it would need for that."""
    flag("directfs", "true")(plan)
    with pytest.raises((HostError, ProofError)):
        for _ in started(plan):
            pass
    assert not (shared / "mark").exists()


def test_another_program_in_runscs_place(plan: Plan, shared: Path) -> None:
    """A copy of runsc is not the program that was planned, as alike as it may be."""
    assert plan["guest"] is not None
    copy = shared / "runsc"
    shutil.copy(plan["guest"]["program"], copy)
    operation(plan, "runsc", "bind").update(source=str(copy))
    with pytest.raises(ProofError, match=r"sentry\.program"):
        for _ in started(plan):
            pass
    assert not (shared / "mark").exists()


def test_processes_of_another_sandbox_prove_nothing(plan: Plan, shared: Path) -> None:
    """The parts of one sandbox are not taken for those of another: ids and cgroup are its own."""
    running = launch.prepare(plan, name="", argv=["sleep"], detached=False, remove=True)
    try:
        for other in started(plan):
            guest = other.guest
            assert guest is not None
            subject = launch_subject(other, running)
            stolen = Guest(report=guest.report, parts=guest.parts)
            proof = prove(plan, running.instance, subject, reported_descriptors=3, guest=stolen)
            failed = {line["control"] for line in proof["lines"] if line["ok"] is False}
    finally:
        running.close()
    assert not proof["holds"]
    for part in PARTS:
        assert {f"{part}.credentials.uid", f"{part}.credentials.range", f"{part}.cgroup.membership"} <= failed
    assert "hostname" in failed


def launch_subject(other: launch.Running, running: launch.Running) -> Any:
    from ringfence.proof.observe import Subject

    return Subject(pid=other.job_pid, base=running.instance.base, size=65536, cgroup=running.cgroup, rules=())


def test_proof_file_of_a_run(guests: Sandboxes, tmp_path: Path) -> None:
    """`--proof FILE` has every control of the plan, says who saw it, and where; the table names both kinds."""
    file = tmp_path / "proof.json"
    done = run("-i", "gvisor", "--proof", file, "--", "true")
    assert (done.returncode, done.stderr) == (0, b"")
    proof = json.loads(file.read_text())
    assert (proof["holds"], proof["isolation"]) == (True, "gvisor")
    assert "runsc" in proof["runtime"]
    assert "crun" in proof["runtime"]
    lines = {line["control"]: line for line in proof["lines"]}
    assert {line["vantage"] for line in lines.values()} == {"observed", "reported", "not observable"}
    assert lines["sentry.mounts"]["observed"] == ["/ tmpfs ro"]
    assert lines["guest.mounts.others"]["observed"] == []
    first = int(lines["gofer.credentials.range"]["observed"].split()[1])
    assert lines["door.credentials.range"]["observed"] == f"0 {first} 65536"
    assert lines["sentry.credentials.range"]["observed"] == f"65534 {first + 65534} 1"
    assert lines["kernel"]["vantage"] == lines["credentials.uid"]["vantage"] == "reported"
    for part in PARTS:
        assert lines[f"{part}.namespace.user"]["vantage"] == "observed"
    table = run("-i", "gvisor", "--proof", "-", "--", "true").stderr.decode()
    assert "every asked control was observed" in table
    assert "only reported" in table
    assert os.uname().release not in lines["kernel"]["source"]
