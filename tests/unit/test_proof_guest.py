"""The proof of a sandbox with a kernel of its own: its parts are looked at, its report is compared and never trusted.

data/gvisor-report.json is what runsc release-20240729.0 really said of a job of the plan that is made here.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import msgspec
import plan_inputs as inputs
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ringfence.host.facts import GvisorFacts, Runtime
from ringfence.plan.document import Plan
from ringfence.plan.make import make_plan
from ringfence.proof import guest as guest_module
from ringfence.proof import observe
from ringfence.proof.guest import Guest, look, reported
from ringfence.proof.observe import Subject, mountinfo
from ringfence.proof.prove import failures, prove
from ringfence.proof.report import table
from ringfence.runtime.base import Instance

TYPE_CHECKING = False
if TYPE_CHECKING:
    from ringfence.plan.document import Value
    from ringfence.proof.observe import Seen
    from ringfence.proof.prove import Line, Proof

ID, BASE, SIZE = "0123456789ab", 0x70000000, 65536
RUNSC = Runtime(
    path="/usr/bin/runsc", version=(20240729, 0, 0), version_text="runsc version release-20240729.0"
)
HOST = msgspec.structs.replace(
    inputs.ROOT_V1,
    gvisor=GvisorFacts(platforms=("systrap",)),
    runtimes={**inputs.ROOT_V1.runtimes, "runsc": RUNSC},
)
TRUE: dict[str, str] = json.loads((Path(__file__).parent / "data/gvisor-report.json").read_text())
# Whose lines the report has to carry; whatever else a plan asks is seen from the host.
FROM_HOST = ("sentry.", "gofer.", "door.", "cgroup.", "mount:", "mounts.")
GOFER = (
    "121 118 0:40 / / ro,nosuid,nodev,relatime - overlay overlay ro,lowerdir=skel:l0,redirect_dir=on",
    "122 121 0:43 / /tmp rw,nosuid,nodev,relatime - tmpfs tmpfs rw,size=65536k,nr_inodes=16384,mode=755",
    "123 121 0:44 / /work rw,nosuid,nodev,relatime - tmpfs tmpfs rw,size=131072k,nr_inodes=16384,mode=755",
    "124 123 0:44 / /work rw,nosuid,nodev,relatime - tmpfs tmpfs rw,size=131072k,nr_inodes=16384,mode=755",
    "124 121 0:62 / /dev/shm rw,nosuid,nodev,relatime - tmpfs tmpfs rw,size=16384k,nr_inodes=16384,mode=1777,inode64",
)


@pytest.fixture
def plan() -> Plan:
    return make_plan(inputs.policy(isolation="gvisor"), inputs.BASE, HOST)


@pytest.fixture
def child() -> Iterator[int]:
    """A process of the host's, for any part of a sandbox."""
    with subprocess.Popen([sys.executable, "-S", "-c", "input()"], stdin=subprocess.PIPE) as process:
        yield process.pid
        process.kill()


def instance(memory_base_bytes: int = 0) -> Instance:
    return Instance(
        id=ID,
        directory="/run/x",
        staging="/run/s",
        base=BASE,
        cgroup_path=f"/ringfence/{ID}",
        memory_base_bytes=memory_base_bytes,
    )


def subject_of(pid: int) -> Subject:
    return Subject(pid=pid, base=BASE, size=SIZE, cgroup=None, rules=())


def parts(pid: int, report: dict[str, str] | None = None) -> Guest:
    """Take one process for all three parts."""
    return Guest(
        report=TRUE if report is None else report, parts=dict.fromkeys(("sentry", "gofer", "door"), pid)
    )


def proof_of(
    plan: Plan, monkeypatch: pytest.MonkeyPatch, report: dict[str, str], descriptors: int = 3
) -> Proof:
    """Take a proof of `report`; what the host sees is as asked."""

    def looked(plan: Plan, _subject: object, guest: Guest, count: int) -> tuple[Seen, Seen]:
        asked = {c["name"]: guest_module.asked_of(c, plan, instance()) for c in plan["controls"]}
        seen: Seen = {name: (value, "kernel") for name, value in asked.items() if name.startswith(FROM_HOST)}
        return seen, real(plan, subject_of(0), guest, count)[1]

    real = look
    monkeypatch.setattr(guest_module, "look", looked)
    return prove(plan, instance(), subject_of(0), reported_descriptors=descriptors, guest=parts(0, report))


