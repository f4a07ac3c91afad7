"""The comparison of asked and observed: it holds only if everything was seen exactly as asked."""

from __future__ import annotations

import copy
import os
import resource
import socket
from collections.abc import Callable
from pathlib import Path

import plan_inputs as inputs
import pytest

from ringfence.plan.document import Plan
from ringfence.plan.make import make_plan
from ringfence.proof import observe, prove
from ringfence.proof.observe import Mount, Subject
from ringfence.proof.prove import failures, words
from ringfence.proof.report import table
from ringfence.runtime.base import Instance

TYPE_CHECKING = False
if TYPE_CHECKING:
    from ringfence.proof.observe import Seen
    from ringfence.proof.prove import Proof

ID = "0123456789ab"
# Judged from mountinfo, or filled in for each sandbox.
FROM_MOUNTS = {"paths.masked", "paths.read_only", "devices.nodes", "mounts.others"}


def plan(**overrides: object) -> Plan:
    return make_plan(inputs.policy(**overrides), inputs.BASE, inputs.ROOT_V1)


def instance_of(base: int = 0x70000000) -> Instance:
    return Instance(id=ID, directory="/run/x", staging="/run/s", base=base, cgroup_path=f"/ringfence/{ID}")


def as_asked(made: Plan) -> Seen:
    """Everything as the plan asks for it."""
    seen: Seen = {control["name"]: (control["asked"], "kernel") for control in made["controls"]}
    seen["hostname"] = (ID, "kernel")
    seen["credentials.range"] = (f"0 {0x70000000} 65536", "kernel")
    return {name: value for name, value in seen.items() if name not in FROM_MOUNTS}


def mountinfo(made: Plan) -> list[str]:
    """The lines of mountinfo that such a sandbox has."""
    linux = made["oci"]["linux"]
    asked = [control["name"][6:] for control in made["controls"] if control["name"].startswith("mount:")]
    lines = [f"1 1 0:1 / {target} rw,nosuid,nodev - tmpfs tmpfs rw,size=4k,nr_inodes=5" for target in asked]
    lines += [f"1 1 0:2 / {path} ro - tmpfs tmpfs ro" for path in linux["maskedPaths"]]
    lines += [f"1 1 0:3 {path[5:]} {path} ro - proc proc rw" for path in linux["readonlyPaths"]]
    nodes = ("full", "null", "random", "tty", "urandom", "zero")
    return lines + [f"1 1 0:4 /{node} /dev/{node} rw - devtmpfs dev rw" for node in nodes]


Take = Callable[..., "Proof"]


@pytest.fixture
def take(monkeypatch: pytest.MonkeyPatch) -> Take:
    """Take a proof of what is given as seen, instead of a process."""

    def taken(
        made: Plan, seen: Seen | None = None, lines: list[str] | None = None, descriptors: int = 3
    ) -> Proof:
        shown = as_asked(made) if seen is None else seen
        found = [Mount(line) for line in (mountinfo(made) if lines is None else lines)]
        monkeypatch.setattr(prove, "observe", lambda _: dict(shown))
        monkeypatch.setattr(prove, "sysctls", lambda *_: {})
        monkeypatch.setattr(prove, "mounts", lambda _: found)
        subject = Subject(pid=1, base=0x70000000, size=65536, cgroup=None, rules=())
        return prove.prove(made, instance_of(), subject, reported_descriptors=descriptors)

    return taken


def line_of(proof: Proof, control: str) -> dict[str, object]:
    (line,) = [line for line in proof["lines"] if line["control"] == control]
    return {**line}


def test_a_proof_of_what_was_asked_holds(take: Take) -> None:
    """Every control is observed, with its source; the digests and the moment stand in it."""
    made = plan()
    proof = take(made)
    assert failures(proof) == []
    assert proof["holds"]
    assert {line["control"] for line in proof["lines"]} >= {control["name"] for control in made["controls"]}
    for control in made["controls"]:
        assert line_of(proof, control["name"])["vantage"] == "observed"
    assert (proof["plan_digest"], proof["sandbox"]) == (made["digest"], ID)
    assert proof["moment"] == "before the job's first instruction"


