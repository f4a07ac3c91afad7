"""Plans of the microVM tier: what is refused with which words, and that the machine has what it needs and no more."""

import re
from typing import Literal

import msgspec
import pytest
from plan_inputs import (
    BASE,
    HOST_VIEW,
    HYBRID,
    MACHINE,
    ROOT_V1,
    ROOT_V1_EMULATED,
    ROOT_V1_QEMU,
    ROOT_V2,
    policy,
)

from ringfence.errors import HostError, MountError, NotEnforceable, RingfenceError
from ringfence.host.facts import Host, VmmFacts
from ringfence.host.sources import Source
from ringfence.plan.document import Machine, Plan
from ringfence.plan.make import make_plan
from ringfence.plan.microvm import OVERHEAD_BYTES, guest_memory_bytes
from ringfence.plan.workload import Workload

MIB = 1 << 20
Kind = Literal["directory", "file", "socket", "fifo", "device"]


def plan(
    host: Host = ROOT_V1_QEMU,
    workload: Workload = MACHINE,
    *,
    emulation: bool = False,
    preset: str = "untrusted",
    **overrides: object,
) -> Plan:
    asked = policy(preset, isolation="microvm", **overrides)
    return make_plan(asked, workload, host, emulation=emulation)


def machine(made: Plan) -> Machine:
    assert made["machine"] is not None
    return made["machine"]


def option(made: Plan, name: str) -> str:
    """Return the value of an option that QEMU is given once."""
    argv = machine(made)["argv"]
    (place,) = [place for place, word in enumerate(argv) if word == name]
    return argv[place + 1]


def setup(made: Plan, key: str) -> list[str]:
    found = [line.partition("=")[::2] for line in machine(made)["setup"]]
    return [value for name, value in found if name == key]


def with_sources(*sources: Source) -> Workload:
    return msgspec.structs.replace(MACHINE, sources=sources)


def mount(kind: Kind = "directory", target: str = "/data", *, read_only: bool = True) -> Source:
    return Source("/srv/data", "/srv/data", target, kind, read_only)


# What is refused


@pytest.mark.parametrize(
    ("host", "words"),
    [
        (ROOT_V1, "QEMU is not installed"),
        (msgspec.structs.replace(ROOT_V1_QEMU, vmm=None), "QEMU is not installed"),
        (msgspec.structs.replace(ROOT_V1_QEMU, vmm=VmmFacts(reason="no firmware")), "no firmware"),
        (msgspec.structs.replace(ROOT_V1_QEMU, kvm="absent"), "needs KVM, which does not work here: /dev/kvm is"),
        (msgspec.structs.replace(ROOT_V1_QEMU, kvm="not openable"), "/dev/kvm is not openable"),
        (ROOT_V1_EMULATED, "does not work here: internal error (emulation failed)"),
    ],
)  # fmt: skip
def test_a_host_that_makes_no_machines(host: Host, words: str) -> None:
    """Each way in which no machine can be had has words of its own, and there is never a weaker boundary instead."""
    with pytest.raises(HostError) as error:
        plan(host)
    assert words in str(error.value)


def test_emulation_is_for_those_who_ask_for_it() -> None:
    """Asked for, it is taken where KVM does not work, and the plan says that no hardware keeps the machine apart."""
    made = plan(ROOT_V1_EMULATED, emulation=True)
    assert machine(made)["accelerator"] == "tcg"
    assert option(made, "-accel").startswith("tcg,")
    (left,) = [item for item in made["unenforced"] if item["field"] == "isolation"]
    assert left["reason"].startswith("no hardware boundary: the machine is emulated (internal error")


