"""The diff says in words what changed, and knows for every field which way is wider."""

import pytest

from ringfence.policy.diff import COMPARE, Change, diff, widens
from ringfence.policy.fields import FIELDS
from ringfence.policy.load import load, override
from ringfence.policy.model import Policy

# field, narrower value, wider value, the words for going wider, the words for going back
ORDERED: list[tuple[str, object, object, str, str]] = [
    (
        "isolation",
        "gvisor",
        "linux",
        "runs in isolation linux instead of gvisor",
        "runs in isolation gvisor instead",
    ),
    (
        "isolation",
        "auto",
        "linux",
        "runs in isolation linux instead of auto",
        "runs in isolation auto instead of",
    ),
    (
        "floor",
        "microvm",
        "gvisor",
        "needs at least isolation gvisor instead of microvm",
        "at least isolation microvm",
    ),
    (
        "user",
        "dedicated",
        "0",
        "runs as root inside (0:0) instead of a dedicated user",
        "runs as a dedicated user",
    ),
    ("user", "7:7", "7:0", "runs as user 7:0 inside instead of user 7:7 inside", "runs as user 7:7 inside"),
    ("capabilities", [], ["CHOWN"], "gains capability CAP_CHOWN", "loses capability CAP_CHOWN"),
    ("no_new_privileges", True, False, "may gain privileges", "may no longer gain privileges"),
    (
        "seccomp",
        "strict",
        "default",
        "filtered by seccomp profile default instead of strict",
        "profile strict",
    ),
    ("lsm", "required", "default", "only where the host has one", "needs a host with AppArmor or SELinux"),
    (
        "lsm",
        "default",
        "none",
        "runs without an AppArmor or SELinux label",
        "gets an AppArmor or SELinux label",
    ),
    (
        "filesystem.root",
        "read-only",
        "writable",
        "may write to the root filesystem",
        "may no longer write to the root",
    ),
    ("filesystem.tmp", "1MiB", "2MiB", "may fill /tmp with 2MiB instead of 1MiB", "1MiB instead of 2MiB"),
    ("filesystem.sysfs", False, True, "sees /sys", "no longer sees /sys"),
    (
        "filesystem.mounts",
        [],
        [{"source": "/srv", "target": "/data"}],
        "sees host path /srv at /data, read-only",
        "no longer sees host path /srv at /data",
    ),
    (
        "filesystem.mounts",
        [{"source": "/srv", "target": "/data"}],
        [{"source": "/srv", "target": "/data", "mode": "rw"}],
        "has /data writable instead of read-only",
        "has /data read-only instead of writable",
    ),
    (
        "filesystem.mounts",
        [{"source": "/srv", "target": "/data"}],
        [{"source": "/srv", "target": "/data", "allow_dangerous": True}],
        "/data may now show a dangerous host path",
        "/data may no longer show a dangerous host path",
    ),
    ("network.mode", "none", "egress", "may open connections to what is allowed", "has no network"),
    ("network.mode", "none", "ports", "may be reached at published ports", "has no network"),
    ("devices", [], ["/dev/kvm"], "may open device /dev/kvm:rw", "may no longer open device /dev/kvm:rw"),
    (
        "limits.memory",
        "256MiB",
        "512MiB",
        "may use 512MiB of memory instead of 256MiB",
        "256MiB of memory instead of",
    ),
    (
        "limits.swap",
        0,
        None,
        "may use any amount of swap instead of 0",
        "may use 0 of swap instead of any amount",
    ),
    ("limits.cpus", 1, 1.5, "may use 1.5 CPU instead of 1", "may use 1 CPU instead of 1.5"),
    ("limits.cpu_weight", 100, 200, "has CPU weight 200 instead of 100", "has CPU weight 100 instead of 200"),
    (
        "limits.cpuset",
        "0-1",
        None,
        "may use all CPUs instead of CPUs 0-1",
        "may use CPUs 0-1 instead of all CPUs",
    ),
    ("limits.cpuset", "1", "0-1", "may use CPUs 0-1 instead of CPUs 1", "may use CPUs 1 instead of CPUs 0-1"),
    ("limits.pids", 64, None, "may have any number of processes and threads in all", "may have 64 processes"),
    ("limits.stack", "1MiB", "2MiB", "may use 2MiB of stack", "may use 1MiB of stack"),
    ("limits.threads", 8, 16, "may have 16 processes and threads of its user instead of 8", "may have 8"),
    ("limits.open_files", 8, 16, "may open 16 files instead of 8", "may open 8 files instead of 16"),
    (
        "limits.file_size",
        0,
        None,
        "may write files of any size instead of 0",
        "may write files of 0 instead of any",
    ),
    ("limits.disk", "1MiB", "2MiB", "may write 2MiB to disk", "may write 1MiB to disk"),
    ("limits.inodes", 16, 17, "may create 17 files instead of 16", "may create 16 files"),
    ("limits.shm", "1MiB", "2MiB", "may use 2MiB of shared memory", "may use 1MiB of shared memory"),
    (
        "limits.io.read",
        "1MiB/s",
        None,
        "may read any amount from block devices instead of 1MiB/s",
        "may read 1MiB/s",
    ),
    ("limits.io.write", "1MiB/s", "2MiB/s", "may write 2MiB/s to block devices", "may write 1MiB/s"),
    ("limits.io.read_iops", 1, 2, "may read 2 times a second", "may read 1 times a second"),
    ("limits.io.write_iops", 1, None, "may write any number of times a second", "may write 1 times"),
    (
        "limits.time",
        "30s",
        None,
        "may run for any time instead of 30s",
        "may run for 30s instead of any time",
    ),
    ("limits.output", "1MiB", "2MiB", "may print 2MiB instead of 1MiB", "may print 1MiB"),
    (
        "host.smt",
        "refused",
        "allowed",
        "may run on a host with simultaneous",
        "needs a host without simultaneous",
    ),
    (
        "image.digest_required",
        True,
        False,
        "may be an image named without a digest",
        "must be an image named with its digest",
    ),
    (
        "image.allowed_registries",
        ["a.test"],
        ["a.test", "local"],
        "may be an image from local",
        "may no longer be an image from local",
    ),
    (
        "image.allowed_registries",
        [],
        None,
        "may be an image from anywhere",
        "may be an image only from nowhere",
    ),
    (
        "host.ksm",
        "refused",
        "allowed",
        "may run on a host that merges memory",
        "needs a host that does not merge",
    ),
    ("host.cpu_mitigations", "required", "any", "may run on a host with unmitigated", "are all mitigated"),
]
IN_A_NETWORK: list[tuple[str, object, object, str, str]] = [
    ("network.allow", [], ["a.test:443"], "may connect to a.test:443", "may no longer connect to a.test:443"),
    (
        "network.publish",
        [],
        ["80:80"],
        "is reachable from 127.0.0.1:80:80/tcp",
        "is no longer reachable from",
    ),
]
# field, one value, another, the words: neither is wider
UNORDERED: list[tuple[str, object, object, str]] = [
    ("user", "1:1", "2:2", "runs as user 2:2 inside instead of user 1:1 inside"),
    ("user", "dedicated", "2:2", "runs as user 2:2 inside instead of a dedicated user"),
    ("seccomp", "default", "/x.json", "is filtered by seccomp profile /x.json instead of default"),
    ("seccomp", "/x.json", "strict", "is filtered by seccomp profile strict instead of /x.json"),
    (
        "filesystem.mounts",
        [{"source": "/a", "target": "/x"}],
        [{"source": "/b", "target": "/x"}],
        "sees host path /b instead of /a at /x",
    ),
    ("network.mode", "egress", "ports", "may be reached at published ports; before, it may open connections"),
    ("limits.cpuset", "0", "1", "may use CPUs 1 instead of CPUs 0"),
    (
        "image.signatures",
        None,
        "/p.json",
        "needs an image that /p.json lets in, instead of this host's own policy.json",
    ),
    ("sysctls", {}, {"net.a": "1"}, "sets kernel parameter net.a to 1"),
    ("sysctls", {"net.a": "1"}, {"net.a": "2"}, "sets kernel parameter net.a to 2 instead of 1"),
    ("sysctls", {"net.a": "1"}, {}, "no longer sets kernel parameter net.a, which was 1"),
]


