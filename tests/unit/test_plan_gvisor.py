"""Plans of the gVisor tier: what is refused with which words, and which platform is chosen."""

import os
from pathlib import Path
from typing import Literal

import msgspec
import pytest
from plan_inputs import BASE, MOUNTS, ROOT_V1, ROOT_V1_GVISOR, USER_V2_GVISOR, policy

from ringfence.errors import HostError, MountError, NotEnforceable
from ringfence.host import gvisor as probe
from ringfence.host.facts import GvisorFacts, Host
from ringfence.host.sources import Source
from ringfence.plan.document import Plan
from ringfence.plan.make import make_plan

ASKED = policy(isolation="gvisor")


def with_facts(**facts: object) -> Host:
    return msgspec.structs.replace(ROOT_V1_GVISOR, gvisor=GvisorFacts(**facts))  # type: ignore[arg-type]


def plan(
    host: Host = ROOT_V1_GVISOR,
    platform: str = "",
    allow_unenforced: frozenset[str] = frozenset(),
    **overrides: object,
) -> Plan:
    asked = policy("untrusted", isolation="gvisor", **overrides)
    return make_plan(asked, BASE, host, platform=platform, allow_unenforced=allow_unenforced)


@pytest.mark.parametrize(
    ("host", "words"),
    [
        (ROOT_V1, "runsc is not installed"),
        (msgspec.structs.replace(ROOT_V1_GVISOR, gvisor=None), "runsc is not installed"),
        (with_facts(missing=("--pass-fd",)), "/usr/bin/runsc is too old: it lacks --pass-fd; Debian 13"),
        (
            with_facts(missing=tuple(f"--{letter}" for letter in "abcdef")),
            "too old: it lacks --a, --b, --c, --d and 2 more",
        ),
        (with_facts(missing=("--detach", "--root")), "/usr/bin/runsc does not answer as a runsc does"),
        (with_facts(reasons={"kvm": "no", "ptrace": "never"}), "here (kvm: no; ptrace: never)"),
    ],
)
def test_a_host_without_a_gvisor_that_works(host: Host, words: str) -> None:
    """Each way in which a runsc is none has words of its own, and there is never a weaker tier instead."""
    with pytest.raises(HostError) as error:
        plan(host)
    assert words in str(error.value)


def test_the_best_platform_is_chosen_unless_another_one_is_wanted() -> None:
    """The first that works; a wanted one if it works, and otherwise its own reason."""
    host = with_facts(platforms=("systrap", "ptrace"), reasons={"kvm": "KVM is absent"})
    for wanted, taken in (("", "systrap"), ("systrap", "systrap"), ("ptrace", "ptrace")):
        made = plan(host, wanted)
        assert made["guest"] is not None
        assert made["guest"]["platform"] == taken
        assert f"--platform={taken}" in made["guest"]["flags"]
    with pytest.raises(HostError, match="platform kvm does not work here: KVM is absent"):
        plan(host, "kvm")
    with pytest.raises(HostError, match="runsc knows no such platform"):
        plan(host, "xen")
    with pytest.raises(HostError, match="linux tier has no platform 'ptrace'"):
        make_plan(policy(isolation="linux"), BASE, ROOT_V1, platform="ptrace")