def test_kvm_is_taken_where_it_works() -> None:
    """Allowed or not, nobody emulates what the hardware does; the ring has /dev/kvm then, and only then."""
    for emulation in (False, True):
        made = plan(emulation=emulation)
        assert machine(made)["accelerator"] == option(made, "-accel") == "kvm"
        assert [item for item in made["unenforced"] if item["field"] == "isolation"] == []
    rings = [made["oci"] for made in (plan(), plan(ROOT_V1_EMULATED, emulation=True))]
    destinations = [[mount["destination"] for mount in ring["mounts"]] for ring in rings]
    assert destinations == [["/proc", "/dev", "/dev/kvm"], ["/proc", "/dev"]]
    allowed = [
        [(rule["major"], rule["minor"]) for rule in ring["linux"]["resources"]["devices"] if rule["allow"]]
        for ring in rings
    ]
    assert allowed == [[(10, 232)], []]
    asked = {control["name"]: control["asked"] for control in plan()["controls"]}
    assert (asked["cgroup.devices"], asked["vmm.accelerator"]) == (["c 10:232 rw"], "kvm")


def test_emulation_is_no_word_at_other_tiers() -> None:
    """It changes nothing about a plan of the linux tier."""
    plain = policy()
    assert make_plan(plain, BASE, ROOT_V1, emulation=True) == make_plan(plain, BASE, ROOT_V1)


def test_a_workload_without_a_kernel() -> None:
    """No kernel is no machine, with the way to get one."""
    with pytest.raises(HostError, match="ringfence kernel fetch"):
        plan(workload=BASE)


def test_the_hosts_own_files_are_no_image() -> None:
    """The image "host" shows what the host has; a guest shares nothing."""
    with pytest.raises(MountError, match="cannot be the image of a microVM"):
        plan(workload=msgspec.structs.replace(HOST_VIEW, kernel=MACHINE.kernel))


@pytest.mark.parametrize(
    ("source", "words"),
    [
        (mount("socket"), "the socket '/srv/data' cannot be in a microVM"),
        (mount("fifo"), "the fifo '/srv/data' cannot be in a microVM"),
        (mount("file", "/data/file"), "the single file '/srv/data' cannot be mounted"),
        (mount(target="/da:ta"), "has a colon"),
    ],
)
def test_what_cannot_be_copied_in(source: Source, words: str) -> None:
    """Refused by its path, before anything exists."""
    with pytest.raises(MountError) as error:
        plan(workload=with_sources(source))
    assert words in str(error.value)


def test_mounts_beyond_the_places_for_disks() -> None:
    """QEMU's machine has eight places for devices, so that five mounts can be had; more are refused in our words."""
    made = plan(workload=with_sources(*(mount(target=f"/m/{number}") for number in range(5))))
    names = [disk["device"] for disk in machine(made)["disks"]]
    assert names == [f"vd{letter}" for letter in "abcdef"]
    with pytest.raises(MountError, match="6 mounts are too many for a microVM, which has 5"):
        plan(workload=with_sources(*(mount(target=f"/m/{number}") for number in range(6))))


def test_devices_are_the_guests_own() -> None:
    """A device that every sandbox has may be listed, and is no disk; another is refused as a device, not as a mount."""
    null = Source("/dev/null", "/dev/null", "/dev/null", "device", False, "c 1:3 rw")
    made = plan(workload=with_sources(null), devices=["/dev/null:rw"])
    assert [disk["device"] for disk in machine(made)["disks"]] == ["vda"]
    assert not [line for line in machine(made)["setup"] if "/dev/null" in line]
    assert "mount:/dev/null" not in {control["name"] for control in made["controls"]}
    fuse = Source("/dev/fuse", "/dev/fuse", "/dev/fuse", "device", False, "c 10:229 rw")
    with pytest.raises(NotEnforceable, match="cannot be passed into a microVM"):
        plan(workload=with_sources(fuse), devices=["/dev/fuse:rw"])


@pytest.mark.parametrize(
    ("field", "value", "words"),
    [
        ("limits__memory", "16MiB", "at least 32 MiB"),
        ("limits__memory", "33554431B", "at least 32 MiB"),
        ("limits__cpus", 0.01, "at least 0.05"),
    ],
)
def test_a_machine_has_a_least_size(field: str, value: object, words: str) -> None:
    """A guest's kernel does not begin in less; a tenth of a CPU is enough, and is what it gets."""
    with pytest.raises(RingfenceError) as error:
        plan(**{field: value})
    assert words in str(error.value)


