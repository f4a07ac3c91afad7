"""The proof is worth something: each control weakened in turn, behind the plan's own words, is seen, and nothing runs.

A control is named by exactly those lines of the proof that do not hold; how each is weakened is in weakenings.py.
"""

import json
import os
import re
import subprocess
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from weakenings import ELSEWHERE, TABLE, operation

import ringfence.runtime.bundle as runtime_bundle
import ringfence.runtime.linux as runtime_linux
import ringfence.runtime.ring as runtime_ring
from boxes import UNTHROTTLED, Sandboxes, bind
from ringfence.errors import ProofError
from ringfence.linux import libc
from ringfence.plan.document import Plan
from ringfence.proof.observe import Subject
from ringfence.proof.prove import failures, prove
from ringfence.sandbox import launch
from ringfence.sandbox.prepare import Request, plan_for
from ringfence.sandbox.run import Pipes, start_job

pytestmark = pytest.mark.requires("root", "compiler", "cgroup:memory", "cgroup:pids", "cgroup:io")

MS_BIND = 4096  # linux/mount.h


@pytest.fixture
def plan(sandboxes: Sandboxes, shared: Path) -> Plan:
    """A plan with every kind of control that this host has; the job could leave a mark in `shared`."""
    overrides = {
        "filesystem.mounts": [bind(sandboxes.probes, "/probe"), bind(shared, "/data", "rw")],
        "filesystem.sysfs": True,
        "limits.cpuset": "0",
        "sysctls": {"kernel.msgmax": "9000"},
    }
    request = Request(runtime=sandboxes.runtime, overrides=overrides, allow_unenforced=UNTHROTTLED)
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


def test_every_control_has_its_weakening(plan: Plan) -> None:
    """No control of a plan is left out of the table, and none is in it that does not exist."""
    names = {plain(control["name"]) for control in plan["controls"]}
    assert set(TABLE) | set(ELSEWHERE) == names
    assert not set(TABLE) & set(ELSEWHERE)


