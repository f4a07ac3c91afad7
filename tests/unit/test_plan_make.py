"""make_plan: deterministic, complete, and a refusal rather than a weaker sandbox."""

import json

import msgspec
import plan_inputs as inputs
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ringfence.errors import HostError, MountError, NotEnforceable, PolicyError
from ringfence.host.enforce import leaves
from ringfence.host.facts import Host, Lsm, SubordinateIds, UserNamespaces
from ringfence.plan.describe import describe
from ringfence.plan.document import Plan
from ringfence.plan.make import choose_tier, make_plan, plan_digest
from ringfence.policy.fields import FIELDS
from ringfence.policy.load import load, override
from ringfence.policy.model import Policy

replace = msgspec.structs.replace

# Another value for every field that a plan can show, on a host that can do everything. A path is a profile's.
CHANGED: dict[str, object] = {
    "user": "7:8",
    "capabilities": ["NET_BIND_SERVICE"],
    "no_new_privileges": False,
    "seccomp": "strict",
    "lsm": "none",
    "filesystem.root": "writable",
    "filesystem.tmp": "32MiB",
    "filesystem.sysfs": True,
    "filesystem.mounts": [{"source": "/srv/data", "target": "/work"}],
    "devices": ["/dev/fuse"],
    "limits.memory": "128MiB",
    "limits.swap": "64MiB",
    "limits.cpus": 2,
    "limits.cpu_weight": 50,
    "limits.cpuset": "0",
    "limits.pids": 100,
    "limits.stack": "4MiB",
    "limits.threads": 32,
    "limits.open_files": 64,
    "limits.file_size": "1MiB",
    "limits.disk": "16MiB",
    "limits.inodes": 512,
    "limits.shm": "1MiB",
    "limits.io.read": "1MiB/s",
    "limits.io.read_iops": 10,
    "limits.time": "5s",
    "limits.output": "1MiB",
    "sysctls": {"kernel.msgmax": "4096"},
}
# Decided before there is a plan, or refused as long as nothing is built for it.
NOT_IN_A_PLAN = {
    "isolation": "both name the linux tier here",
    "floor": "a higher one is refused",
    "network.mode": "anything but none is refused",
    "network.allow": "refused",
    "network.publish": "refused",
    "secrets": "refused",
    "image.digest_required": "looked at before a plan is made",
    "image.allowed_registries": "looked at before a plan is made",
    "image.signatures": "looked at before a plan is made, and by skopeo",
    "host.smt": "looked at before a plan is made",
    "host.ksm": "looked at before a plan is made",
    "host.cpu_mitigations": "looked at before a plan is made",
    # No sandbox of cgroup v1 that writes to a disk is throttled; without one there is nothing to throttle.
    "limits.io.write": "only of a policy with a writable mount",
    "limits.io.write_iops": "only of a policy with a writable mount",
}
LABELLED = replace(
    inputs.ROOT_V1, lsm=Lsm(active=("apparmor",), apparmor=True, apparmor_profile=True), swap_bytes=1 << 30
)


def without_digests(plan: Plan) -> dict[str, object]:
    return {key: value for key, value in plan.items() if key not in ("digest", "policy_digest")}


def test_every_field_of_the_policy_is_accounted_for() -> None:
    """A new field is in one list or the other, so that none is forgotten on the way to the plan."""
    assert set(CHANGED) | set(NOT_IN_A_PLAN) == set(FIELDS)
    assert not set(CHANGED) & set(NOT_IN_A_PLAN)
    assert set(FIELDS) == set(leaves(inputs.policy()))