@pytest.mark.parametrize("reason", ["", "ptrace(2) is not allowed"])
def test_a_wanted_platform_is_tried(reason: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """ptrace, which nobody tries where systrap works, is tried when it is wanted, and only then."""
    tried: list[str] = []

    def trial(_: Host, platform: str, patience_s: float) -> str:
        tried.append(platform)
        assert patience_s > 0
        return {"ptrace": reason}.get(platform, "")

    monkeypatch.setattr(probe, "_trial", trial)
    monkeypatch.setattr(probe, "_missing_flags", lambda _: ())
    monkeypatch.setattr(probe, "host_key", lambda: "key")
    host, file = msgspec.structs.replace(ROOT_V1_GVISOR, euid=os.geteuid()), str(tmp_path / "gvisor.json")
    for wanted in ("", "systrap", "kvm", "xen"):
        found = probe.with_gvisor(host, file, wanted).gvisor
        assert found is not None
        assert found.platforms == ("systrap",)
    assert tried == ["systrap"]
    found = probe.with_gvisor(host, file, "ptrace").gvisor
    assert tried == ["systrap", "ptrace"]
    assert found is not None
    assert (found.platforms, found.reasons.get("ptrace", "")) == (
        (("systrap",), reason) if reason else (("systrap", "ptrace"), "")
    )


def test_kvm_is_the_only_device_of_a_ring() -> None:
    """The ring has /dev/kvm if the platform is kvm, by its node and in its cgroup, and else nothing."""
    kvm = plan(with_facts(platforms=("kvm", "systrap")))["oci"]
    trap = plan()["oci"]
    assert [mount["destination"] for mount in kvm["mounts"] if mount not in trap["mounts"]] == ["/dev/kvm"]
    allowed = [
        [rule for rule in oci["linux"]["resources"]["devices"] if rule["allow"] and rule not in common]
        for oci, common in ((kvm, trap["linux"]["resources"]["devices"]), (trap, []))
    ]
    assert [(rule["major"], rule["minor"]) for rule in allowed[0]] == [(10, 232)]
    assert (10, 232) not in [(rule.get("major"), rule.get("minor")) for rule in allowed[1]]


@pytest.mark.parametrize("name", ["CAP_BPF", "CAP_PERFMON", "CAP_CHECKPOINT_RESTORE", "CAP_NET_RAW"])
def test_a_capability_that_gvisor_drops(name: str) -> None:
    """What would be left out in silence is refused, by name."""
    with pytest.raises(HostError, match=name):
        plan(user="0:0", capabilities=[name])


def test_capabilities_are_for_root_alone() -> None:
    """gVisor has no ambient capabilities: another user would lose them with the first program."""
    with pytest.raises(HostError, match="user 0 alone"):
        plan(capabilities=["CAP_CHOWN"])
    with pytest.raises(NotEnforceable, match="root of the sandbox can write to gVisor's /dev"):
        plan(user="0:0", capabilities=["CAP_CHOWN"])
    made = plan(
        user="0:0",
        capabilities=["CAP_CHOWN"],
        allow_unenforced=frozenset({"limits.disk", "limits.inodes"}),
    )
    assert made["guest"] is not None
    assert made["guest"]["oci"]["process"]["capabilities"]["bounding"] == ["CAP_CHOWN"]


@pytest.mark.parametrize("kind", ["socket", "fifo"])
def test_what_the_gofer_does_not_open(kind: Literal["socket", "fifo"]) -> None:
    """A socket or FIFO of the host, which a policy may allow, is refused here and not left dead."""
    asked = policy(isolation="gvisor", filesystem__mounts=[{**MOUNTS[0], "allow_dangerous": True}])
    image = msgspec.structs.replace(BASE, sources=(Source("/srv/data", "/srv/data", "/data", kind, True),))
    with pytest.raises(MountError, match=f"gVisor does not open the host's {kind} '/srv/data'"):
        make_plan(asked, image, ROOT_V1_GVISOR)


def test_files_may_change_under_the_sandbox_only_where_something_is_mounted() -> None:
    """Without a mount nobody else can change what is seen; with one the sentry must not trust what it has read."""
    assert "--file-access-mounts=exclusive" in _flags(plan())
    mounted = policy(isolation="gvisor", filesystem__mounts=[MOUNTS[0]])
    image = msgspec.structs.replace(
        BASE, sources=(Source("/srv/data", "/srv/data", "/data", "directory", True),)
    )
    assert "--file-access-mounts=shared" in _flags(make_plan(mounted, image, ROOT_V1_GVISOR))


def _flags(made: Plan) -> list[str]:
    assert made["guest"] is not None
    return made["guest"]["flags"]


def test_without_root_the_sentrys_id_is_the_last_of_the_range() -> None:
    """A range of 4096 ids ends before "nobody", and the proof asks for the id that stands for it."""
    made = make_plan(ASKED, BASE, USER_V2_GVISOR)
    asked = {control["name"]: control["asked"] for control in made["controls"]}
    assert made["user"]["range_size"] == 4096
    assert (asked["sentry.credentials.uid"], asked["sentry.credentials.gid"]) == (4095, 4095)
    as_root = {control["name"]: control["asked"] for control in plan()["controls"]}
    assert as_root["sentry.credentials.uid"] == 65534


def test_without_ids_there_is_no_gvisor() -> None:
    """The sentry and the gofer are two users: one id of the caller's own is not enough, accepted or not."""
    bare = msgspec.structs.replace(
        USER_V2_GVISOR, ids=msgspec.structs.replace(USER_V2_GVISOR.ids, uids=(), gids=())
    )
    accepted = frozenset({"user", "limits.threads"})
    with pytest.raises(HostError, match=r"ids of its own.*--add-subuids"):
        make_plan(ASKED, BASE, bare, allow_unenforced=accepted)


def test_files_whose_owners_cannot_be_mapped() -> None:
    """The gofer serves what the host has staged: without idmapped mounts there is nothing to serve, as at linux."""
    host = msgspec.structs.replace(ROOT_V1_GVISOR, idmapped_mounts=False, state_filesystem="nfs")
    with pytest.raises(HostError, match="images on nfs cannot be mounted with their owners mapped"):
        plan(host)