@pytest.mark.parametrize(
    ("overrides", "field"),
    [
        ({"devices": ["/dev/fuse"]}, "devices"),
        ({"limits__swap": "1MiB"}, "limits.swap"),
        ({"lsm": "required"}, "lsm"),
        ({"network__mode": "egress"}, "network.mode"),
    ],
)
def test_what_a_machine_does_not_keep(overrides: dict[str, object], field: str) -> None:
    """Refused by the field's name."""
    with pytest.raises(NotEnforceable) as error:
        plan(**overrides)
    assert field in error.value.fields


# The machine


def test_the_machine_is_as_small_as_it_can_be() -> None:
    """Every device of QEMU's command line is one of those listed: a console, the link, randomness, one disk."""
    made = plan()
    argv = machine(made)["argv"]
    devices = [argv[place + 1].partition(",")[0] for place, word in enumerate(argv) if word == "-device"]
    assert devices == [
        "virtio-serial-device",
        "virtconsole",
        "virtserialport",
        "virtio-rng-device",
        "virtio-blk-device",
    ]
    assert machine(made)["devices"] == ["console", "serial link", "rng", "disk vda"]
    assert {"-nodefaults", "-no-user-config", "-no-reboot"} <= set(argv)
    assert option(made, "-machine").startswith("microvm,acpi=off,isa-serial=off,rtc=off")
    assert not [
        word for word in argv if re.search(r"net|usb|vga|pci|vsock|9p|virtiofs|monitor|qmp|vnc", word)
    ]


def test_the_vmm_has_a_filter_of_its_own_as_well() -> None:
    """QEMU denies itself what it does not need, below the ring's filter; the proof asks for both."""
    made = plan()
    assert option(made, "-sandbox") == (
        "on,obsolete=deny,elevateprivileges=deny,spawn=deny,resourcecontrol=deny"
    )
    asked = {control["name"]: control["asked"] for control in made["controls"]}
    assert (asked["vmm.seccomp.filters"], asked["bridge.seccomp.filters"]) == (2, 1)


def test_disks_are_descriptors_that_cannot_be_written_to() -> None:
    """No path of the host's is on QEMU's command line, and every disk is read-only to QEMU itself."""
    argv = machine(plan(workload=with_sources(mount())))["argv"]
    disks = [word for word in argv if word.startswith("driver=")]
    assert len(disks) == 2
    for place, disk in enumerate(disks):
        assert f"filename=/dev/fdset/{place + 1},read-only=on" in disk
    assert not [word for word in argv if "/srv/" in word or "/var/" in word]


def test_the_ring_shows_the_vmm_its_own_files_and_nothing_else() -> None:
    """Read-only binds of QEMU's files and the kernel; no directory of the host's."""
    made = plan(workload=with_sources(mount()))
    assert ROOT_V1_QEMU.vmm is not None
    binds = [op for op in made["stage"] if op["op"] == "bind"]
    expected = {*ROOT_V1_QEMU.vmm.files.values(), machine(made)["kernel_path"]}
    assert {op["source"] for op in binds} == expected
    assert all(op["read_only"] and op["kind"] == "file" for op in binds)
    assert made["oci"]["root"]["readonly"] is True
    kinds = {"tmpfs", "directory", "agent", "file", "bind", "initrd"}
    assert {op["op"] for op in made["stage"]} == kinds | {
        "node"
    }  # /dev/kvm, and nothing where it is emulated
    emulated = plan(ROOT_V1_EMULATED, emulation=True)
    assert {op["op"] for op in emulated["stage"]} == kinds


def test_the_ring_has_no_capability_and_all_namespaces() -> None:
    """Whatever the job is given inside, the VMM and the bridge have none of it."""
    made = plan(user="0:0", capabilities=["CAP_SYS_ADMIN", "CAP_NET_RAW"])
    process = made["oci"]["process"]
    assert set(map(tuple, process["capabilities"].values())) == {()}  # type: ignore[call-overload]
    assert process["noNewPrivileges"] is True
    kinds = [space["type"] for space in made["oci"]["linux"]["namespaces"]]
    assert sorted(kinds) == ["cgroup", "ipc", "mount", "network", "pid", "user", "uts"]
    assert setup(made, "caps") == [f"{1 << 21 | 1 << 13:x}"]
    assert setup(made, "nnp") == ["1"]


