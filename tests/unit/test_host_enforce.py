"""The enforceability table: complete, honest about what is missing, and the source of refusals."""

import msgspec
import pytest

from ringfence.host.checks import checks, ready
from ringfence.host.enforce import (
    FIELDS,
    TIERS,
    Enforcement,
    Tier,
    asks,
    enforcement,
    leaves,
    matrix,
    refusals,
    writes_to_disk,
)
from ringfence.host.facts import (
    BlockDevice,
    CgroupFacts,
    GvisorFacts,
    Host,
    IdRange,
    Lsm,
    Runtime,
    SubordinateIds,
    UserNamespaces,
    VmmFacts,
)
from ringfence.host.sentry import lack
from ringfence.policy.load import load, override

V1 = ("blkio", "cpu", "cpuacct", "cpuset", "devices", "freezer", "memory", "pids")
CGROUP_FIELDS = ("limits.memory", "limits.cpus", "limits.cpu_weight", "limits.cpuset", "limits.pids")

ROOT_V1 = Host(
    kernel_release="6.1.0",
    kernel=(6, 1),
    capabilities=("CAP_SYS_ADMIN",),
    cpus="0-1",
    swap_bytes=0,
    hard_limits={"nofile": 20000, "nproc": 96364, "stack": None, "fsize": None},
    cgroup=CgroupFacts(
        version="v1",
        mounts={name: f"/sys/fs/cgroup/{name}" for name in V1},
        controllers=V1,
        writable=True,
        swap_accounting=True,
        io_throttle=True,
    ),
    userns=UserNamespaces(maximum=1000, allowed=True),
    namespaces=("cgroup", "ipc", "mnt", "net", "pid", "user", "uts"),
    seccomp_filter=True,
    runtimes={"crun": Runtime(path="/usr/bin/crun", version=(1, 8, 1), version_text="crun version 1.8.1")},
    smt=False,
    ksm=False,
    vulnerabilities={"meltdown": "Not affected", "spectre_v1": "Mitigation: barriers"},
    pid_max=32768,
    threads_max=100000,
    block=BlockDevice(number="254:0", name="vda"),
    state_dir="/var/lib/ringfence",
    run_dir="/run/ringfence",
)
ROOT_V2 = msgspec.structs.replace(
    ROOT_V1,
    cgroup=CgroupFacts(
        version="v2",
        unified="/sys/fs/cgroup",
        controllers=("cpu", "cpuset", "io", "memory", "pids"),
        writable=True,
        swap_accounting=True,
        io_throttle=True,
    ),
)
USER = msgspec.structs.replace(
    ROOT_V2,
    euid=1000,
    capabilities=(),
    cgroup=CgroupFacts(version="v2", unified="/sys/fs/cgroup"),
    ids=SubordinateIds(
        uids=(IdRange(100000, 65536),),
        gids=(IdRange(100000, 65536),),
        newuidmap="/usr/bin/newuidmap",
        newgidmap="/usr/bin/newgidmap",
    ),
)
GVISOR_V1, GVISOR_V2 = (
    msgspec.structs.replace(
        host,
        runtimes=host.runtimes | {"runsc": Runtime(path="/usr/bin/runsc", version=(20240729, 0, 0))},
        gvisor=GvisorFacts(platforms=("systrap",), reasons={"kvm": "KVM is absent"}),
    )
    for host in (ROOT_V1, ROOT_V2)
)
MICROVM_V1, MICROVM_V2 = (
    msgspec.structs.replace(
        host,
        runtimes=host.runtimes | {"qemu-system-x86_64": Runtime(path="/usr/bin/qemu-system-x86_64")},
        vmm=VmmFacts(files={"/usr/bin/qemu-system-x86_64": "/usr/bin/qemu-system-x86_64"}),
        kvm="works",
    )
    for host in (ROOT_V1, ROOT_V2)
)