@pytest.mark.parametrize("field", CHANGED)
def test_every_field_changes_what_is_done(field: str) -> None:
    """Another value gives another plan, apart from the digests: no field is read and ignored."""
    before = make_plan(inputs.policy(), inputs.BASE, LABELLED)
    after = make_plan(override(inputs.policy(), {field: CHANGED[field]}), inputs.BASE, LABELLED)
    if field in ("filesystem.mounts", "devices"):
        workload = replace(
            inputs.BASE, sources=inputs.SOURCES[-1:] if field == "devices" else inputs.SOURCES[:1]
        )
        after = make_plan(override(inputs.policy(), {field: CHANGED[field]}), workload, LABELLED)
    assert without_digests(before) != without_digests(after)
    assert before["digest"] != after["digest"]
    assert before["policy_digest"] != after["policy_digest"]


@pytest.mark.parametrize("field", sorted(set(CHANGED) - {"lsm", "limits.time", "limits.output"}))
def test_every_enforced_field_has_a_control_or_stands_in_the_spec(field: str) -> None:
    """What a field changes shows in what the proof asks for, or in the seccomp filter, whose count it asks for."""
    workload = inputs.BASE
    if field in ("filesystem.mounts", "devices"):
        workload = replace(
            workload, sources=inputs.SOURCES[-1:] if field == "devices" else inputs.SOURCES[:1]
        )
    before = make_plan(inputs.policy(), inputs.BASE, LABELLED)
    after = make_plan(override(inputs.policy(), {field: CHANGED[field]}), workload, LABELLED)
    if field == "seccomp":
        assert before["oci"]["linux"]["seccomp"] != after["oci"]["linux"]["seccomp"]
    else:
        assert before["controls"] != after["controls"]


@pytest.mark.parametrize("field", ["limits.io.write", "limits.io.write_iops"])
def test_write_throttles_are_in_the_plan_of_a_policy_that_writes_to_a_disk(field: str) -> None:
    """On cgroup v2 the writes of a writable mount are throttled as asked."""
    policy = inputs.policy(filesystem__mounts=[inputs.MOUNTS[2]])
    workload = replace(inputs.BASE, sources=inputs.SOURCES[2:3])
    before = make_plan(policy, workload, inputs.ROOT_V2)
    after = make_plan(
        override(policy, {field: "1KiB/s" if field == "limits.io.write" else 7}), workload, inputs.ROOT_V2
    )
    assert before["oci"]["linux"]["resources"]["blockIO"] != after["oci"]["linux"]["resources"]["blockIO"]
    assert before["controls"] != after["controls"]


HOST_CHANGES: dict[str, Host] = {
    "boot": replace(inputs.ROOT_V1, boot_id="another"),
    "cgroup": inputs.HYBRID,
    "runtime": replace(
        inputs.ROOT_V1, runtimes={"crun": replace(inputs.CRUN, version_text="crun version 1.21")}
    ),
}


@pytest.mark.parametrize("change", HOST_CHANGES)
def test_another_host_gives_another_digest(change: str) -> None:
    """A plan is of one host; its digest says so."""
    before = make_plan(inputs.policy(), inputs.BASE, inputs.ROOT_V1)
    after = make_plan(inputs.policy(), inputs.BASE, HOST_CHANGES[change])
    assert before["digest"] != after["digest"]


def test_another_workload_gives_another_digest() -> None:
    """The image's identity, its environment and its mounts are part of what is run."""
    plans = [
        make_plan(inputs.policy(), workload, inputs.ROOT_V1)
        for workload in (
            inputs.BASE,
            replace(inputs.BASE, image_digest="sha256:" + "d" * 64),
            replace(inputs.BASE, env=("PATH=/bin",)),
            replace(inputs.BASE, layers=("/srv/root",)),
            replace(inputs.BASE, layers=("/srv/root", "/srv/more")),
            inputs.HOST_VIEW,
        )
    ]
    assert len({plan["digest"] for plan in plans}) == len(plans)


def test_the_digest_is_of_everything_but_itself() -> None:
    """It can be computed again from the plan that is kept or printed, and any change of it shows."""
    plan = make_plan(inputs.policy(), inputs.BASE, inputs.ROOT_V1)
    read_back: Plan = json.loads(json.dumps(plan))
    assert plan_digest(read_back) == plan["digest"]
    read_back["oci"]["process"]["noNewPrivileges"] = False
    assert plan_digest(read_back) != plan["digest"]


