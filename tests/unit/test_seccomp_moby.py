"""Somebody's own profile: what is read, what is refused, what is taken out."""

import json
from contextlib import suppress

import pytest
from docker_profile import allow, docker_default, document, when
from hypothesis import given
from hypothesis import strategies as st

from ringfence.errors import PolicyError
from ringfence.plan import seccomp_calls as calls
from ringfence.plan.seccomp import seccomp_for
from ringfence.plan.seccomp_match import decide

ALLOWED, EPERM, ENOSYS = ("SCMP_ACT_ALLOW", 0), ("SCMP_ACT_ERRNO", 1), ("SCMP_ACT_ERRNO", 38)
NEW_USER, NEW_NET = 0x10000000, 0x40000000


def read(data, *, arch="x86_64", capabilities=(), kernel=(6, 1)):
    return seccomp_for("own.json", arch=arch, capabilities=capabilities, moby=data, kernel=kernel)


def deny(names, *args, **more):
    return {**allow(names, *args, **more), "action": "SCMP_ACT_ERRNO"}


def test_dockers_profile_is_read_as_docker_reads_it():
    """Capabilities, architecture and kernel decide which entries count; without any, nothing is taken out."""
    plan = read(docker_default())
    assert decide(plan.oci, "read") == ALLOWED
    assert decide(plan.oci, "ptrace") == ALLOWED
    assert decide(plan.oci, "arch_prctl") == ALLOWED
    assert decide(plan.oci, "chroot") == EPERM
    assert decide(plan.oci, "clone3") == ENOSYS
    assert "reduced" not in plan.summary
    assert decide(read(docker_default(), kernel=(4, 7)).oci, "ptrace") == EPERM
    assert decide(read(docker_default(), arch="aarch64").oci, "arch_prctl") == EPERM
    assert decide(read(docker_default(), capabilities=("CAP_SYS_CHROOT",)).oci, "chroot") == ALLOWED


def test_capabilities_do_not_open_what_no_sandbox_gets():
    """Docker gives CAP_SYS_ADMIN mount, bpf and setns; here they stay shut, and the summary says so."""
    plan = read(docker_default(), capabilities=("CAP_SYS_ADMIN", "CAP_SYS_MODULE", "CAP_DAC_READ_SEARCH"))
    for name in calls.names(calls.NEVER):
        assert decide(plan.oci, name) != ALLOWED, name
    assert decide(plan.oci, "sethostname") == ALLOWED
    assert decide(plan.oci, "clone", (17,)) == ALLOWED
    assert decide(plan.oci, "clone", (17 | NEW_USER,)) == EPERM
    assert decide(plan.oci, "clone3") == ENOSYS
    assert " reduced: " in plan.summary
    assert all(name in plan.summary for name in ("clone,", "clone3", "mount", "bpf", "unshare"))


@pytest.mark.parametrize("action", ["SCMP_ACT_ALLOW", "SCMP_ACT_LOG", "SCMP_ACT_TRACE"])
def test_a_default_that_allows_is_no_filter(action):
    """Refused with one line that names the file and the action."""
    with pytest.raises(PolicyError, match=r"own\.json.*" + action):
        read(document(defaultAction=action))


@pytest.mark.parametrize(
    ("data", "place"),
    [
        (b"", "own.json"),
        (b"\xff\xfe", "own.json"),
        (b"[" * 500_000, "own.json"),
        (b'{"defaultAction":' + b"[" * 200_000, "own.json"),
        (b"{}", "defaultAction"),
        (document(colour="red"), "colour"),
        (document({**allow(["read"]), "when": 1}), r"\$\.syscalls\[0\]"),
        (
            document(allow(["read"]), {**allow(["read"]), "action": "SCMP_ACT_NOTIFY"}),
            r"\$\.syscalls\[1\]\.action",
        ),
        (document(allow(["read"], {"index": 6, "value": 1, "op": "SCMP_CMP_EQ"})), r"args\[0\]\.index"),
        (document(allow(["read"], when("NEARLY", 1))), r"args\[0\]\.op"),
        (document(allow(["read"], when("EQ", -1))), r"syscalls\[0\]"),
        (document(allow(["read"], when("EQ", 1 << 64))), "value"),
        (document(allow(["read; rm"])), r"names\[0\]"),
        (document(allow(["read"], name="write")), r"syscalls\[0\].*names"),
        (document(deny(["read"], errno="ENOSYS", errnoRet=1)), "disagree"),
        (document(deny(["read"], errnoRet=5000)), "errnoRet"),
        (document(allow(["read"], includes={"minKernel": "new"})), "minKernel"),
        (document(architectures=["SCMP_ARCH_AARCH64"]), "SCMP_ARCH_AARCH64"),
        (document(flags=["SECCOMP_FILTER_FLAG_SPEC_ALLOW"]), "flags"),
        (document() + b" " * (1 << 20), "1048"),
    ],
)
def test_bad_profiles_are_one_line_that_names_the_place(data, place):
    """Not of the format, too large, too deep: one PolicyError, never another exception."""
    with pytest.raises(PolicyError, match=place) as caught:
        read(data)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 500