def with_cgroup(host: Host, **changes: object) -> Host:
    """Return `host` with some facts about its control groups changed."""
    return msgspec.structs.replace(host, cgroup=msgspec.structs.replace(host.cgroup, **changes))


def column(host: Host, tier: Tier) -> dict[str, Enforcement]:
    """Return one column of the table, by field."""
    return {cell.field: cell for cell in matrix(host) if cell.tier == tier}


@pytest.mark.parametrize("tier", TIERS)
def test_every_field_of_the_policy_has_a_cell(tier: Tier) -> None:
    """No field of the policy model is left without an answer, and the table has no field that is none."""
    fields = leaves(load("untrusted"))
    assert set(FIELDS) == set(fields)
    for field, value in fields.items():
        cell = enforcement(field, tier, ROOT_V1, value=value)
        assert (cell.field, cell.tier) == (field, tier)
        assert bool(cell.mechanism) == cell.enforced == (not cell.reason)
        assert cell.enforced or cell.hint


@pytest.mark.parametrize("preset", ["trusted", "untrusted", "hostile", "ci", "service", "tenants"])
@pytest.mark.parametrize("host", [ROOT_V1, ROOT_V2], ids=["v1", "v2"])
def test_root_can_enforce_every_preset(preset: str, host: Host) -> None:
    """On an ordinary host root needs no --allow-unenforced for any preset."""
    assert refusals(load(preset), "linux", host) == []


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"runtimes": {}}, "QEMU is not installed"),
        ({"kvm": "absent"}, "KVM: /dev/kvm is absent"),
        ({"kvm": "unusable", "kvm_reason": "it hangs"}, "KVM: it hangs"),
        ({"vmm": VmmFacts(reason="no firmware")}, "no firmware"),
    ],
)
def test_a_host_that_makes_no_machines_enforces_nothing_by_them(
    changes: dict[str, object], reason: str
) -> None:
    """Without QEMU, or KVM that works, every field says so, and none seems to be enforced."""
    cells = column(msgspec.structs.replace(MICROVM_V1, **changes), "microvm")
    assert list(cells) == list(FIELDS)
    assert {cell.reason for cell in cells.values()} == {reason}
    assert all(cell.hint and not cell.enforced for cell in cells.values())


@pytest.mark.parametrize("host", [MICROVM_V1, MICROVM_V2], ids=["v1", "v2"])
@pytest.mark.parametrize("preset", ["trusted", "untrusted", "hostile", "ci", "service", "tenants"])
def test_microvms_can_enforce_every_preset(preset: str, host: Host) -> None:
    """On an ordinary host root needs no --allow-unenforced for any preset at the microvm tier either."""
    assert refusals(load(preset), "microvm", host) == []


def test_a_microvm_says_who_keeps_a_field() -> None:
    """What the sandbox is held to is kept by the guest's kernel, around the machine, or both."""
    outside = ("isolation", "floor", "image.", "host.", "limits.time", "limits.output")
    told = {field: cell.mechanism for field, cell in column(MICROVM_V2, "microvm").items() if cell.enforced}
    for field, mechanism in told.items():
        if not field.startswith(outside):
            assert mechanism.startswith(("in the guest: ", "around the machine: ")), field
    for field in ("user", "capabilities", "seccomp", "network.mode", "limits.memory"):
        assert "in the guest: " in told[field], field
        assert "around the machine: " in told[field], field


def test_a_microvm_refuses_what_it_cannot_keep() -> None:
    """Devices of the host, swap, networks and a label of the job's own are refused, never passed over in silence."""
    cases: list[tuple[dict[str, object], str]] = [
        ({"devices": ["/dev/null:rw", "/dev/fuse:rw"]}, "devices"),
        ({"limits.swap": "1MiB"}, "limits.swap"),
        ({"lsm": "required"}, "lsm"),
        ({"network.mode": "egress"}, "network.mode"),
    ]
    for changes, field in cases:
        refused = refusals(override(load("untrusted"), changes), "microvm", MICROVM_V1)
        assert [cell.field for cell in refused] == [field]
        assert refused[0].hint
    nothing_of_the_host = {"devices": ["/dev/null:rw"], "lsm": "default", "sysctls": {"kernel.msgmax": "9"}}
    assert refusals(override(load("untrusted"), nothing_of_the_host), "microvm", MICROVM_V1) == []