def test_hybrid_hosts_hide_the_other_hierarchy() -> None:
    """crun refuses to run where it sees cgroup v2 beside v1."""
    qemu = msgspec.structs.replace(ROOT_V1_QEMU, cgroup=HYBRID.cgroup)
    assert plan(qemu)["stage"][0] == {"op": "hide", "path": "/sys/fs/cgroup/unified"}


@pytest.mark.parametrize("memory_mib", [32, 48, 256, 4096])
def test_memory_is_the_jobs_its_kernels_and_the_vmms(memory_mib: int) -> None:
    """The job has what the policy gives; the machine more, for its kernel; the ring more, for QEMU: never less."""
    made = plan(limits__memory=f"{memory_mib}MiB")
    assert setup(made, "memory") == [str(memory_mib * MIB)]
    size = machine(made)["memory_bytes"]
    assert size >= memory_mib * MIB + 40 * MIB
    assert size % MIB == 0
    assert option(made, "-m") == f"{size // MIB}M"
    for accelerator, host in (("kvm", ROOT_V1_QEMU), ("tcg", ROOT_V1_EMULATED)):
        ring = plan(host, emulation=True, limits__memory=f"{memory_mib}MiB")["oci"]["linux"]["resources"]
        assert ring["memory"]["limit"] == size + OVERHEAD_BYTES[accelerator] == ring["memory"]["swap"]


def test_a_job_without_a_limit_has_a_machine_of_a_size() -> None:
    """A machine is never without end: a gibibyte for the job, which nobody limits further."""
    made = plan(limits__memory=None, limits__swap=None)
    assert setup(made, "memory") == ["max"]
    assert machine(made)["memory_bytes"] == guest_memory_bytes(policy(limits__memory="1GiB").limits)


@pytest.mark.parametrize(
    ("cpus", "count"), [(0.05, 1), (0.5, 1), (1, 1), (1.5, 2), (2, 2), (64, 4), (None, 1)]
)
def test_cpus_are_whole_ones_and_the_quota_is_the_rings(cpus: float | None, count: int) -> None:
    """As many as the quota could keep busy, never more than the host has; the quota comes at the gate."""
    made = plan(limits__cpus=cpus)
    assert machine(made)["cpus"] == count
    assert option(made, "-smp") == str(count)
    assert "quota" not in made["oci"]["linux"]["resources"]["cpu"]
    asked = {control["name"]: control["asked"] for control in made["controls"]}
    if cpus is not None:
        assert asked["cgroup.cpu_quota_us"] == int(cpus * asked["cgroup.cpu_period_us"])  # type: ignore[operator]


def test_processes_are_counted_in_the_guest() -> None:
    """The agent is one more than the policy gives the job; the ring has a number for the VMM's threads."""
    made = plan(limits__pids=20, limits__threads=20)
    assert setup(made, "pids") == ["21"]
    assert made["oci"]["linux"]["resources"]["pids"]["limit"] == 160
    assert setup(plan(limits__pids=None), "pids") == ["max"]


# The setup text


def test_the_setup_text_has_the_policy() -> None:
    """User, limits, root, shared memory, parameters of the kernel: each as the policy says."""
    made = plan(
        user="7:8",
        limits__disk="3MiB",
        limits__inodes=40,
        limits__shm="1MiB",
        limits__open_files=37,
        filesystem__sysfs=True,
        filesystem__root="writable",
        sysctls={"kernel.msgmax": "8192"},
    )
    assert (setup(made, "uid"), setup(made, "gid")) == (["7"], ["8"])
    assert setup(made, "overlay") == [f"{3 * MIB}:40"]
    assert setup(made, "shm") == [f"{MIB}:40"]
    assert setup(made, "sysfs") == ["1"]
    assert "7:37:37" in setup(made, "rlimit")
    assert setup(made, "sysctl") == ["kernel.msgmax=8192"]
    assert setup(plan(), "overlay") == ["ro"]
    assert setup(made, "root") == ["vda:erofs"]