def with_value(key: str, value: object) -> Policy:
    """Return a policy that is open in everything that could contradict `key`."""
    base: dict[str, object] = {"limits.pids": None, "limits.threads": None}
    if (key, value) in ((k, v) for k, *vs in IN_A_NETWORK for v in vs):
        base["network.mode"] = "egress"
    return override(load("untrusted"), {**base, key: value})


def only(changes: tuple[Change, ...]) -> Change:
    """Return the one change there must be."""
    (change,) = changes
    return change


def test_every_field_has_a_direction() -> None:
    """The table of comparisons is the table of fields, and the cases below try every one that can differ."""
    assert list(COMPARE) == list(FIELDS)
    tried = {case[0] for case in (*ORDERED, *IN_A_NETWORK, *UNORDERED)}
    assert tried == set(FIELDS) - {"secrets"}


@pytest.mark.parametrize(
    ("key", "narrow", "wide", "wider", "narrower"),
    ORDERED + IN_A_NETWORK,
    ids=[c[0] for c in ORDERED + IN_A_NETWORK],
)
def test_fields_with_an_order(key: str, narrow: object, wide: object, wider: str, narrower: str) -> None:
    """Both directions are recognised, in words; only the wider one counts."""
    small, large = with_value(key, narrow), with_value(key, wide)
    there, back = diff(small, large), diff(large, small)
    assert (only(there).field, only(there).direction) == (key, "widens")
    assert wider in only(there).words
    assert (only(back).field, only(back).direction) == (key, "narrows")
    assert narrower in only(back).words
    assert (widens(there), widens(back)) == (True, False)


@pytest.mark.parametrize(("key", "one", "other", "words"), UNORDERED)
def test_fields_without_an_order(key: str, one: object, other: object, words: str) -> None:
    """What nobody can rank is said to change, and counts as wider."""
    changes = diff(with_value(key, one), with_value(key, other))
    assert (only(changes).field, only(changes).direction) == (key, "changes")
    assert words in only(changes).words
    assert widens(changes)


def test_hostile_only_narrows_untrusted() -> None:
    """The preset for attackers permits nothing that the default does not."""
    changes = diff(load("untrusted"), load("hostile"))
    assert changes
    assert {change.direction for change in changes} == {"narrows"}


def test_no_difference() -> None:
    """A policy permits what it permits."""
    assert diff(load("ci"), load("ci")) == ()
    assert not widens(())