def test_a_microvm_needs_the_control_groups_of_its_ring() -> None:
    """CPU time, memory and I/O are kept around the machine, so a user without groups of his own is told so."""
    refused = {cell.field: cell for cell in refusals(load("untrusted"), "microvm", USER)}
    assert {"limits.memory", "limits.cpus", "limits.io.read"} <= set(refused)
    assert all("Delegate=yes" in cell.hint for cell in refused.values())


@pytest.mark.parametrize("host", [GVISOR_V1, GVISOR_V2], ids=["v1", "v2"])
@pytest.mark.parametrize("preset", ["trusted", "untrusted", "hostile", "ci", "service", "tenants"])
def test_gvisor_can_enforce_every_preset(preset: str, host: Host) -> None:
    """On an ordinary host root needs no --allow-unenforced for any preset at the gvisor tier either."""
    assert refusals(load(preset), "gvisor", host) == []


def test_gvisor_says_who_keeps_a_field() -> None:
    """What the sandbox is held to at the gvisor tier is kept by gVisor itself, around it, or both."""
    outside = ("isolation", "floor", "image.", "host.", "limits.time", "limits.output")
    for field, cell in column(GVISOR_V2, "gvisor").items():
        if cell.enforced and not field.startswith(outside):
            assert cell.mechanism.startswith(("gVisor itself: ", "around gVisor: ")), field
    told = {field: cell.mechanism for field, cell in column(GVISOR_V2, "gvisor").items()}
    for field in ("user", "capabilities", "seccomp", "network.mode", "limits.pids"):
        assert "gVisor itself: " in told[field], field
        assert "around gVisor: " in told[field], field


def test_gvisor_refuses_what_it_cannot_keep() -> None:
    """Host devices, kernel parameters and a label of the job's own are refused, never passed over in silence."""
    cases: list[tuple[dict[str, object], str]] = [
        ({"devices": ["/dev/null:rw", "/dev/fuse:rw"]}, "devices"),
        ({"sysctls": {"net.ipv4.ip_unprivileged_port_start": "0"}}, "sysctls"),
        ({"lsm": "required"}, "lsm"),
        ({"network.mode": "egress"}, "network.mode"),
    ]
    for changes, field in cases:
        refused = refusals(override(load("untrusted"), changes), "gvisor", GVISOR_V1)
        assert [cell.field for cell in refused] == [field]
        assert refused[0].hint
    nothing_of_the_host = {"devices": ["/dev/null:rw"], "lsm": "default", "sysctls": {}}
    assert refusals(override(load("untrusted"), nothing_of_the_host), "gvisor", GVISOR_V1) == []


@pytest.mark.parametrize(
    ("capability", "fields"),
    [
        ("SYS_ADMIN", ["limits.pids", "limits.threads"]),
        ("SYS_RESOURCE", ["limits.pids", "limits.threads"]),
        ("SETUID", ["limits.pids"]),
        ("NET_BIND_SERVICE", []),
    ],
)
def test_capabilities_that_lift_the_count_of_processes_in_gvisor(capability: str, fields: list[str]) -> None:
    """gVisor counts by RLIMIT_NPROC alone: with a capability that is above it, the limit is refused, not claimed."""
    policy = override(load("untrusted"), {"capabilities": [capability]})
    assert [cell.field for cell in refusals(policy, "gvisor", GVISOR_V1)] == fields
    assert refusals(policy, "linux", GVISOR_V1) == []


