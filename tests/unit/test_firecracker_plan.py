"""Plans with Firecracker: the document against its published definition, the ring around it, and what is refused."""

import copy
import json
from typing import Any

import firecracker_api
import msgspec
import pytest
from plan_inputs import MACHINE, ROOT_V1, ROOT_V1_QEMU, USER_V2, policy

from ringfence.errors import HostError
from ringfence.host.facts import Host, Runtime, VmmFacts
from ringfence.host.sources import Source
from ringfence.plan import firecracker
from ringfence.plan.document import Op, Plan
from ringfence.plan.make import make_plan
from ringfence.plan.microvm import guest_memory_bytes
from ringfence.plan.workload import Workload
from ringfence.runtime import bridge
from ringfence.runtime.base import Instance

PROGRAM = "/usr/local/bin/firecracker"


def host(version: tuple[int, int, int] = (1, 7, 0), base: Host = ROOT_V1, **more: object) -> Host:
    runtime = Runtime(
        path=PROGRAM, version=version, version_text=f"Firecracker v{'.'.join(map(str, version))}"
    )
    facts = {"kvm": "works", "vmm": VmmFacts(files={PROGRAM: PROGRAM}), **more}
    return msgspec.structs.replace(base, runtimes={**base.runtimes, "firecracker": runtime}, **facts)


HOST = host()
MOUNTED = msgspec.structs.replace(
    MACHINE, sources=(Source("/srv/data", "/srv/data", "/data", "directory", True),)
)


def plan(on: Host = HOST, workload: Workload = MACHINE, *, emulation: bool = False, **fields: object) -> Plan:
    asked = policy(isolation="microvm", **fields)
    return make_plan(asked, workload, on, vmm="firecracker", emulation=emulation)


def op(made: Plan, at: str, kind: str) -> Op:
    (found,) = [op for op in made["stage"] if op.get("at") == at and op["op"] == kind]
    return found


def document(made: Plan) -> dict[str, Any]:
    file = op(made, "machine.json", "file")
    assert file["op"] == "file"
    found: dict[str, Any] = json.loads(file["text"])
    return found


def test_the_document_is_what_the_definition_allows() -> None:
    """No word in it is unknown, no value of another kind, whatever the policy sets."""
    for made in (
        plan(),
        plan(workload=MOUNTED, limits__cpus=3.5, limits__memory="3GiB"),
        plan(limits__io__read="10MiB/s", limits__io__read_iops=100),
        plan(limits__io__read=None, limits__io__read_iops=None),
    ):
        assert list(firecracker_api.validator("FullVmConfiguration").iter_errors(document(made))) == []


@pytest.mark.parametrize(
    ("at", "key", "value"),
    [
        ("machine-config", "vcpu_count", 33),
        ("machine-config", "vcpu_count", "2"),
        ("machine-config", "memory", 1),
        ("boot-source", "kernel_image_path", None),
        ("vsock", "guest_cid", 2),
        ("logger", "level", "Loud"),
    ],
)
def test_a_wrong_document_would_be_noticed(at: str, key: str, value: object) -> None:
    """The definition, as these tests use it, refuses unknown words, wrong types and values out of range."""
    wrong = copy.deepcopy(document(plan()))
    wrong[at][key] = value
    assert list(firecracker_api.validator("FullVmConfiguration").iter_errors(wrong)) != []


def test_the_machine_is_the_policys() -> None:
    """CPUs, memory, kernel and disks; no network, no balloon, nothing that can be hot-plugged."""
    made = plan(workload=MOUNTED, limits__cpus=1.5, limits__memory="256MiB")
    found, machine = document(made), made["machine"]
    assert machine is not None
    memory = guest_memory_bytes(policy(limits__memory="256MiB").limits)
    assert found["machine-config"] == {
        "vcpu_count": 2,
        "mem_size_mib": memory >> 20,
        "smt": False,
        "track_dirty_pages": False,
    }
    assert found["boot-source"]["boot_args"] == machine["command_line"]
    words = machine["command_line"].split()
    assert {"reboot=k", "panic=-1", "ringfence.link=vsock", "lpj=100000"} <= set(words)
    assert set(found) == {
        "boot-source", "drives", "machine-config", "vsock", "entropy", "logger", "metrics",
    }  # fmt: skip
    assert machine["devices"] == ["serial console", "vsock link", "rng", "disk vda", "disk vdb"]
    assert (machine["vmm"], machine["accelerator"], machine["program"]) == ("firecracker", "kvm", PROGRAM)


def test_more_cpus_than_it_can_have() -> None:
    """Firecracker makes 32 CPUs at the most, and the plan says so."""
    made = plan(msgspec.structs.replace(HOST, cpu_count=64), limits__cpus=40)
    assert made["machine"] is not None
    assert document(made)["machine-config"]["vcpu_count"] == made["machine"]["cpus"] == 32