SIZES = st.integers(1 << 20, 1 << 50)
OVERRIDES = st.fixed_dictionaries(
    {},
    optional={
        "limits.memory": SIZES,
        "limits.cpus": st.floats(0.01, 4).map(lambda value: round(value, 3)),
        "limits.cpu_weight": st.integers(1, 10_000),
        "limits.pids": st.integers(64, 4_000_000),
        "limits.open_files": st.integers(8, 20_000),
        "limits.disk": SIZES,
        "limits.inodes": st.integers(16, 2**31 - 1),
        "filesystem.root": st.sampled_from(["read-only", "writable"]),
        "filesystem.sysfs": st.booleans(),
        "capabilities": st.lists(st.sampled_from(["CHOWN", "NET_RAW", "SYS_PTRACE"])),
        "seccomp": st.sampled_from(["default", "strict"]),
        "user": st.tuples(st.integers(1, 4095), st.integers(1, 4095)).map(lambda ids: f"{ids[0]}:{ids[1]}"),
    },
)


@settings(max_examples=60, deadline=None)
@given(overrides=OVERRIDES, host=st.sampled_from([inputs.ROOT_V1, inputs.ROOT_V2, inputs.USER_V2]))
def test_the_same_inputs_give_the_same_bytes(overrides: dict[str, object], host: Host) -> None:
    """Twice the same, plain JSON that survives being kept, and whole: every limit is asked for in full."""
    policy = override(inputs.policy(), overrides)
    first, again = (make_plan(policy, inputs.BASE, host) for _ in range(2))
    assert json.dumps(first) == json.dumps(again)
    assert json.loads(json.dumps(first)) == first
    oci, asked = first["oci"], {control["name"]: control["asked"] for control in first["controls"]}
    limit = oci["linux"]["resources"]["memory"]["limit"]
    assert policy.limits.memory_bytes is not None
    assert policy.limits.memory_bytes - host.page_bytes < limit <= policy.limits.memory_bytes
    assert asked["cgroup.memory_bytes"] == limit
    assert asked["cgroup.cpu_quota_us"] == oci["linux"]["resources"]["cpu"]["quota"] >= 1000
    assert set(oci["process"]["capabilities"]["bounding"]) == set(policy.capabilities)


def test_weight_on_cgroup_v2_is_the_kernels_own_file() -> None:
    """OCI shares are of v1, and a runtime's conversion of them loses precision: v2 gets cpu.weight itself."""
    plan = make_plan(inputs.policy(limits__cpu_weight=42), inputs.BASE, inputs.ROOT_V2)
    resources = plan["oci"]["linux"]["resources"]
    assert resources["unified"] == {"cpu.weight": "42"}
    assert "shares" not in resources["cpu"]
    old = make_plan(inputs.policy(limits__cpu_weight=42), inputs.BASE, inputs.ROOT_V1)
    assert "unified" not in old["oci"]["linux"]["resources"]
    assert old["oci"]["linux"]["resources"]["cpu"]["shares"] > 2


# Refusals.


def test_a_floor_above_the_linux_tier_is_never_undercut() -> None:
    """A stronger boundary that is not there is never replaced by a weaker one."""
    with pytest.raises(HostError, match="QEMU is not installed"):
        make_plan(inputs.policy("tenants"), inputs.BASE, inputs.ROOT_V1)
    with pytest.raises(HostError, match="runsc is not installed"):
        make_plan(inputs.policy("hostile"), inputs.BASE, inputs.ROOT_V1)
    assert choose_tier(inputs.policy("hostile")) == "gvisor"
    assert choose_tier(inputs.policy("tenants")) == "microvm"