def test_rlimits_of_gvisor_are_its_own() -> None:
    """Hard limits of the launcher bind the linux tier; inside gVisor they are limits of another kernel."""
    policy = override(load("untrusted"), {"limits.open_files": 20001})
    assert [cell.field for cell in refusals(policy, "linux", GVISOR_V1)] == ["limits.open_files"]
    assert refusals(policy, "gvisor", GVISOR_V1) == []


def test_gvisor_needs_the_control_groups_of_its_ring() -> None:
    """What cgroups keep on the linux tier is refused without them at the gvisor tier too, with the same hint."""
    refused = {cell.field: cell for cell in refusals(load("untrusted"), "gvisor", USER)}
    assert set(CGROUP_FIELDS) - {"limits.cpuset"} <= set(refused)
    assert all("Delegate=yes" in cell.hint for cell in refused.values())


@pytest.mark.parametrize(
    ("changes", "word"),
    [
        ({"runtimes": ROOT_V1.runtimes}, "not installed"),
        ({"gvisor": GvisorFacts(missing=("--pass-fd",))}, "--pass-fd"),
        ({"gvisor": GvisorFacts(reasons={"systrap": "it broke"})}, "systrap: it broke"),
    ],
)
def test_a_gvisor_that_cannot_be_used_is_told(changes: dict[str, object], word: str) -> None:
    """Without a runsc, flags or a platform the matrix says so for each field, and the tier is not ready."""
    host = msgspec.structs.replace(GVISOR_V1, **changes)
    told = lack(host)
    assert told is not None
    assert word in told.reason
    assert told.hint
    assert {cell.reason for cell in column(host, "gvisor").values()} == {told.reason}
    assert not ready(checks(host, "gvisor"))
    assert ready(checks(host, "linux"))


def test_gvisor_is_ready_only_after_a_trial() -> None:
    """A runsc that is installed but was not tried is never taken for one that works."""
    assert lack(GVISOR_V1) is None
    assert ready(checks(GVISOR_V1, "gvisor"))
    assert not ready(checks(msgspec.structs.replace(GVISOR_V1, gvisor=None), "gvisor"))
    slow = msgspec.structs.replace(GVISOR_V1, gvisor=GvisorFacts(platforms=("ptrace",)))
    assert [check.level for check in checks(slow, "gvisor") if check.name == "gVisor platform"] == ["warn"]
    # The ring is a container of the linux tier.
    assert not ready(checks(msgspec.structs.replace(GVISOR_V1, seccomp_filter=False), "gvisor"))


def test_swap_zero_is_asked_for() -> None:
    """A limit of 0 is a limit: it must not be taken for "nothing asked"."""
    assert asks("limits.swap", 0)
    assert asks("limits.time", 0.0)
    assert not asks("limits.time", None)
    assert not asks("sysctls", {})
    assert not asks("no_new_privileges", False)


def test_swap_without_accounting() -> None:
    """Without swap accounting the swap limit holds only on a host that is known to have no swap."""
    blind = with_cgroup(ROOT_V1, swap_accounting=False)
    assert enforcement("limits.swap", "linux", blind).mechanism == "the host has no swap"
    for swap in (1 << 30, None):
        host = msgspec.structs.replace(blind, swap_bytes=swap)
        assert [cell.field for cell in refusals(load("untrusted"), "linux", host)] == ["limits.swap"]


def test_buffered_writes_on_v1_are_not_throttled() -> None:
    """v1 holds no policy with a writable disk to its write limits; v2 does; without a disk none is needed."""
    policy = load("untrusted")
    mount = {"source": "/srv", "target": "/data", "mode": "rw"}
    writer = override(policy, {"filesystem.mounts": [mount]})
    reader = override(policy, {"filesystem.mounts": [{**mount, "mode": "ro"}]})
    assert writes_to_disk(writer)
    refused = [cell.field for cell in refusals(writer, "linux", ROOT_V1)]
    assert refused == ["limits.io.write", "limits.io.write_iops"]
    assert refusals(writer, "linux", ROOT_V1, frozenset(refused)) == []
    assert refusals(writer, "linux", ROOT_V2) == []
    assert refusals(reader, "linux", ROOT_V1) == []
    cell = enforcement("limits.io.write", "linux", ROOT_V1, writes_to_disk=False)
    assert cell.mechanism == "no writable disk-backed mount"