def lines_of(proof: Proof) -> dict[str, Line]:
    return {line["control"]: line for line in proof["lines"]}


def reported_names(plan: Plan) -> set[str]:
    return {c["name"] for c in plan["controls"] if not c["name"].startswith(FROM_HOST)}


def values(report: dict[str, str]) -> dict[str, Value]:
    return {name: value for name, (value, _) in reported(report).items()}


def test_what_gvisor_really_says_is_what_was_asked(plan: Plan, monkeypatch: pytest.MonkeyPatch) -> None:
    """A true report of such a job holds; its lines are called reported and name the file, all others observed."""
    proof = proof_of(plan, monkeypatch, TRUE)
    assert failures(proof) == []
    assert proof["holds"]
    lines = lines_of(proof)
    names = reported_names(plan)
    assert {name for name, line in lines.items() if line["vantage"] == "reported"} == names
    assert {"credentials.uid", "rlimit.nproc", "kernel", "hostname", "guest.mount:/sys"} < names
    assert lines["credentials.uid"]["source"] == "sentry: /proc/PID/status"
    assert lines["kernel"]["source"] == "sentry: /proc/version"
    assert lines["descriptors"]["source"] == "agent"
    assert (lines["sentry.program"]["asked"], lines["sentry.program"]["vantage"]) == (RUNSC.path, "observed")
    assert proof["runtime"] == "runsc version release-20240729.0 (systrap) in crun version 1.8.1"


Lie = tuple[str, str, str, "dict[str, Value]"]
# What is said, in place of what, and the controls that must fail of it.
LIES: list[Lie] = [
    ("status", "Uid:\t1000\t1000\t1000\t1000", "Uid:\t1000\t0\t1000\t1000", {"credentials.uid": -1}),
    ("status", "Uid:\t1000\t1000\t1000\t1000", "Uid:\t1000", {"credentials.uid": -1}),
    ("status", "Gid:\t1000\t1000\t1000\t1000", "Gid:\t0\t0\t0\t0", {"credentials.gid": 0}),
    ("status", "Groups:\t ", "Groups:\t0 5", {"credentials.groups": ["0", "5"]}),
    (
        "status",
        "CapEff:\t" + "0" * 16,
        "CapEff:\t" + "0" * 15 + "1",
        {"capabilities.effective": ["CAP_CHOWN"]},
    ),
    ("status", "CapBnd:\t" + "0" * 16, "CapBnd:\t8" + "0" * 15, {"capabilities.bounding": ["CAP_63"]}),
    ("status", "Seccomp:\t2", "Seccomp:\t0", {"seccomp.mode": "off"}),
    ("status", "Seccomp:\t2", "Seccomp:\tmaybe", {"seccomp.mode": "maybe"}),
    (
        "limits",
        "Max processes             65                   65 ",
        "Max processes             65                   650",
        {"rlimit.nproc": "65 soft, 650 hard"},
    ),
    (
        "limits",
        "256                  256",
        "unlimited            unlimited",
        {"rlimit.nofile": "unlimited soft, unlimited hard"},
    ),
    ("mountinfo", "/sys ro,noexec", "/sys rw,noexec", {"guest.mount:/sys": "tmpfs rw size=4096"}),
    ("mountinfo", "/sys ro,noexec", "/sys ro,rw", {"guest.mount:/sys": "tmpfs ro,rw size=4096"}),
    ("mountinfo", "size=4096", "size=4k", {}),
    ("mountinfo", "size=4096", "size=8k", {"guest.mount:/sys": "tmpfs ro size=8192"}),
    ("mountinfo", "size=4096", "mode=755", {"guest.mount:/sys": "tmpfs ro"}),
    ("net/dev", "    lo:", "    lo: 0\n  eth0:", {"network.interfaces": ["eth0", "lo"]}),
    ("hostname", ID, ID + "\n", {"hostname": ID + "\n"}),
    ("no_new_privileges", "1", "0", {"no_new_privileges": False}),
]


