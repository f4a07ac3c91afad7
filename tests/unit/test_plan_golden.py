"""Whole plans, byte for byte, as files: a change of a plan shows in the review of the change.

RINGFENCE_UPDATE_GOLDEN=1 writes the files anew. A seccomp filter, which has tests of its own, stands in them as
its digest; the digests of plan, policy and host are left out, since they say nothing to a reader.
"""

import copy
import hashlib
import json
import os
from collections.abc import Callable
from pathlib import Path

import msgspec
import plan_inputs as given
import pytest

from ringfence.plan.document import Plan
from ringfence.plan.make import make_plan

GOLDEN = Path(__file__).parent / "golden"
UPDATE = os.environ.get("RINGFENCE_UPDATE_GOLDEN") == "1"

PLANS: dict[str, Callable[[], Plan]] = {
    "v1-root-crun-untrusted": lambda: make_plan(given.policy(), given.BASE, given.ROOT_V1),
    "v1-root-crun-trusted": lambda: make_plan(given.policy("trusted"), given.BASE, given.ROOT_V1),
    "v1-root-crun-service-host-image": lambda: make_plan(
        given.policy("service", network__mode="none"), given.HOST_VIEW, given.ROOT_V1
    ),
    "v1-root-runc-untrusted": lambda: make_plan(given.policy(), given.BASE, given.ROOT_V1_RUNC),
    "v1-root-crun-mounts-and-devices": lambda: make_plan(
        given.policy(
            filesystem__mounts=list(given.MOUNTS),
            devices=["/dev/fuse"],
            filesystem__sysfs=True,
            sysctls={"kernel.msgmax": "8192"},
            user="7:8",
            capabilities=["NET_BIND_SERVICE"],
        ),
        given.WITH_MOUNTS,
        given.ROOT_V1,
        allow_unenforced=frozenset({"limits.io.write", "limits.io.write_iops"}),
    ),
    "v2-root-crun-ci": lambda: make_plan(
        given.policy("ci", limits__cpuset="0-1", network__mode="none"), given.BASE, given.ROOT_V2
    ),
    "hybrid-root-crun-untrusted": lambda: make_plan(given.policy(), given.BASE, given.HYBRID),
    "v2-user-delegated-untrusted": lambda: make_plan(given.policy(), given.BASE, given.USER_V2),
    "v1-user-writable-root": lambda: make_plan(
        given.policy(filesystem__root="writable"),
        given.BASE,
        given.USER_V1,
        allow_unenforced=given.CGROUP_FIELDS,
    ),
    "hybrid-user-untrusted": lambda: make_plan(
        given.policy(), given.BASE, given.USER_HYBRID, allow_unenforced=given.CGROUP_FIELDS
    ),
    "v1-user-own-id-alone": lambda: make_plan(
        given.policy(),
        given.BASE,
        msgspec.structs.replace(given.USER_V1, ids=type(given.USER_V1.ids)()),
        allow_unenforced=given.CGROUP_FIELDS | {"user", "limits.threads"},
    ),
    "v1-root-gvisor-untrusted": lambda: make_plan(
        given.policy(isolation="gvisor"), given.BASE, given.ROOT_V1_GVISOR
    ),
    "v1-root-gvisor-mounts": lambda: make_plan(
        given.policy(
            isolation="gvisor",
            filesystem__mounts=list(given.MOUNTS),
            filesystem__sysfs=True,
            filesystem__root="writable",
            user="0:0",
            capabilities=["NET_BIND_SERVICE"],
        ),
        msgspec.structs.replace(given.BASE, sources=given.SOURCES[:3]),
        given.ROOT_V1_GVISOR,
        allow_unenforced=frozenset(
            {"limits.io.write", "limits.io.write_iops", "limits.disk", "limits.inodes"}
        ),
    ),
    "v2-user-gvisor-untrusted": lambda: make_plan(
        given.policy(isolation="gvisor"), given.BASE, given.USER_V2_GVISOR
    ),
    "v1-root-microvm-untrusted": lambda: make_plan(
        given.policy(isolation="microvm"), given.MACHINE, given.ROOT_V1_QEMU
    ),
    "v1-root-microvm-emulated-mounts": lambda: make_plan(
        given.policy(
            isolation="microvm",
            filesystem__mounts=list(given.MOUNTS[:1]),
            filesystem__sysfs=True,
            filesystem__root="writable",
            sysctls={"kernel.msgmax": "8192"},
            user="0:0",
            capabilities=["NET_BIND_SERVICE"],
        ),
        msgspec.structs.replace(given.MACHINE, sources=given.SOURCES[:1]),
        given.ROOT_V1_EMULATED,
        emulation=True,
    ),
}


def rendered(plan: Plan) -> str:
    """Return the plan as a golden file has it."""
    shown = copy.deepcopy(plan)
    for oci in (shown["oci"], *([shown["guest"]["oci"]] if shown["guest"] else [])):
        seccomp = json.dumps(oci["linux"]["seccomp"]).encode()
        oci["linux"]["seccomp"] = f"sha256:{hashlib.sha256(seccomp).hexdigest()}"  # type: ignore[typeddict-item]
    if shown["machine"]:
        shown["machine"]["setup"] = [_without_filter(line) for line in shown["machine"]["setup"]]
    for name in ("digest", "policy_digest", "host_digest"):
        assert shown.pop(name).startswith("sha256:")  # type: ignore[misc]
    return json.dumps(shown, indent=1) + "\n"


def _without_filter(line: str) -> str:
    """A compiled filter is libseccomp's work, and differs from one version of it to the next."""
    key, _, value = line.partition("=")
    return line if key != "seccomp" else f"seccomp={'a filter' if value else ''}"


@pytest.mark.parametrize("name", PLANS)
def test_the_plan_is_the_golden_one(name: str) -> None:
    """Every byte of the plan is as reviewed."""
    path, text = GOLDEN / f"{name}.json", rendered(PLANS[name]())
    if UPDATE:
        path.parent.mkdir(exist_ok=True)
        path.write_text(text)
    assert path.read_text() == text


def test_no_golden_file_is_left_without_a_plan() -> None:
    """A renamed plan takes its file along."""
    assert {path.stem for path in GOLDEN.glob("*.json")} == set(PLANS)