def test_isolation_that_is_not_there_is_refused() -> None:
    """A tier that was named is that tier or none."""
    with pytest.raises(HostError, match="QEMU is not installed"):
        make_plan(inputs.policy(isolation="microvm"), inputs.BASE, inputs.ROOT_V1)
    assert choose_tier(inputs.policy(isolation="microvm")) == "microvm"
    with pytest.raises(HostError, match="runsc is not installed"):
        make_plan(inputs.policy(isolation="gvisor"), inputs.BASE, inputs.ROOT_V1)
    with pytest.raises(PolicyError, match="weaker than floor"):
        override(load("hostile"), {"isolation": "linux"})
    # Also for a policy that nobody has checked.
    with pytest.raises(HostError, match="below the policy's floor"):
        choose_tier(replace(inputs.policy(), isolation="linux", floor="microvm"))


def test_what_cannot_be_enforced_is_named_in_full_with_the_way_out() -> None:
    """One line: the first field and why, all the others, what to do, and how to accept them all."""
    with pytest.raises(NotEnforceable) as caught:
        make_plan(inputs.policy(), inputs.BASE, inputs.USER_V1)
    error = caught.value
    assert set(error.fields) == inputs.CGROUP_FIELDS
    text = str(error)
    assert text.startswith(
        "limits.memory cannot be enforced at the linux tier: this user may not make groups"
    )
    assert f"or accept it with --allow-unenforced {','.join(error.fields)}" in text
    assert text.endswith("[RF-UNENFORCEABLE]")
    assert "\n" not in text


@pytest.mark.parametrize("missing", sorted(inputs.CGROUP_FIELDS))
def test_each_unenforced_field_has_to_be_accepted_by_name(missing: str) -> None:
    """All but one is not enough, and none is left to guess."""
    with pytest.raises(NotEnforceable) as caught:
        make_plan(
            inputs.policy(), inputs.BASE, inputs.USER_V1, allow_unenforced=inputs.CGROUP_FIELDS - {missing}
        )
    assert caught.value.fields == (missing,)


def test_accepted_fields_stand_in_the_plan_and_are_asked_of_nobody() -> None:
    """The plan says what goes unenforced and why; the runtime is not told to try, nor the proof to look."""
    plan = make_plan(inputs.policy(), inputs.BASE, inputs.USER_V1, allow_unenforced=inputs.CGROUP_FIELDS)
    assert {item["field"] for item in plan["unenforced"]} == inputs.CGROUP_FIELDS
    assert all(item["reason"] for item in plan["unenforced"])
    assert not [control for control in plan["controls"] if control["name"].startswith("cgroup.")]
    resources = plan["oci"]["linux"]["resources"]
    assert resources["memory"] == {}
    assert resources["cpu"] == {}
    assert "pids" not in resources


def test_accepting_what_is_enforced_changes_nothing() -> None:
    """--allow-unenforced is a way past a refusal and not a switch that turns a control off."""
    accepted = make_plan(inputs.policy(), inputs.BASE, inputs.ROOT_V1, allow_unenforced=frozenset(FIELDS))
    assert accepted == make_plan(inputs.policy(), inputs.BASE, inputs.ROOT_V1)


NOT_READY = [
    (replace(inputs.ROOT_V1, overlayfs=False), "overlayfs"),
    (replace(inputs.ROOT_V1, idmapped_mounts=False, state_filesystem="nfs"), "images on nfs"),
    (replace(inputs.ROOT_V1, runtimes={}), "crun or runc is not installed"),
    (replace(inputs.ROOT_V1, arch="riscv64"), "riscv64"),
    (replace(inputs.ROOT_V1, seccomp_filter=False), "CONFIG_SECCOMP_FILTER"),
    (replace(inputs.ROOT_V1, namespaces=("user", "pid")), "no mnt namespaces"),
    (
        replace(inputs.ROOT_V1, userns=UserNamespaces(reason="user.max_user_namespaces is 0")),
        "max_user_namespaces",
    ),
    (replace(inputs.USER_V2, ids=SubordinateIds()), "no range in /etc/subuid"),
    (replace(inputs.USER_V2, ids=replace(inputs.USER_V2.ids, newuidmap="")), "newuidmap"),
]