ALL = [
    control["name"] for control in plan(sysctls={"kernel.msgmax": "1"}, filesystem__sysfs=True)["controls"]
]


@pytest.mark.parametrize("name", [name for name in ALL if name not in FROM_MOUNTS])
def test_a_control_that_was_not_seen_is_not_held(take: Take, name: str) -> None:
    """Silence is a failure and not a pass."""
    made = plan(sysctls={"kernel.msgmax": "1"}, filesystem__sysfs=True)
    seen = as_asked(made)
    del seen[name]
    proof = take(made, seen)
    assert not proof["holds"]
    (said,) = failures(proof)
    assert said.startswith(f"{name}: asked ")
    assert said.endswith(", not observed")
    assert line_of(proof, name)["vantage"] == "not observable"


@pytest.mark.parametrize("name", [name for name in ALL if name not in FROM_MOUNTS])
def test_another_value_is_not_held(take: Take, name: str) -> None:
    """Whatever else was seen, of whatever type: it is not what was asked."""
    made = plan(sysctls={"kernel.msgmax": "1"}, filesystem__sysfs=True)
    asked = as_asked(made)[name][0]
    for value in ("no limit", -1, None, True, [], ["CAP_CHOWN"], "4096"):
        if type(value) is type(asked) and value == asked:
            continue
        proof = take(made, as_asked(made) | {name: (value, "kernel")})  # type: ignore[dict-item]
        assert not proof["holds"], value
        assert [said.partition(":")[0] for said in failures(proof)] == [name.partition(":")[0]]


@pytest.mark.parametrize(
    ("asked", "seen"), [(True, 1), (1, True), (False, 0), ("1", 1), ([], None), (0, None)]
)
def test_a_value_of_another_type_is_another_value(take: Take, asked: object, seen: object) -> None:
    """Python calls 1 and True equal; a kernel's count is not a yes."""
    made = plan()
    made["controls"] = [{"name": "x", "field": "x", "asked": asked}]  # type: ignore[typeddict-item]
    assert not take(made, {"x": (seen, "kernel")})["holds"]  # type: ignore[dict-item]
    assert take(made, {"x": (asked, "kernel")})["holds"]  # type: ignore[dict-item]


def test_a_mount_that_nobody_asked_for(take: Take) -> None:
    """It is named, whatever it is."""
    made = plan()
    extra = [*mountinfo(made), "1 1 8:1 /secret /mnt/with\\040blank rw - ext4 /dev/vda rw"]
    assert failures(take(made, lines=extra)) == ["mounts.others: asked none, observed /mnt/with blank"]


def test_another_device_under_a_harmless_name(take: Take) -> None:
    """/dev/null has to be the host's null and not its disk."""
    made = plan()
    lines = [line.replace("0:4 /null /dev/null", "0:4 /vda /dev/null") for line in mountinfo(made)]
    said = failures(take(made, lines=lines))
    assert any(text.startswith("devices.nodes") for text in said), said


