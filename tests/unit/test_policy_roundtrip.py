"""Properties over whole policies: dumps load back equal, digests and merging behave, bytes never crash."""

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ringfence.errors import PolicyError
from ringfence.policy.capabilities import CAPABILITIES
from ringfence.policy.diff import diff, widens
from ringfence.policy.digest import digest
from ringfence.policy.document import parse
from ringfence.policy.dump import dump_json, dump_yaml
from ringfence.policy.fields import FIELDS
from ringfence.policy.layer import Layer, merge, read
from ringfence.policy.load import PRESETS, load, loads, override
from ringfence.policy.model import Policy

NAMES = st.from_regex("[a-z]([a-z0-9-]{0,4}[a-z0-9])?", fullmatch=True)
PORTS = st.integers(1, 65535)
# Printable text with everything that YAML could misread.
TEXT = st.text("ab 017:#-'\"\\{}[],&*!|>%@`~é.+_enoyfENOY", min_size=1, max_size=12)
RATES = st.none() | st.integers(1, 2**63 - 1)
MOUNTS = st.fixed_dictionaries(
    {"source": TEXT.map(lambda text: f"/srv/x{text}"), "target": TEXT.map(lambda text: f"/data/{text}x")},
    optional={"mode": st.sampled_from(["ro", "rw"]), "allow_dangerous": st.booleans()},
)

VALUES: dict[str, st.SearchStrategy[object]] = {
    "isolation": st.sampled_from(["auto", "microvm"]),
    "floor": st.sampled_from(["linux", "gvisor", "microvm"]),
    "user": st.sampled_from(["dedicated", "0", "1000:0", "1000:1000"]),
    "capabilities": st.lists(st.sampled_from(CAPABILITIES), max_size=4),
    "no_new_privileges": st.booleans(),
    "seccomp": st.sampled_from(["default", "strict"]) | TEXT.map(lambda text: f"/{text}"),
    "lsm": st.sampled_from(["default", "none", "required"]),
    "filesystem.root": st.sampled_from(["read-only", "writable"]),
    "filesystem.tmp": st.integers(4096, 2**63 - 1),
    "filesystem.sysfs": st.booleans(),
    "filesystem.mounts": st.lists(MOUNTS, max_size=3, unique_by=lambda mount: mount["target"]),
    "network.mode": st.just("egress"),
    "network.allow": st.lists(st.builds("{}.test:{}".format, NAMES, PORTS), max_size=3),
    "network.publish": st.lists(PORTS, max_size=3, unique=True).map(
        lambda ports: [f"{port}:{65536 - port}" for port in ports]
    ),
    "devices": st.lists(NAMES.map(lambda name: f"/dev/{name}:r"), max_size=2),
    "limits.memory": st.integers(1 << 20, 2**63 - 1),
    "limits.swap": st.none() | st.integers(0, 2**63 - 1),
    "limits.cpus": st.none() | st.floats(0.01, 8192),
    "limits.cpu_weight": st.integers(1, 10_000),
    "limits.cpuset": st.none() | st.sets(st.integers(0, 99), min_size=1).map(lambda s: ",".join(map(str, s))),
    "limits.pids": st.none() | st.integers(100, 4_194_304),
    "limits.stack": st.integers(1 << 17, 2**63 - 1),
    "limits.threads": st.integers(1, 100),
    "limits.open_files": st.integers(8, 1 << 20),
    "limits.file_size": st.none() | st.integers(0, 2**63 - 1),
    "limits.disk": st.integers(4096, 2**63 - 1),
    "limits.inodes": st.integers(16, 2**31 - 1),
    "limits.shm": st.integers(4096, 2**63 - 1),
    "limits.io.read": RATES,
    "limits.io.write": RATES,
    "limits.io.read_iops": st.none() | st.integers(1, 2**32 - 2),
    "limits.io.write_iops": st.none() | st.integers(1, 2**32 - 2),
    "limits.time": st.none() | st.integers(1, 10**9).map(lambda ms: ms / 1000),
    "limits.output": st.none() | st.integers(1, 2**63 - 1),
    "sysctls": st.dictionaries(NAMES.map(lambda name: f"net.{name}"), TEXT, max_size=3),
    "secrets": st.just([]),
    "image.digest_required": st.booleans(),
    "image.allowed_registries": st.none()
    | st.lists(st.just("local") | st.builds("{}.test:{}/{}".format, NAMES, PORTS, NAMES), max_size=3),
    "image.signatures": st.none() | TEXT.map(lambda text: f"/{text}"),
    "host.smt": st.sampled_from(["allowed", "refused"]),
    "host.ksm": st.sampled_from(["allowed", "refused"]),
    "host.cpu_mitigations": st.sampled_from(["any", "required"]),
}
BASE = override(load("untrusted"), {"limits.pids": 4096, "network.mode": "egress"})
# A few fields at a time: drawing all of them costs seconds and finds nothing more.
CHOSEN = st.lists(
    st.sampled_from(list(VALUES)).flatmap(lambda key: st.tuples(st.just(key), VALUES[key])), max_size=6
).map(dict)
POLICIES = CHOSEN.map(lambda values: override(BASE, values))