def test_every_kernel_file_that_linux_hides_is_hidden() -> None:
    """The guest's kernel has secrets of its own; with a /sys there is more of them."""
    plain, with_sysfs = (set(setup(plan(filesystem__sysfs=sysfs), "mask")) for sysfs in (False, True))
    assert {"/proc/kcore", "/proc/kallsyms", "/proc/keys"} <= plain
    assert {"/sys/firmware"} <= with_sysfs - plain
    linux = make_plan(policy(), BASE, ROOT_V1)["oci"]["linux"]
    assert plain >= {path for path in linux["maskedPaths"] if path.startswith("/proc")}
    assert set(setup(plan(), "readonly")) == set(linux["readonlyPaths"])


def test_mounts_are_disks_in_an_order_that_nests() -> None:
    """What lies within another mount is mounted after it, whatever the order they were given in."""
    made = plan(workload=with_sources(mount(target="/data/deep/er"), mount(target="/data")))
    assert [(disk["device"], disk["target"]) for disk in machine(made)["disks"]] == [
        ("vda", "/"),
        ("vdb", "/data"),
        ("vdc", "/data/deep/er"),
    ]
    assert setup(made, "disk") == ["vdb:erofs:/data:ro", "vdc:erofs:/data/deep/er:ro"]
    asked = {control["name"]: control["asked"] for control in made["controls"]}
    assert asked["mount:/data"] == asked["mount:/data/deep/er"] == "erofs ro,nosuid,nodev"


def test_mount_points_in_a_tmpfs_are_made_in_it() -> None:
    """What is mounted below /tmp or /work gets its directory there, after the tmpfs and before the disk."""
    lines = machine(plan(workload=with_sources(mount(target="/work/a"), mount(target="/tmp/b/c"))))["setup"]
    order = [
        lines.index(line)
        for line in (
            next(line for line in lines if line.startswith("tmpfs=/tmp:")),
            "dir=/tmp/b/c:755:0:0",
            "disk=vdc:erofs:/tmp/b/c:ro",
        )
    ]
    assert order == sorted(order)
    assert lines.index("dir=/work/a:755:0:0") < lines.index("disk=vdb:erofs:/work/a:ro")


def test_a_directory_as_the_image_is_copied() -> None:
    """Without a disk image of the store's the first layer is made one at each start."""
    made = plan(workload=msgspec.structs.replace(MACHINE, disk=""))
    (disk,) = machine(made)["disks"]
    assert (disk["kind"], disk["source"]) == ("directory", MACHINE.layers[0])


def test_a_kernel_that_needs_more_gets_it() -> None:
    """A kernel with ACPI and modules, such as Debian's, has them; its own words are on its command line."""
    assert MACHINE.kernel is not None
    kernel = msgspec.structs.replace(
        MACHINE.kernel, acpi=True, cmdline="tsc_early_khz=2000000", modules=("/k/virtio.ko", "/k/erofs.ko")
    )
    made = plan(workload=msgspec.structs.replace(MACHINE, kernel=kernel))
    assert option(made, "-machine").startswith("microvm,acpi=on,isa-serial=off,rtc=on")
    assert option(made, "-append").endswith(" console=hvc0 tsc_early_khz=2000000")
    (initrd,) = [op for op in made["stage"] if op["op"] == "initrd"]
    assert initrd["modules"] == ["/k/virtio.ko", "/k/erofs.ko"]


def test_controls_of_a_host_with_cgroup_v2() -> None:
    """There the devices cgroup is a program that nobody can read: nothing is claimed of it."""
    qemu = msgspec.structs.replace(ROOT_V1_QEMU, cgroup=ROOT_V2.cgroup)
    names = {control["name"] for control in plan(qemu)["controls"]}
    assert "cgroup.devices" not in names
    assert {"vmm.cgroup.membership", "bridge.cgroup.membership", "cgroup.memory_bytes"} <= names


def test_the_same_inputs_make_the_same_plan() -> None:
    """Byte for byte: nothing of this moment is in a plan."""
    assert plan() == plan()