@pytest.mark.parametrize(("host", "words"), NOT_READY, ids=[words for _, words in NOT_READY])
def test_a_host_that_lacks_something_is_refused(host: Host, words: str) -> None:
    """The line names what is missing and says what to do."""
    with pytest.raises(HostError, match=words) as caught:
        make_plan(inputs.policy(), inputs.BASE, host)
    assert caught.value.hint


def test_user_namespaces_cannot_be_done_without_as_root() -> None:
    """Real root inside is not on offer, whatever is accepted."""
    host = replace(inputs.ROOT_V1, userns=UserNamespaces(reason="user.max_user_namespaces is 0"))
    with pytest.raises(HostError, match="nothing here can run as root"):
        make_plan(inputs.policy(), inputs.BASE, host, allow_unenforced=frozenset(FIELDS))


@pytest.mark.parametrize("user", ["0:0", "0:5", "5:0"])
def test_root_of_a_rootless_sandbox_is_refused(user: str) -> None:
    """It would be the caller himself, with all of his files."""
    with pytest.raises(HostError, match="would be yourself"):
        make_plan(inputs.policy(user=user), inputs.BASE, inputs.USER_V2)
    assert make_plan(inputs.policy(user=user), inputs.BASE, inputs.ROOT_V2)["user"]["range_size"] == 65536


def test_ids_inside_fit_into_the_range() -> None:
    """A user of the policy beyond the ids of a rootless sandbox is refused; the largest that fits is not."""
    size = make_plan(inputs.policy(), inputs.BASE, inputs.USER_V2)["user"]["range_size"]
    assert make_plan(inputs.policy(user=f"{size - 1}:{size - 1}"), inputs.BASE, inputs.USER_V2)
    for user in (f"{size}:1000", f"1000:{size}"):
        with pytest.raises(HostError, match=f"{size}"):
            make_plan(inputs.policy(user=user), inputs.BASE, inputs.USER_V2)


# Runtimes.


def runtime_of(host: Host, wanted: str | None = None, policy: Policy | None = None) -> str:
    accepted = frozenset(FIELDS)
    plan = make_plan(policy or inputs.policy(), inputs.BASE, host, runtime=wanted, allow_unenforced=accepted)
    return plan["runtime"]["name"]


def test_crun_comes_first_and_a_chosen_runtime_is_that_one() -> None:
    """crun is faster; what was chosen is taken or refused, never replaced."""
    assert runtime_of(inputs.ROOT_V1) == "crun"
    assert runtime_of(inputs.ROOT_V1, "runc") == "runc"
    assert runtime_of(inputs.ROOT_V1_RUNC) == "runc"
    with pytest.raises(HostError, match="crun is not installed"):
        runtime_of(inputs.ROOT_V1_RUNC, "crun")
    with pytest.raises(HostError, match="unknown runtime 'runsc'"):
        runtime_of(inputs.ROOT_V1, "runsc")


def test_crun_for_a_user_on_hybrid_cgroups() -> None:
    """It refuses to run there and a user cannot hide the second mount: runc is taken, a chosen crun refused."""
    assert runtime_of(inputs.USER_HYBRID) == "runc"
    with pytest.raises(
        HostError, match="crun does not run for a user on a host with hybrid cgroups"
    ) as caught:
        runtime_of(inputs.USER_HYBRID, "crun")
    assert "--runtime runc" in caught.value.hint