@given(
    st.binary(max_size=200)
    | st.recursive(
        st.none() | st.text() | st.integers(),
        lambda v: (
            st.lists(v) | st.dictionaries(st.sampled_from(["defaultAction", "syscalls", "names", "args"]), v)
        ),
    ).map(lambda v: json.dumps(v).encode())
)
def test_garbage_raises_nothing_but_policy_error(data):
    """Random bytes and random JSON."""
    with suppress(PolicyError):
        read(data)


def test_an_order_that_libseccomp_would_not_keep_is_refused():
    """ "Allow ioctl, deny TIOCSTI" as two rules would silently allow both."""
    with pytest.raises(PolicyError, match="ioctl"):
        read(document(allow(["ioctl"]), deny(["ioctl"], when("EQ", 0x5412, index=1))))


def test_of_two_unconditional_rules_the_denial_counts():
    """As when one capability brings an allowance and the lack of another a denial."""
    for entries in ([allow(["acct"]), deny(["acct"])], [deny(["acct"]), allow(["acct"])]):
        assert decide(read(document(*entries)).oci, "acct") == EPERM


def test_two_conditions_on_one_argument_mean_either():
    """The filter says what crun and runc will do with such a rule, instead of what it looks like."""
    plan = read(document(allow(["socket"], when("EQ", 1), when("EQ", 2))))
    assert decide(plan.oci, "socket", (1,)) == ALLOWED
    assert all(len(rule["args"]) == 1 for rule in plan.oci["syscalls"])


@pytest.mark.parametrize(
    ("condition", "plain", "with_namespace"),
    [
        (None, ALLOWED, EPERM),
        (when("EQ", 17), ALLOWED, EPERM),
        (when("EQ", 17 | NEW_NET), EPERM, EPERM),
        ({**when("MASKED_EQ", 0xFF), "valueTwo": 17}, ALLOWED, EPERM),
        ({**when("MASKED_EQ", NEW_NET), "valueTwo": NEW_NET}, EPERM, EPERM),
        (when("EQ", 0, index=4), ALLOWED, EPERM),
    ],
)
def test_clone_is_narrowed_not_widened(condition, plain, with_namespace):
    """Whatever way a profile allows clone, new namespaces are out, and nothing it denied comes in."""
    oci = read(document(allow(["clone"], *([condition] if condition else [])))).oci
    assert decide(oci, "clone", (17,)) == plain
    assert decide(oci, "clone", (17 | NEW_NET,)) == with_namespace
    if condition and condition["index"] == 4:
        assert decide(oci, "clone", (17, 0, 0, 0, 1)) == EPERM


def test_clone_flags_in_a_range_cannot_be_narrowed():
    """Then the profile is refused."""
    with pytest.raises(PolicyError, match="SCMP_CMP_GT"):
        read(document(allow(["clone"], when("GT", 5))))


def test_old_single_names_and_podmans_words_are_read():
    """`name` of the first format, `errno` and `defaultErrno` of Podman's."""
    plan = read(
        json.dumps(
            {
                "defaultAction": "SCMP_ACT_ERRNO",
                "defaultErrno": "ENOSYS",
                "syscalls": [
                    {"name": "read", "action": "SCMP_ACT_ALLOW", "args": []},
                    {"names": ["bind"], "action": "SCMP_ACT_ERRNO", "errno": "EINVAL"},
                ],
            }
        ).encode()
    )
    assert [decide(plan.oci, name) for name in ("read", "bind", "write")] == [
        ALLOWED,
        ("SCMP_ACT_ERRNO", 22),
        ENOSYS,
    ]


def test_always_the_native_abi_alone():
    """Sub-architectures of a profile are not taken over: they are the way round its rules."""
    data = document(archMap=[{"architecture": "SCMP_ARCH_X86_64", "subArchitectures": ["SCMP_ARCH_X86"]}])
    assert read(data).oci["architectures"] == ["SCMP_ARCH_X86_64"]
    both = document(architectures=["SCMP_ARCH_X86_64", "SCMP_ARCH_X86", "SCMP_ARCH_X32"])
    assert read(both).oci["architectures"] == ["SCMP_ARCH_X86_64"]