@pytest.mark.parametrize("name", TABLE)
def test_weakened_control_is_seen(
    name: str, plan: Plan, shared: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The proof names exactly what was weakened, the error names it, and the job has not run."""
    weakening = TABLE[name]
    if weakening.plan is not None:
        weakening.plan(plan)
    if weakening.config is not None:
        monkeypatch.setattr(runtime_bundle, "instantiate", changed(weakening.config))
    if weakening.maps:
        monkeypatch.setattr(runtime_ring, "make_userns", with_smaller_map(runtime_ring.make_userns))
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
    assert [plain(line["control"]) for line in proof["lines"] if line["ok"] is False] == sorted(
        weakening.seen, key=[plain(line["control"]) for line in proof["lines"]].index
    )
    assert not (shared / "mark").exists()


def changed(change: Callable[[dict[str, object]], object]) -> Callable[..., object]:
    real = runtime_bundle.instantiate

    def instantiate(*args: object, **kwargs: object) -> object:
        config = real(*args, **kwargs)  # type: ignore[arg-type]
        change(config)  # type: ignore[arg-type]
        return config

    return instantiate


def with_smaller_map(real: Callable[..., int]) -> Callable[..., int]:
    def make(agent: str, uids: list[tuple[int, int, int]], gids: list[tuple[int, int, int]]) -> int:
        return real(agent, [(0, uids[0][1], 4096)], [(0, gids[0][1], 4096)])

    return make


FILTER = """#!/usr/bin/python3 -I
import ctypes, os, struct, sys
class Program(ctypes.Structure):
    _fields_ = [('length', ctypes.c_ushort), ('filter', ctypes.c_void_p)]
allow = ctypes.create_string_buffer(struct.pack('=HBBI', 6, 0, 0, 0x7fff0000))  # BPF_RET: SECCOMP_RET_ALLOW
program = Program(1, ctypes.addressof(allow))
if ctypes.CDLL(None, use_errno=True).prctl(22, 2, ctypes.byref(program), 0, 0): sys.exit(1)  # PR_SET_SECCOMP
os.execv({runtime!r}, [{runtime!r}, *sys.argv[1:]])
"""


def test_second_filter_is_seen(plan: Plan, shared: Path) -> None:
    """A runtime that brings a seccomp filter of its own leaves two on the job: not what was asked."""
    wrapper = shared / "runtime"
    wrapper.write_text(FILTER.format(runtime=plan["runtime"]["path"]))
    wrapper.chmod(0o755)
    plan["runtime"]["path"] = str(wrapper)
    with pytest.raises(ProofError, match=r"seccomp\.filters: asked 1, observed 2"):
        for _ in started(plan):
            pass
    assert not (shared / "mark").exists()


def test_process_of_the_host_proves_nothing(plan: Plan) -> None:
    """Asked about an ordinary process of the host, with a descriptor too many, next to no control holds."""
    null = os.open("/dev/null", os.O_RDONLY)
    running = launch.prepare(plan, name="", argv=["sleep"], detached=False, remove=True)
    try:
        with subprocess.Popen(["sleep", "60"], pass_fds=(null,)) as process:
            subject = Subject(
                pid=process.pid, base=running.instance.base, size=65536, cgroup=running.cgroup, rules=()
            )
            proof = prove(plan, running.instance, subject, reported_descriptors=3)
            process.kill()
    finally:
        running.close()
        os.close(null)
    holds = {line["control"] for line in proof["lines"] if line["ok"]}
    # What a process of the host has anyway: nothing inheritable or ambient, perhaps no core files and no groups, and
    # file systems that are mounted the same way everywhere.
    usual = {
        "capabilities.inheritable",
        "capabilities.ambient",
        "credentials.groups",
        "mount:/dev/pts",
        "mount:/proc",
        "rlimit.core",
        "rlimit.stack",
    }
    assert holds <= usual
    assert not proof["holds"]


def test_descriptor_that_a_runtime_leaks_does_not_reach_the_job(
    plan: Plan, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One directory of the host more than was meant is handed to the agent: closed before the job is made."""
    root = os.open("/", os.O_RDONLY | os.O_DIRECTORY)
    real = runtime_linux.start

    def start(plan: Plan, instance: object, descriptors: tuple[int, ...]) -> object:
        return real(plan, instance, (*descriptors, root, root))  # type: ignore[arg-type]

    monkeypatch.setattr(runtime_linux, "start", start)
    try:
        for running in started(plan, lambda running: links(running.agent_pid)):
            assert running.proof is not None
            assert "/" not in links(running.agent_pid) - {"/proc"}
    finally:
        os.close(root)


def links(pid: int) -> set[str]:
    return {os.readlink(f"/proc/{pid}/fd/{name}") for name in os.listdir(f"/proc/{pid}/fd")}


def test_other_device_in_the_place_of_one(plan: Plan, shared: Path) -> None:
    """Another device over /dev/null is not taken for it by its name."""

    def swap(running: launch.Running) -> None:
        fd = os.open(f"/proc/{running.agent_pid}/ns/mnt", os.O_RDONLY)
        worker = threading.Thread(target=lambda: (libc.unshare(libc.CLONE_NEWNS), libc.setns(fd, 0), mount()))
        worker.start()
        worker.join()
        os.close(fd)

    def mount() -> None:
        libc.mount("/dev/zero", "/dev/null", "", MS_BIND)

    with pytest.raises(ProofError, match=r"devices\.nodes|mounts\.others"):
        for _ in started(plan, swap):
            pass
    assert not (shared / "mark").exists()


def test_mount_of_another_source(plan: Plan, shared: Path) -> None:
    """A mount that shows another directory than the one that was asked for is seen."""
    other = shared / "other"
    other.mkdir()
    operation(plan, "/probe", "bind").update(source=str(other))
    with pytest.raises(ProofError, match="mount:/probe"):
        for _ in started(plan):
            pass
    assert not (shared / "mark").exists()


def test_filter_that_lets_everything_through(plan: Plan, shared: Path) -> None:
    """An empty filter is a filter by mode and count, but the kernel's copy of it answers otherwise."""
    seccomp = plan["oci"]["linux"]["seccomp"]
    seccomp.update(defaultAction="SCMP_ACT_ALLOW", syscalls=[])
    del seccomp["defaultErrnoRet"]
    with pytest.raises(ProofError, match=r"seccomp\.answers"):
        for _ in started(plan):
            pass
    assert not (shared / "mark").exists()