def test_io_limits_need_a_known_disk_and_throttling() -> None:
    """A limit that would be set on no device is refused."""
    for host in (
        msgspec.structs.replace(ROOT_V2, block=None),
        with_cgroup(ROOT_V2, io_throttle=False),
        with_cgroup(ROOT_V2, controllers=("cpu", "memory", "pids", "cpuset")),
    ):
        refused = [cell.field for cell in refusals(load("untrusted"), "linux", host)]
        assert refused == ["limits.io.read", "limits.io.read_iops"]


def test_a_user_without_delegation_cannot_limit() -> None:
    """Every cgroup field is refused to a user without a delegated group, with the command that gets one."""
    cells = {cell.field: cell for cell in refusals(load("untrusted"), "linux", USER)}
    assert set(CGROUP_FIELDS) - {"limits.cpuset"} <= set(cells)
    assert all("Delegate=yes" in cell.hint for cell in cells.values())
    delegated = with_cgroup(
        USER,
        controllers=("cpu", "cpuset", "io", "memory", "pids"),
        writable=True,
        delegated=True,
        swap_accounting=True,
        io_throttle=True,
    )
    assert refusals(load("untrusted"), "linux", delegated) == []
    partly = with_cgroup(delegated, controllers=("io", "memory", "pids"))
    refused = [cell.field for cell in refusals(load("untrusted"), "linux", partly)]
    assert refused == ["limits.cpus", "limits.cpu_weight"]


@pytest.mark.parametrize("version", ["v1", "hybrid"])
def test_v1_is_never_delegated(version: str) -> None:
    """A user on cgroup v1 is told that another host or root is needed, not systemd-run."""
    user = with_cgroup(USER, version=version)
    cell = enforcement("limits.memory", "linux", user)
    assert not cell.enforced
    assert "Delegate" not in cell.hint


def test_a_user_without_id_ranges_has_no_sandbox_user() -> None:
    """Without a subordinate range, or its helpers, neither the user nor RLIMIT_NPROC is the sandbox's own."""
    for ids in (SubordinateIds(), msgspec.structs.replace(USER.ids, newuidmap="")):
        host = msgspec.structs.replace(USER, ids=ids)
        assert not enforcement("user", "linux", host).enforced
        assert not enforcement("limits.threads", "linux", host, value=64).enforced
    assert enforcement("user", "linux", USER).enforced


def test_rlimits_above_the_hard_limit_are_refused() -> None:
    """A value that the kernel would refuse to set is refused before anything starts."""
    for field, most in (("limits.open_files", 20000), ("limits.threads", 96364)):
        assert enforcement(field, "linux", ROOT_V1, value=most).enforced
        over = enforcement(field, "linux", ROOT_V1, value=most + 1)
        assert not over.enforced
        assert str(most) in over.reason


def test_cpus_that_are_not_there_are_refused() -> None:
    """A cpuset must name CPUs that are online."""
    assert enforcement("limits.cpuset", "linux", ROOT_V1, value="0-1").enforced
    assert "CPU 2" in enforcement("limits.cpuset", "linux", ROOT_V1, value="1-2").reason