def test_runcs_own_device_is_taken_back() -> None:
    """runc lets every container open /dev/net/tun; the plan closes it where there is a devices cgroup."""
    assert make_plan(inputs.policy(), inputs.BASE, inputs.ROOT_V1_RUNC)["deny_devices"] == ["c 10:200 rwm"]
    assert make_plan(inputs.policy(), inputs.BASE, inputs.ROOT_V1)["deny_devices"] == []


def test_an_unloaded_profile_of_an_active_module_is_said() -> None:
    """`lsm: default` goes without a label where it must, and the plan says so."""
    host = replace(inputs.ROOT_V1, lsm=Lsm(active=("apparmor",), apparmor=True))
    (item,) = make_plan(inputs.policy(), inputs.BASE, host)["unenforced"]
    assert item["field"] == "lsm"
    assert "ringfence-default is not loaded" in item["reason"]
    assert make_plan(inputs.policy(lsm="none"), inputs.BASE, host)["unenforced"] == []
    with pytest.raises(NotEnforceable, match="lsm"):
        make_plan(inputs.policy(lsm="required"), inputs.BASE, host)


def test_the_callers_own_id_is_the_last_resort() -> None:
    """Without subordinate ids, and accepted as such, the job is 0 inside; ids of the policy's own are refused."""
    host = replace(inputs.USER_V2, ids=SubordinateIds())
    accepted = frozenset({"user", "limits.threads"})
    plan = make_plan(inputs.policy(), inputs.BASE, host, allow_unenforced=accepted)
    assert plan["user"] == {"uid": 0, "gid": 0, "range_size": 0}
    names = {control["name"] for control in plan["controls"]}
    assert not names & {"credentials.groups", "rlimit.nproc"}
    assert {"credentials.uid", "credentials.range", "capabilities.bounding", "rlimit.nofile"} <= names
    with pytest.raises(HostError, match="needs subordinate ids"):
        make_plan(inputs.policy(user="7:8"), inputs.BASE, host, allow_unenforced=accepted)


def test_a_limit_beyond_the_hosts_own_is_refused_and_when_accepted_not_set() -> None:
    """A runtime that may not raise it would fail to start; the host's own lower limit then holds."""
    policy = inputs.policy(limits__open_files=1_000_000)
    with pytest.raises(NotEnforceable, match="ends at 20000"):
        make_plan(policy, inputs.BASE, inputs.ROOT_V1)
    plan = make_plan(policy, inputs.BASE, inputs.ROOT_V1, allow_unenforced=frozenset({"limits.open_files"}))
    assert "RLIMIT_NOFILE" not in {limit["type"] for limit in plan["oci"]["process"]["rlimits"]}
    assert "rlimit.nofile" not in {control["name"] for control in plan["controls"]}


def test_a_device_is_given_with_its_access_and_no_more() -> None:
    """A node to see and a rule to open it, both in the proof; those that are always there need neither."""
    workload = replace(inputs.BASE, sources=inputs.SOURCES[-1:])
    plan = make_plan(inputs.policy(devices=["/dev/fuse"]), workload, inputs.ROOT_V1)
    deny, allow = plan["oci"]["linux"]["resources"]["devices"]
    assert deny == {"allow": False, "access": "rwm"}
    assert allow == {"allow": True, "access": "rw", "type": "c", "major": 10, "minor": 229}
    asked = {control["name"]: control["asked"] for control in plan["controls"]}
    assert asked["cgroup.devices"] == ["c 10:229 rw"]
    assert "fuse" in asked["devices.nodes"]  # type: ignore[operator]
    null = replace(
        inputs.SOURCES[-1], given="/dev/null", source="/dev/null", target="/dev/null", rule="c 1:3 rw"
    )
    plan = make_plan(
        inputs.policy(devices=["/dev/null"]), replace(inputs.BASE, sources=(null,)), inputs.ROOT_V1
    )
    before = make_plan(inputs.policy(), inputs.BASE, inputs.ROOT_V1)
    assert (plan["oci"], plan["controls"]) == (before["oci"], before["controls"])