def test_every_field_is_tried() -> None:
    """The properties below speak about the whole model."""
    assert list(VALUES) == list(FIELDS)


@settings(max_examples=40, deadline=None)
@given(POLICIES)
def test_dumps_load_back_equal(policy: Policy) -> None:
    """YAML and JSON say everything about a policy, whatever text stands in it."""
    assert loads(dump_yaml(policy).encode(), source="f") == policy
    assert loads(dump_json(policy).encode(), source="f") == policy


@pytest.mark.parametrize(
    "text", ["017", "0x1f", "1e3", "1.5", "null", "~", "true", "no", "a: b", "a #b", "- a", ".inf", "'", "é"]
)
def test_text_that_yaml_could_misread_is_quoted(text: str) -> None:
    """Text that would read back as a number, a flag or nothing stays text."""
    policy = override(BASE, {"sysctls": {"net.a": text}})
    assert loads(dump_yaml(policy).encode(), source="f").sysctls == {"net.a": text}


@settings(max_examples=40, deadline=None)
@given(POLICIES, POLICIES)
def test_diff_and_digest_tell_policies_apart(a: Policy, b: Policy) -> None:
    """No difference, equal digests and equality are the same thing."""
    assert (diff(a, b) == ()) == (a == b) == (digest(a) == digest(b))


@settings(max_examples=40, deadline=None)
@given(POLICIES, POLICIES)
def test_diff_backwards_is_the_reverse(a: Policy, b: Policy) -> None:
    """What widens one way narrows the other way; what has no order has none either way."""
    turned = {"widens": "narrows", "narrows": "widens", "changes": "changes"}
    there = sorted((change.field, change.direction) for change in diff(a, b))
    back = sorted((change.field, turned[change.direction]) for change in diff(b, a))
    assert there == back


@settings(max_examples=40, deadline=None)
@given(POLICIES, POLICIES)
def test_both_ways_narrow_only_when_equal(a: Policy, b: Policy) -> None:
    """Two different policies cannot each be inside the other: one way at least exits 1."""
    assert widens(diff(a, b)) or widens(diff(b, a)) or a == b


LAYERS = CHOSEN.map(lambda values: Layer(values, {}))


@settings(max_examples=40, deadline=None)
@given(LAYERS, LAYERS, LAYERS)
def test_merging_is_associative(a: Layer, b: Layer, c: Layer) -> None:
    """A chain of extends means the same however it is cut into files."""
    assert merge(merge(a, b), c) == merge(a, merge(b, c))
    assert merge(a, a) == a
    assert merge(Layer({}, {}), a) == merge(a, Layer({}, {})) == a


def test_merging_files_is_merging_layers() -> None:
    """The presets are what merging their own lines over untrusted gives."""
    untrusted = msgspec.to_builtins(load("untrusted"))
    for name in PRESETS:
        assert msgspec.to_builtins(load(name)).keys() == untrusted.keys()
    own = read(parse(b"limits: {pids: 70}", "f"), "/")
    assert own.values == {"limits.pids": 70}
    assert str(own.places["limits.pids"]) == "f:1:16"


WORDS = st.sampled_from(
    [
        *(key for name in FIELDS for key in name.split(".")),
        *[
            "extends",
            "untrusted",
            "hostile",
            "0",
            "1MiB",
            "null",
            "true",
            "/",
            "..",
            "a:1",
            "[",
            "]",
            "{",
            "}",
            "source",
            "target",
            "ro",
        ],
        *(
            ": ",
            ", ",
            "\n",
            "\n  ",
            "- ",
            '"',
            "'",
            "\t",
            "\x00",
            " ",
            "#",
            "|",
            ".inf",
            "-1",
            "é",
            "*a",
            "&a ",
        ),
    ]
)


@settings(max_examples=200, deadline=None)
@given(st.binary(max_size=100) | st.lists(WORDS, max_size=25).map("".join).map(str.encode))
def test_random_text_never_crashes(data: bytes) -> None:
    """Any bytes are a policy, which dumps and loads, or a PolicyError of one line."""
    try:
        policy = loads(data, source="f")
    except PolicyError as error:
        assert "\n" not in str(error)
    else:
        assert loads(dump_yaml(policy).encode(), source="f") == policy


@settings(deadline=None)
@given(
    st.sampled_from([*FIELDS, "limits", "", "x"]),
    st.recursive(
        st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
        lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=6), inner, max_size=3),
    ),
)
def test_random_overrides_never_crash(key: str, value: object) -> None:
    """Any builtin value for any key is a policy or a PolicyError."""
    try:
        assert isinstance(override(BASE, {key: value}), Policy)
    except PolicyError as error:
        assert "\n" not in str(error)