def test_disks_are_read_only_and_in_order() -> None:
    """The image by a name in the ring that shows its owner as the VMM, a copy by the descriptor that it comes as."""
    made = plan(workload=MOUNTED)
    drives = document(made)["drives"]
    assert [drive["drive_id"] for drive in drives] == ["vda", "vdb"]
    assert [drive["path_on_host"] for drive in drives] == ["/disks/vda", "/proc/self/fd/9"]
    assert all(drive["is_read_only"] and not drive["is_root_device"] for drive in drives)
    bind = op(made, "disks/vda", "bind")
    assert bind["op"] == "bind"
    assert (bind["source"], bind["ids"], bind["read_only"]) == (MACHINE.disk, "owner", True)


def test_limits_on_reading_are_the_devices_own() -> None:
    """The policy's bytes and operations in a second become each disk's token buckets; without them there are none."""
    limited = document(plan(limits__io__read="10MiB/s", limits__io__read_iops=100))["drives"][0]
    assert limited["rate_limiter"] == {
        "bandwidth": {"size": 10 << 20, "refill_time": 1000},
        "ops": {"size": 100, "refill_time": 1000},
    }
    free = document(plan(limits__io__read=None, limits__io__read_iops=None))["drives"][0]
    assert "rate_limiter" not in free


def test_one_vsock_id_for_all_collides_with_nobody() -> None:
    """All guests have one id, for it is known to their own VMM alone: its socket is in a tmpfs of each ring's own."""
    one, other = plan(), plan(workload=MOUNTED)
    assert document(one)["vsock"] == document(other)["vsock"] == {"guest_cid": 3, "uds_path": "/run/vsock"}
    for made in (one, other):
        run = op(made, "run", "tmpfs")
        assert run["op"] == "tmpfs"
        assert (run["owner"], run["mode"], run["size_bytes"]) == ("job", 0o700, 1 << 20)
        assert not [o for o in made["stage"] if o["op"] == "bind" and o["at"].startswith("run")]


def test_its_api_is_off() -> None:
    """The document is all that is said to it; seccomp is its own default, which no option of ours takes away."""
    made = plan()
    assert made["machine"] is not None
    assert made["machine"]["argv"] == [PROGRAM, "--no-api", "--config-file", "/machine.json"]


def test_the_bridge_gets_its_link_by_vsock() -> None:
    """The bridge is told the document's socket, and which descriptors are the disks: both sides have them from here."""
    made = plan(workload=MOUNTED)
    assert made["machine"] is not None
    instance = Instance(id="x", directory="/x", staging="/s", base=1, cgroup_path="")
    argv = bridge.arguments(made, made["machine"], instance)
    assert argv[1:6] == ["--bridge", "0", "/setup", "vsock:/run/vsock", "2"]
    assert argv[6:] == made["machine"]["argv"]
    assert (bridge.VSOCK, bridge.FIRST_DISK) == (firecracker.VSOCK, firecracker.FIRST_DISK)


def test_the_ring_is_the_one_around_qemu() -> None:
    """The same container, with the same limits and controls; only the VMM in it differs, and its files."""
    mine = plan()
    theirs = make_plan(policy(isolation="microvm"), MACHINE, ROOT_V1_QEMU)
    assert mine["oci"] == theirs["oci"]
    assert mine["controls"] == theirs["controls"]
    assert mine["machine"] is not None
    assert theirs["machine"] is not None
    assert mine["machine"]["setup"] == theirs["machine"]["setup"]


UNUSABLE = msgspec.structs.replace(HOST, kvm="unusable", kvm_reason="internal error")


@pytest.mark.parametrize(
    ("on", "emulation", "words", "hint"),
    [
        (ROOT_V1, False, "Firecracker is not installed", "--vmm qemu"),
        (ROOT_V1_QEMU, False, "Firecracker is not installed", "/usr/local/bin"),
        (host((1, 3, 3)), False, "Firecracker v1.3.3 is too old", "1.4.0 or newer"),
        (host((0, 0, 0)), False, "too old", "1.4.0 or newer"),
        (host(vmm=VmmFacts(reason="no program")), False, "cannot be used here: no program", "doctor"),
        (UNUSABLE, False, "cannot emulate, and KVM does not work here: internal error", "-i gvisor"),
        (UNUSABLE, True, "cannot emulate, and KVM does not work here", "--vmm qemu can emulate"),
        (host(kvm="absent"), True, "/dev/kvm is absent", "--vmm qemu"),
        (host(base=USER_V2), False, "which only root can arrange", "--vmm qemu"),
    ],
)
def test_what_is_refused(on: Host, emulation: bool, words: str, hint: str) -> None:
    """Missing, too old, not to be trusted, without KVM: never another VMM in its place, nor emulation if allowed."""
    with pytest.raises(HostError) as error:
        plan(on, emulation=emulation)
    assert words in str(error.value)
    assert hint in str(error.value.hint)


def test_other_tiers_have_no_vmm() -> None:
    """The word is refused where it means nothing, as the other tiers' words are."""
    for tier in ("linux",):
        with pytest.raises(HostError, match="has no VMM"):
            make_plan(policy(isolation=tier), MACHINE, ROOT_V1, vmm="qemu")


def test_qemu_by_its_name_is_the_default() -> None:
    """Naming the default changes nothing of a plan."""
    asked = policy(isolation="microvm")
    assert make_plan(asked, MACHINE, ROOT_V1_QEMU, vmm="qemu") == make_plan(asked, MACHINE, ROOT_V1_QEMU)