def test_host_rules_refuse_what_they_cannot_see() -> None:
    """SMT, KSM and open CPU flaws are refused when present and when unknown, only if the policy says so."""
    cases: list[tuple[str, str, dict[str, object]]] = [
        ("host.smt", "refused", {"smt": True}),
        ("host.smt", "refused", {"smt": None}),
        ("host.ksm", "refused", {"ksm": True}),
        ("host.ksm", "refused", {"ksm": None}),
        ("host.cpu_mitigations", "required", {"vulnerabilities": {}}),
        ("host.cpu_mitigations", "required", {"vulnerabilities": {"mds": "Vulnerable: no microcode"}}),
        ("host.cpu_mitigations", "required", {"vulnerabilities": {"mds": "Mitigation: x; SMT vulnerable"}}),
    ]
    for field, value, facts in cases:
        host = msgspec.structs.replace(ROOT_V1, **facts)
        assert not enforcement(field, "linux", host, value=value).enforced, (field, facts)
        assert refusals(load("untrusted"), "linux", host) == []
        assert [cell.field for cell in refusals(load("hostile"), "linux", host)] == [field]


def test_an_empty_host_enforces_only_what_needs_nothing() -> None:
    """Absent facts never mean "fine": a Host without facts can hold hardly anything."""
    nothing = Host()
    enforced = {cell.field for cell in matrix(nothing) if cell.enforced}
    assert enforced <= {
        "isolation",
        "floor",
        "capabilities",
        "no_new_privileges",
        "devices",
        "limits.stack",
        "limits.open_files",
        "limits.file_size",
        "limits.time",
        "limits.output",
        "image.digest_required",
        "image.allowed_registries",
        "image.signatures",
    }
    asked = {cell.field for cell in refusals(load("untrusted"), "linux", nothing)}
    assert {"user", "seccomp", "limits.memory", "limits.stack", "limits.open_files"} <= asked
    assert not ready(checks(nothing))


def test_a_security_module_is_needed_only_when_required() -> None:
    """lsm: default goes without one, lsm: required is refused until the profile is loaded."""
    required = override(load("untrusted"), {"lsm": "required"})
    assert [cell.field for cell in refusals(required, "linux", ROOT_V1)] == ["lsm"]
    off = msgspec.structs.replace(ROOT_V1, lsm=Lsm(apparmor=True))
    assert [cell.field for cell in refusals(required, "linux", off)] == ["lsm"]
    loaded = msgspec.structs.replace(ROOT_V1, lsm=Lsm(apparmor=True, apparmor_profile=True))
    assert refusals(required, "linux", loaded) == []


def test_egress_is_refused_until_it_is_built() -> None:
    """A policy that opens the network is refused field by field, never run without rules."""
    open_policy = override(
        load("untrusted"), {"network.mode": "egress", "network.allow": ["api.example.com:443"]}
    )
    refused = [cell.field for cell in refusals(open_policy, "linux", ROOT_V1)]
    assert refused == ["network.mode", "network.allow"]


def test_the_checks_of_a_good_host_and_of_worse_ones() -> None:
    """A host is ready exactly when nothing the tier needs is missing; weaknesses are warnings."""
    assert ready(checks(ROOT_V1))
    assert ready(checks(ROOT_V2))
    weak = msgspec.structs.replace(ROOT_V1, smt=True, sysctls={"kernel.core_pattern": "|/usr/bin/handler %P"})
    by_name = {check.name: check for check in checks(weak)}
    assert ready(tuple(by_name.values()))
    assert by_name["SMT"].level == by_name["kernel.core_pattern"].level == "warn"
    worse: list[dict[str, object]] = [
        {"runtimes": {}},
        {"namespaces": ("mnt",)},
        {"seccomp_filter": False},
        {"cgroup": CgroupFacts()},
        {"userns": UserNamespaces(reason="user.max_user_namespaces is 0")},
        {"kernel": (4, 19)},
        {"run_dir": ""},
    ]
    for facts in worse:
        found = checks(msgspec.structs.replace(ROOT_V1, **facts))
        assert not ready(found), facts
        assert all(check.advice for check in found if check.level != "ok")
    assert not ready(checks(ROOT_V1, "gvisor"))