@pytest.mark.parametrize("lie", LIES, ids=lambda lie: repr(lie[2]))
def test_another_value_in_a_report_fails_its_control_alone(
    plan: Plan, monkeypatch: pytest.MonkeyPatch, lie: Lie
) -> None:
    """Each is compared exactly: another value does not hold, and the message says that it was reported."""
    item, old, new, shown = lie
    assert TRUE[item].count(old) == 1
    proof = proof_of(plan, monkeypatch, TRUE | {item: TRUE[item].replace(old, new)})
    assert {line["control"]: line["observed"] for line in proof["lines"] if line["ok"] is False} == shown
    assert proof["holds"] is (not shown)
    assert all(", reported " in said for said in failures(proof))


def test_a_kernel_with_the_hosts_version_is_the_hosts(plan: Plan, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever reports the very text of this host's /proc/version shows that nothing was between the two."""
    proof = proof_of(plan, monkeypatch, TRUE | {"version": Path("/proc/version").read_text()})
    assert failures(proof) == ["kernel: asked own, reported the host's"]


@pytest.mark.parametrize(
    ("item", "silent"),
    [
        ("status", {"credentials", "capabilities", "seccomp"}),
        ("limits", {"rlimit"}),
        ("mountinfo", {"guest"}),
        ("net/dev", {"network"}),
        ("version", {"kernel"}),
        ("hostname", {"hostname"}),
        ("no_new_privileges", {"no_new_privileges"}),
    ],
)
@pytest.mark.parametrize("left", [None, "", "\n", "\0\n", "\n\n\n", "x" * 300_000 + "\n", "9" * 5000 + "\n"])
def test_what_is_not_reported_does_not_hold(
    plan: Plan, monkeypatch: pytest.MonkeyPatch, item: str, silent: set[str], left: str | None
) -> None:
    """An item that is left out, empty or senseless: its controls fail, every one of them and no other."""
    report = {name: text for name, text in TRUE.items() if name != item}
    if left is not None:
        report[item] = left
    if item == "version" and left is not None and left.strip():
        silent = set()  # any text but that of the host is the version of another kernel
    proof = proof_of(plan, monkeypatch, report)
    failed = {line["control"] for line in proof["lines"] if line["ok"] is False}
    expected = {name for name in reported_names(plan) if name.partition(".")[0] in silent}
    assert failed == expected
    assert bool(failed) is bool(silent)
    assert proof["holds"] is not bool(failed)


@pytest.mark.parametrize("item", sorted(TRUE.keys() - {"hostname", "no_new_privileges"}))
def test_a_file_that_is_cut_off_says_nothing(item: str) -> None:
    """Half a line can say what the whole one does not: "Groups:" without its groups, size=4096 of size=40960."""
    maps = {name: TRUE[name] for name in ("uid_map", "gid_map")}
    alone = (maps if item in maps else {}) | {item: TRUE[item]}
    assert values(alone)
    for end in range(len(TRUE[item])):
        if not TRUE[item][:end].endswith("\n"):
            assert values(alone | {item: TRUE[item][:end]}) == {}, end


@pytest.mark.parametrize("item", ["status", "limits", "mountinfo"])
def test_lines_that_are_missing_are_not_made_up(item: str) -> None:
    """Cut between two lines, a text says of its controls what it said before, or nothing."""
    whole = values({item: TRUE[item]})
    lines = TRUE[item].splitlines(keepends=True)
    for count in range(len(lines)):
        assert values({item: "".join(lines[:count])}).items() <= whole.items()


HOSTILE = st.text(max_size=300) | st.builds(
    lambda text, place, junk: text[: place % (len(text) + 1)] + junk + text[place % (len(text) + 1) :],
    st.sampled_from(sorted(TRUE.values())),
    st.integers(min_value=0, max_value=5000),
    st.text(alphabet="0123456789abcdef-=:|,/\\ \t\n\x00\x0b\u2028\ud800²٣", max_size=40),
)


@given(st.dictionaries(st.sampled_from([*TRUE, "more"]), HOSTILE, max_size=9))
def test_no_report_raises(report: dict[str, str]) -> None:
    """Whatever the texts are: values of a bounded size, or none."""
    for value, source in reported(report).values():
        assert source.startswith("sentry: ")
        assert len(json.dumps(value)) < 2_000_000
        if isinstance(value, list):
            assert len(value) <= 65
            assert all(len(word) <= 257 for word in value)
        elif isinstance(value, str):
            assert len(value) <= 257


@pytest.mark.parametrize(
    ("item", "text"),
    [
        ("status", "CapBnd:\t" + "f" * 250_000),
        ("status", "Uid:\t" + "\t".join(["9" * 60_000] * 4)),
        ("status", "Seccomp_filters:\t" + "9" * 250_000),
        ("status", "Groups:\t" + "1 " * 120_000),
        ("limits", "\n" + ("Max processes".ljust(26) + "9" * 42 + "\n") * 3000),
        ("mountinfo", "1 1 0:1 / /dev/shm rw - tmpfs none rw,size=" + "9" * 4299 + "g"),
        ("mountinfo", "1 1 0:1 / /x rw - tmpfs none rw\n" * 8000),
        ("net/dev", "|\n|\n" + "".join(f"{number}:\n" for number in range(40_000))),
        ("uid_map", "0 0 1\n" * 40_000),
    ],
    ids=range(9),
)
def test_the_largest_report_costs_little(item: str, text: str) -> None:
    """A quarter of a megabyte of the worst: no time, and next to nothing of it in the proof."""
    before = time.process_time()
    told = reported({"gid_map": "\n", item: text + "\n"})
    assert time.process_time() - before < 1
    assert len(json.dumps(told)) < 40_000


@pytest.mark.parametrize("count", [0, 2, 4, 65, 4_000_000_000])
def test_descriptors_are_counted_within_bounds(
    plan: Plan, monkeypatch: pytest.MonkeyPatch, count: int
) -> None:
    """Any count but three does not hold, and a senseless one does not fill the memory."""
    proof = proof_of(plan, monkeypatch, TRUE, descriptors=count)
    assert [said.partition(":")[0] for said in failures(proof)] == ["descriptors"]
    assert len(json.dumps(lines_of(proof)["descriptors"])) < 1000


def test_what_was_seen_counts_before_what_was_told(plan: Plan, monkeypatch: pytest.MonkeyPatch) -> None:
    """A report cannot speak for a control that the host sees, nor for a part of the sandbox."""
    liar = TRUE | {
        "sentry.seccomp.mode": "filter",
        "mountinfo": TRUE["mountinfo"] + "1 1 0:1 / / ro - overlay o ro\n",
    }
    seen: Seen = {"credentials.uid": (0, "kernel")}
    monkeypatch.setattr(guest_module, "look", lambda *_: (seen, reported(liar)))
    lines = lines_of(prove(plan, instance(), subject_of(0), reported_descriptors=3, guest=parts(0, liar)))
    assert (lines["credentials.uid"]["observed"], lines["credentials.uid"]["vantage"]) == (0, "observed")
    for name in ("sentry.seccomp.mode", "mount:/", "cgroup.memory_bytes"):
        assert (lines[name]["ok"], lines[name]["vantage"]) == (False, "not observable")


@pytest.mark.parametrize("rootless", [False, True])
def test_without_a_guest_nothing_holds(plan: Plan, child: int, rootless: bool) -> None:
    """A caller that forgets the report gets a proof that fails in every line that could; without root as well."""
    plan["rootless"] = rootless
    proof = prove(plan, instance(), subject_of(child), reported_descriptors=3)
    names = [control["name"] for control in plan["controls"]]
    assert [line["control"] for line in proof["lines"] if line["ok"] is False] == names
    assert not proof["holds"]
    assert {line["ok"] for line in proof["lines"]} == {False, None}


def test_memory_is_the_policys_beyond_what_the_kernel_inside_uses(plan: Plan, child: int) -> None:
    """The base is added to the asked memory, and to nothing else; 0 adds nothing."""
    asked = [
        {
            line["control"]: line["asked"]
            for line in prove(plan, instance(base), subject_of(child), reported_descriptors=3)["lines"]
        }
        for base in (0, 64 << 20)
    ]
    assert asked[0]["cgroup.memory_bytes"] == 256 << 20
    assert asked[1] == asked[0] | {"cgroup.memory_bytes": 320 << 20}


@pytest.mark.parametrize(
    ("rootless", "size", "sentry", "others"),
    [
        (False, 65536, f"65534 {BASE + 65534} 1", f"0 {BASE} 65536"),
        (
            True,
            4096,
            f"65534 {BASE + 4095} 1",
            f"0 {os.geteuid()} 1; 1 {BASE + 1} 4094; 65534 {BASE + 4095} 1",
        ),
    ],
)
def test_the_range_of_each_part(plan: Plan, rootless: bool, size: int, sentry: str, others: str) -> None:
    """The sentry has one id of the sandbox's range in its namespace, the other parts have the whole of it."""
    plan["rootless"], plan["user"]["range_size"] = rootless, size
    asked = {
        part: guest_module.asked_of(
            {"name": f"{part}.credentials.range", "field": "user", "asked": None}, plan, instance()
        )
        for part in ("sentry", "gofer", "door")
    }
    assert asked == {"sentry": sentry, "gofer": others, "door": others}


def test_without_root_the_callers_own_id_stands_for_root_inside(plan: Plan, child: int) -> None:
    """A part that runs as the caller is 0 of a user's sandbox; of one of root's it is not of its range."""
    asked = [("sentry.credentials.uid", "user", 0), ("sentry.credentials.gid", "user", 0)]
    plan["controls"] = [{"name": name, "field": field, "asked": value} for name, field, value in asked]
    for rootless in (True, False):
        plan["rootless"] = rootless
        proof = prove(plan, instance(), subject_of(child), reported_descriptors=3, guest=parts(child))
        assert [line["ok"] for line in proof["lines"] if line["control"].startswith("sentry")] == [
            rootless
        ] * 2


def test_parts_are_looked_at_as_processes_of_the_host(plan: Plan, child: int) -> None:
    """Each part's lines are those of the process that was named, under its own prefix, with that process as source."""
    seen, told = look(plan, subject_of(child), parts(child), 3)
    own, _ = look(
        plan, subject_of(child), Guest(report={}, parts={"sentry": child, "gofer": os.getpid(), "door": 0}), 3
    )
    status = observe.status(Path(f"/proc/{child}/status").read_text(), "")
    for part in ("sentry", "gofer", "door"):
        for name in ("capabilities.bounding", "no_new_privileges", "seccomp.mode", "seccomp.filters"):
            assert seen[f"{part}.{name}"] == (status[name][0], f"/proc/{child}/status")
        assert seen[f"{part}.namespace.network"][0] == "shared with process self"
        assert str(seen[f"{part}.credentials.uid"][0]).startswith("-")  # not of the sandbox's range
    assert own["gofer.namespace.user"][1] == f"/proc/{os.getpid()}/ns/user"
    assert not [name for name in own if name.startswith("door.")]  # there is no process 0
    assert not any(name.startswith(("sentry.", "gofer.", "door.")) for name in told)


def test_a_process_of_the_host_is_no_part_of_a_sandbox(plan: Plan, child: int) -> None:
    """Taken for the sentry, an ordinary process fails where it matters: ids, namespaces, program, filter."""
    proof = prove(plan, instance(), subject_of(child), reported_descriptors=3, guest=parts(child))
    failed = {line["control"] for line in proof["lines"] if line["ok"] is False}
    must = {"credentials.uid", "credentials.gid", "namespace.user", "namespace.network", "namespace.pid"}
    assert failed >= {f"{part}.{name}" for part in ("sentry", "gofer", "door") for name in must}
    assert failed >= {
        "sentry.program",
        "gofer.program",
        "sentry.cgroup.membership",
        "mount:/",
        "mounts.others",
    }


def test_the_program_is_the_very_file(plan: Plan, child: int, tmp_path: Path) -> None:
    """The planned path is shown only if its file is what the process executes; a copy of it is another program."""
    guest = plan["guest"]
    assert guest is not None
    running = os.readlink(f"/proc/{child}/exe")

    def shown(program: str) -> Value:
        guest["program"] = program
        return look(plan, subject_of(child), parts(child), 3)[0]["sentry.program"][0]

    link, copy = tmp_path / "link", tmp_path / "copy"
    link.symlink_to(running)
    shutil.copy(running, copy)
    assert shown(running) == running
    assert shown(str(link)) == str(link)
    assert shown(str(copy)) == running
    assert shown(str(tmp_path / "gone")) == running


def test_an_ended_part_is_not_observed(plan: Plan) -> None:
    """Nothing is seen of a process that is gone, and nothing is raised."""
    gone = subprocess.Popen(["true"])
    gone.wait()
    seen, _ = look(plan, subject_of(gone.pid), parts(gone.pid), 3)
    assert seen == {}


def served(plan: Plan, monkeypatch: pytest.MonkeyPatch, lines: tuple[str, ...]) -> dict[str, Value]:
    monkeypatch.setattr(guest_module, "mounts", lambda _: mountinfo("\n".join(lines) + "\n"))
    seen, _ = look(plan, subject_of(0), parts(0), 3)
    return {name: value for name, (value, _) in seen.items() if name.startswith(("mount:", "mounts."))}


def test_the_gofers_mounts_are_the_jobs(plan: Plan, monkeypatch: pytest.MonkeyPatch) -> None:
    """What the gofer can serve is exactly what the plan asks; one listed twice counts as it is on top."""
    asked = {c["name"]: c["asked"] for c in plan["controls"] if c["name"].startswith("mount")}
    assert asked.keys() >= {"mount:/", "mount:/tmp", "mount:/work", "mounts.others"}
    assert served(plan, monkeypatch, GOFER) == asked
    above = (*GOFER, GOFER[3].replace(" rw,nosuid,nodev", " rw,nosuid"))
    assert served(plan, monkeypatch, above)["mount:/work"] == "tmpfs rw,nosuid size=134217728 inodes=16384"
    more = (*GOFER, "130 121 254:0 /etc /etc rw - ext4 /dev/vda rw")
    assert served(plan, monkeypatch, more)["mounts.others"] == ["/etc"]
    assert "mount:/work" not in served(plan, monkeypatch, GOFER[:2])
    assert served(plan, monkeypatch, (*GOFER, "no mount")) == {}


def others(plan: Plan, mountinfo: str) -> Value:
    _, told = look(plan, subject_of(0), parts(0, {"mountinfo": mountinfo}), 3)
    return told["guest.mounts.others"][0] if "guest.mounts.others" in told else "not reported"


def test_mounts_of_the_kernel_inside_are_the_plans(plan: Plan) -> None:
    """One that nobody asked for is named, and so is a second one on a target; a text cut off says nothing."""
    text = TRUE["mountinfo"]
    assert others(plan, text) == []
    more = "30 16 0:30 / /mnt rw - tmpfs none rw\n"
    assert others(plan, text + more) == ["/mnt"]
    assert others(plan, text + more.replace("/mnt", "/work")) == ["/work"]
    assert others(plan, text + more * 100) == [*["/mnt"] * 64, "and 36 more"]
    for senseless in ("", text[:-1], text + "no mount\n"):
        assert others(plan, senseless) == "not reported"


def test_the_sentrys_own_mounts(plan: Plan, monkeypatch: pytest.MonkeyPatch) -> None:
    """What the kernel inside has of files on the host is one empty root; everything more is shown."""
    asked = {c["name"]: c["asked"] for c in plan["controls"]}["sentry.mounts"]
    root = "43 60 0:54 / / ro,relatime - tmpfs runsc-root rw,uid=1000065534,gid=1000065534"

    def seen(*lines: str) -> Value:
        monkeypatch.setattr(guest_module, "mounts", lambda _: mountinfo("\n".join(lines) + "\n"))
        return look(plan, subject_of(0), parts(0), 3)[0]["sentry.mounts"][0]

    assert seen(root) == asked
    assert seen(root.replace(" ro,", " rw,")) == ["/ tmpfs rw"]
    assert seen(root, "44 43 254:0 / /host ro - ext4 /dev/vda rw") == ["/ tmpfs ro", "/host ext4 ro"]


def test_the_table_keeps_the_parts_apart(plan: Plan, monkeypatch: pytest.MonkeyPatch) -> None:
    """The job's lines come first, then each part's after a blank line; the verdict counts what was only reported."""
    proof = proof_of(plan, monkeypatch, TRUE)
    text = table(proof)
    count = len(reported_names(plan))
    assert f"every asked control was observed, {count} of them only reported" in text
    groups = [group.splitlines() for group in text.split("\n\n")]
    assert [{line[4:].partition(".")[0] for line in group} for group in groups[1:]] == [
        {"sentry"},
        {"gofer"},
        {"door"},
    ]
    assert sum(map(len, groups)) == 4 + len(proof["lines"])


def test_the_table_says_how_a_list_differs(plan: Plan, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two long lists that begin alike are not shown as the same cut text."""
    proof = proof_of(plan, monkeypatch, TRUE)
    line = lines_of(proof)["gofer.capabilities.effective"]
    asked = line["asked"]
    assert isinstance(asked, list)
    line["observed"], line["ok"] = [*asked[1:], "CAP_SYS_ADMIN"], False
    assert f"also CAP_SYS_ADMIN; without {asked[0]}" in table(proof)


def listed(heading: str) -> set[str]:
    """Return the names in the table of a section of the page on proofs."""
    page = (Path(__file__).parents[2] / "docs/proof.md").read_text()
    section = page.partition(f"\n### {heading}\n")[2].partition("\n## ")[0].partition("\n### ")[0]
    rows = re.findall(r"^\| (`[^|]*) \|", section, re.M)
    names = [name for row in rows for name in re.findall(r"`([^`]+)`", row)]
    assert len(names) == len(set(names))
    return set(names)


def test_the_page_on_proofs_lists_every_control_of_this_tier() -> None:
    """What is reported, and what is seen of each part, is in the tables of proof.md, and nothing else is."""
    policy = inputs.policy(isolation="gvisor", limits__cpuset="0")
    v2 = msgspec.structs.replace(HOST, cgroup=inputs.ROOT_V2.cgroup)
    names = {c["name"] for host in (HOST, v2) for c in make_plan(policy, inputs.BASE, host)["controls"]}
    told = {name for name in names if not name.startswith(FROM_HOST)}
    assert listed("What the sentry reports") == told
    assert listed("What the host sees of its parts") == {
        name for name in names if name.startswith(("sentry.", "gofer.", "door."))
    }


def test_a_linux_proof_loads_nothing_of_this(child: int) -> None:
    """What is only for a kernel of its own is imported only for one."""
    code = (
        "import json, sys; from ringfence.proof.prove import prove; from ringfence.proof.observe import Subject\n"
        "from ringfence.runtime.base import Instance\n"
        "one = Instance(id='a', directory='/a', staging='/b', base=1, cgroup_path='')\n"
        f"who = Subject(pid={child}, base=1, size=1, cgroup=None, rules=())\n"
        "prove(json.load(sys.stdin), one, who, reported_descriptors=3)\n"
        "print('ringfence.proof.guest' in sys.modules)"
    )
    told = []
    for isolation in ("linux", "gvisor"):
        host, policy = HOST, inputs.policy(isolation=isolation)
        made = json.dumps(make_plan(policy, inputs.BASE, host))
        done = subprocess.run(
            [sys.executable, "-c", code], input=made, capture_output=True, text=True, check=True
        )
        told.append(done.stdout.strip())
    assert told == ["False", "True"]