@pytest.mark.parametrize("path", ["/proc/kcore", "/proc/keys"])
def test_a_masked_path_that_shows(take: Take, path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A path that exists has to be covered by an empty tmpfs or the null device, and by nothing else."""
    monkeypatch.setattr(prove.os.path, "lexists", lambda _: True)
    made = plan()
    assert take(made)["holds"]
    for found in ("", f"1 1 0:9 {path[5:]} {path} ro - proc proc rw", f"1 1 8:1 /x {path} ro - ext4 x ro"):
        lines = [line for line in mountinfo(made) if f" {path} " not in line] + ([found] if found else [])
        assert [said.partition(":")[0] for said in failures(take(made, lines=lines))] == ["paths.masked"]


def test_a_read_only_path_that_is_writable(take: Take, monkeypatch: pytest.MonkeyPatch) -> None:
    """The mount's own flag counts, not that of its file system."""
    monkeypatch.setattr(prove.os.path, "lexists", lambda _: True)
    made = plan()
    lines = [line.replace("/proc/sys ro -", "/proc/sys rw -") for line in mountinfo(made)]
    assert [said.partition(":")[0] for said in failures(take(made, lines=lines))] == ["paths.read_only"]


def test_of_two_mounts_on_one_place_the_upper_counts(take: Take, monkeypatch: pytest.MonkeyPatch) -> None:
    """mountinfo lists the later one later, and that is what a job sees."""
    monkeypatch.setattr(prove.os.path, "lexists", lambda _: True)
    made = plan()
    lines = [*mountinfo(made), "1 1 0:9 /kcore /proc/kcore rw - proc proc rw"]
    assert not take(made, lines=lines)["holds"]


def test_what_goes_unenforced_is_said_and_is_no_failure(take: Take) -> None:
    """It was accepted by name; the proof never says more than was seen."""
    made = plan()
    made["unenforced"] = [{"field": "limits.memory", "reason": "no cgroup"}]
    proof = take(made)
    assert proof["holds"]
    assert proof["unenforced"] == ["limits.memory"]
    line = line_of(proof, "limits.memory")
    assert (line["observed"], line["ok"], line["vantage"]) == (
        "not enforced: no cgroup",
        None,
        "not observable",
    )


def test_time_and_output_are_said_to_be_kept_during_the_run(take: Take) -> None:
    """There is nothing to see of them beforehand, and it is not pretended."""
    for control in ("limits.time", "limits.output"):
        line = line_of(take(plan()), control)
        assert (line["vantage"], line["ok"]) == ("not observable", None)
    names = {line["control"] for line in take(plan(limits__time=None, limits__output=None))["lines"]}
    assert not {"limits.time", "limits.output"} & names


def test_without_root_the_agent_stands_in_for_what_a_user_may_not_see(take: Take) -> None:
    """As "reported", and still compared; root has no such way out."""
    made = plan()
    seen = {name: value for name, value in as_asked(made).items() if name not in ("descriptors", "hostname")}
    assert not take(made, seen)["holds"]
    user = copy.deepcopy(made)
    user["rootless"] = True
    me = f"0 {prove.os.geteuid()} 1; 1 {0x70000001} 65535"
    seen["credentials.range"] = (me, "kernel")
    proof = take(user, seen)
    assert proof["holds"]
    assert line_of(proof, "descriptors")["vantage"] == "reported"
    assert line_of(proof, "hostname")["ok"] is None
    assert failures(take(user, seen, descriptors=4)) == ["descriptors: asked 0, 1, 2, reported 0, 1, 2, 3"]
    del seen["seccomp.mode"]
    assert [said.partition(":")[0] for said in failures(take(user, seen))] == ["seccomp.mode"]


@pytest.mark.parametrize(
    ("uids", "gids", "shown"),
    [("0 1 2", "0 1 2", "0 1 2"), ("0 1000 1", "0 100 1", "0 1000 1 (groups: 0 100 1)")],
)
def test_the_maps_of_users_and_groups_are_both_compared(uids: str, gids: str, shown: str) -> None:
    """A group map that differs shows, as for a user whose group has another number."""
    assert observe.id_map(uids, gids) == shown


@pytest.mark.parametrize(
    ("line", "target", "shown"),
    [
        ("1 1 0:1 / / ro,nosuid,nodev,relatime - overlay overlay rw", "/", "overlay ro,nosuid,nodev"),
        (
            "1 1 0:1 / /tmp rw,nosuid,nodev master:1 - tmpfs tmpfs rw,size=65536k,nr_inodes=16384",
            "/tmp",
            "tmpfs rw,nosuid,nodev size=67108864 inodes=16384",
        ),
        ("1 1 0:1 / /a\\134b\\011c\\012 rw - ext4 /dev/x rw", "/a\\b\tc\n", "ext4 rw"),
        ("1 1 0:1 / /x rw shared:1 master:2 - tmpfs none rw", "/x", "tmpfs rw size=-1 inodes="),
    ],
)
def test_a_line_of_mountinfo(line: str, target: str, shown: str) -> None:
    """Optional fields, escapes and sizes as the kernel writes them."""
    mount = Mount(line)
    assert (mount.target, mount.words()) == (target, shown)


def test_only_a_newline_ends_a_line_of_mountinfo() -> None:
    """Other characters that end lines for Python may stand in a path, and neither make a mount nor hide one."""
    text = "1 1 0:1 / /a\x0b\x85\u2028b rw - ext4 /dev/x rw\n1 1 0:1 / /c ro - ext4 /dev/x rw\n"
    assert [mount.target for mount in observe.mountinfo(text)] == ["/a\x0b\x85\u2028b", "/c"]


@pytest.mark.parametrize(
    ("ids", "inside"),
    [
        (f"{0x70000000}\t" * 4, 0),
        (f"{0x70000000 + 1000}\t" * 4, 1000),
        (f"{0x70000000}\t0\t{0x70000000}\t{0x70000000}", -1),
        (f"{0x70000000 + 65536}\t" * 4, -0x70010000 - 1),
        ("0\t0\t0\t0", -1),
    ],
)
def test_ids_that_differ_are_not_those_of_root(ids: str, inside: int) -> None:
    """Only four equal ids in the range are an id of the sandbox; whatever else is seen equals none that is asked."""
    (seen, _) = observe.status(f"Uid:\t{ids}\n", "")["credentials.uid"]
    subject = Subject(pid=1, base=0x70000000, size=65536, cgroup=None, rules=())
    assert isinstance(seen, int)
    assert observe.inside(subject, seen, 0) == inside


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("65536", 65536),
        ("64k", 65536),
        ("8m", 8 << 20),
        ("1g", 1 << 30),
        ("", -1),
        ("k", None),
        ("-1", None),
        ("1_0", None),
        ("²", None),
        ("٣", None),
        ("9" * 21, None),
        ("0x10", None),
    ],
)
def test_a_size_is_a_plain_number(text: str, shown: int | None) -> None:
    """As a kernel writes it, and nothing that Python would take for a number besides."""
    if shown is not None:
        assert observe.size(text) == shown
    else:
        with pytest.raises(ValueError, match="not a number"):
            observe.size(text)