def test_less_access_than_a_node_allows_needs_a_devices_cgroup() -> None:
    """A user has none, so a read-only device is refused and not given in full."""
    workload = replace(inputs.BASE, sources=(replace(inputs.SOURCES[-1], rule="c 10:229 r"),))
    with pytest.raises(HostError, match="/dev/fuse cannot be given read-only"):
        make_plan(inputs.policy(devices=["/dev/fuse:r"]), workload, inputs.USER_V2)
    assert make_plan(inputs.policy(devices=["/dev/fuse:r"]), workload, inputs.ROOT_V2)


@pytest.mark.parametrize(("access", "left"), [("rw", ["c 10:200 m"]), ("r", ["c 10:200 wm"]), ("rwm", [])])
def test_of_runcs_own_device_only_what_was_not_given_is_taken_back(access: str, left: list[str]) -> None:
    """A policy may ask for /dev/net/tun itself."""
    tun = replace(inputs.SOURCES[-1], target="/dev/net/tun", source="/dev/net/tun", rule=f"c 10:200 {access}")
    workload = replace(inputs.BASE, sources=(tun,))
    plan = make_plan(inputs.policy(devices=[f"/dev/net/tun:{access}"]), workload, inputs.ROOT_V1_RUNC)
    assert plan["deny_devices"] == left


def test_the_agent_cannot_be_covered() -> None:
    """A mount on it or below it would be the sandbox's first program."""
    for target in ("/.ringfence", "/.ringfence/x"):
        workload = replace(inputs.BASE, sources=(replace(inputs.SOURCES[0], target=target),))
        with pytest.raises(MountError, match=r"cannot cover /\.ringfence"):
            make_plan(inputs.policy(), workload, inputs.ROOT_V1)


def test_a_mount_may_take_the_place_of_a_file_of_ours() -> None:
    """/etc/hosts of one's own is an ordinary wish: the file that is there anyway is the mount point."""
    source = replace(inputs.SOURCES[1], target="/etc/hosts")
    ops = make_plan(inputs.policy(), replace(inputs.BASE, sources=(source,)), inputs.ROOT_V1)["stage"]
    assert [op["op"] for op in ops if op["op"] == "file" and op["at"] == "skeleton/etc/hosts"] == ["file"]


@pytest.mark.parametrize("name", ["service", "trusted"])
def test_every_operation_has_words(name: str) -> None:
    """One line each, whatever stands in a path, as `ringfence plan` prints them."""
    odd = replace(inputs.SOURCES[0], source="/srv/new\nline\x1b", target="/data/\x1b")
    policy = inputs.policy(name, network__mode="none", filesystem__root="writable")
    ops = make_plan(policy, replace(inputs.HOST_VIEW, sources=(odd,)), inputs.HYBRID)["stage"]
    assert {op["op"] for op in ops} >= {"tmpfs", "directory", "file", "host-file", "symlink", "agent", "bind"}
    for op in ops:
        words = describe(op)
        assert words
        assert words.isprintable()
    assert "bind /srv/new\\nline\\x1b on /data/\\x1b, read-only, its owner is the job's user" in map(
        describe, ops
    )


def test_what_cgroup_v2_keeps_in_part_is_said() -> None:
    """A limit on writes that writes over others' cached pages escape stands in the proof as such, and nowhere else."""
    mounts = [{"source": "/srv/out", "target": "/tmp/out", "mode": "rw"}]
    workload = replace(inputs.BASE, sources=(inputs.SOURCES[2],))
    made = make_plan(inputs.policy(filesystem__mounts=mounts), workload, inputs.ROOT_V2)
    said = {item["field"]: item["reason"] for item in made["unenforced"]}
    assert said.keys() == {"limits.io.write", "limits.io.write_iops"}
    assert all(reason.startswith("in part: ") for reason in said.values())
    assert make_plan(inputs.policy(), inputs.BASE, inputs.ROOT_V2)["unenforced"] == []