def test_texts_of_this_very_process_are_read_as_it_is_observed() -> None:
    """One set of functions reads the files of any kernel, and agrees with what is known here by other means."""
    me = Path("/proc/self")
    status = observe.status((me / "status").read_text(), "")
    assert status["credentials.uid"] == (os.getuid() if os.getuid() == os.geteuid() else -1, "")
    assert status["credentials.groups"] == ([str(number) for number in sorted(os.getgroups())], "")
    limits = observe.limits((me / "limits").read_text(), "")
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    assert limits["rlimit.nofile"] == (soft if soft == hard else f"{soft} soft, {hard} hard", "")
    interfaces = observe.interfaces((me / "net/dev").read_text(), "")
    assert interfaces["network.interfaces"] == (sorted(name for _, name in socket.if_nameindex()), "")
    assert observe.id_maps(*(2 * [(me / "uid_map").read_text()])).split()[0] == "0"
    assert {mount.target for mount in observe.mountinfo((me / "mountinfo").read_text())} >= {"/", "/proc"}


@pytest.mark.parametrize(
    ("value", "text"),
    [([], "none"), (["a", "b"], "a, b"), (True, "yes"), (False, "no"), (None, "no limit"), (7, "7")],
)
def test_values_in_words(value: object, text: str) -> None:
    """As a person reads them."""
    assert words(value) == text  # type: ignore[arg-type]


def test_the_table_cannot_be_forged(take: Take) -> None:
    """A hostile name stays in its cell: no second line, no escape sequence, and a failure is marked."""
    made = plan()
    lines = [*mountinfo(made), "1 1 8:1 / /x\\012ok\x1b[31m rw - ext4 x rw"]
    made["image"]["name"] = "im\nage\x1b"
    text = table(take(made, lines=lines))
    assert "NOT every asked control was observed" in text
    assert "\x1b" not in text
    assert len(text.splitlines()) == 4 + len(take(made)["lines"])
    assert [line[:2] for line in text.splitlines() if line.startswith("NO")] == ["NO"]
    assert "every asked control was observed" in table(take(plan()))
