"""What libseccomp really makes of our rules: the compiled filter, run instruction by instruction.

The runtimes hand the rules to libseccomp one by one; here the same is done, and the program that the kernel
would get is compared with `decide` for many calls and arguments. The kernel's turn comes in integration.
"""

import ctypes
import platform
import tempfile

import pytest
from docker_profile import docker_default
from hypothesis import given, settings
from hypothesis import strategies as st

from ringfence.linux import syscalls
from ringfence.plan import seccomp_calls as calls
from ringfence.plan.seccomp import seccomp_for
from ringfence.plan.seccomp_match import decide
from ringfence.proof.bpf import answer, read_program

ARCH = platform.machine()
OPERATORS = ("_", "NE", "LT", "LE", "EQ", "GE", "GT", "MASKED_EQ")  # enum scmp_compare of seccomp.h
ALLOW, ERRNO = 0x7FFF0000, 0x00050000  # linux/seccomp.h
KILLS = (0x00000000, 0x80000000)

pytestmark = pytest.mark.skipif(ARCH not in syscalls.AUDIT_ARCH, reason=f"no profile for {ARCH}")


class Compare(ctypes.Structure):
    _fields_ = (("arg", ctypes.c_uint), ("op", ctypes.c_int), ("a", ctypes.c_uint64), ("b", ctypes.c_uint64))


def action(name, errno):
    return ALLOW if name == "SCMP_ACT_ALLOW" else ERRNO | (1 if errno is None else errno)


def compiled(oci):
    """Return the BPF instructions (code, jump true, jump false, k) that libseccomp makes of `oci`."""
    library = ctypes.CDLL("libseccomp.so.2")
    library.seccomp_init.restype = ctypes.c_void_p
    default = action(oci["defaultAction"], oci.get("defaultErrnoRet"))
    context = ctypes.c_void_p(library.seccomp_init(ctypes.c_uint32(default)))
    for rule in oci["syscalls"]:
        outcome = action(rule["action"], rule.get("errnoRet"))
        args = [
            Compare(
                a["index"],
                OPERATORS.index(a["op"].removeprefix("SCMP_CMP_")),
                a["value"],
                a.get("valueTwo", 0),
            )
            for a in rule.get("args", ())
        ]
        for name in rule["names"]:
            number = syscalls.number_of(name, ARCH)
            if number is not None and outcome != default:
                array = (Compare * len(args))(*args)
                status = library.seccomp_rule_add_array(
                    context, ctypes.c_uint32(outcome), number, len(args), array
                )
                assert status == 0, (name, args, status)
    with tempfile.TemporaryFile() as file:
        assert library.seccomp_export_bpf(context, file.fileno()) == 0
        library.seccomp_release(context)
        file.seek(0)
        return read_program(file.read())


def run(program, number, args, audit_arch=None):
    """Return what `program` returns for one call, as the proof works it out."""
    registers = [arg & (1 << 64) - 1 for arg in args]
    return answer(program, number, audit_arch or syscalls.AUDIT_ARCH[ARCH], registers)


@pytest.fixture(scope="module", params=["default", "strict", "docker"])
def filters(request):
    moby = docker_default() if request.param == "docker" else None
    oci = seccomp_for(request.param, arch=ARCH, moby=moby, kernel=(6, 1)).oci
    return oci, compiled(oci)


REGISTER = st.one_of(
    st.sampled_from([0, 1, 2, 6, 10, 16, 17, 38, 40, 58, 256, 0o100, 0o4755, 0o2755, 0o644, 0o20000000]),
    st.sampled_from([0x5412, 0x541C, 0x5413, 0x20008, 0x40000, 0xFFFFFFFF, 0x7E020000, 0x10000011]),
    st.tuples(st.sampled_from([0x5412, 38, 16, 1, 0o4755, 0o102, 0x10000000]), st.integers(32, 63)).map(
        lambda pair: pair[0] | 1 << pair[1]
    ),
    st.integers(0, (1 << 64) - 1),
)


@settings(max_examples=400)
@given(st.sampled_from(sorted(calls.names(calls.CONDITIONAL))), st.lists(REGISTER, min_size=6, max_size=6))
def test_the_compiled_filter_decides_as_the_rules_say(filters, name, args):
    """Calls judged by arguments, with families, modes, flags, commands, and rubbish in the upper halves."""
    oci, program = filters
    number = syscalls.number_of(name, ARCH)
    if number is not None:
        assert run(program, number, args) == action(*decide(oci, name, args))


def test_every_call_the_library_knows(filters):
    """And the numbers it does not know, up to far beyond today's kernels."""
    oci, program = filters
    for number in range(1024):
        name = syscalls.name_of(number, ARCH)
        assert run(program, number, (0,) * 6) == action(*decide(oci, name or "unknown"))


def test_other_abis_are_killed(filters):
    """int 0x80 and 32-bit ARM have another audit architecture, x32 a bit in the number."""
    _, program = filters
    for foreign in (0x40000003, 0x40000028):  # AUDIT_ARCH_I386, AUDIT_ARCH_ARM
        assert run(program, 20, (), foreign) in KILLS
    if ARCH == "x86_64":
        assert run(program, 0x40000000 | 39, ()) in KILLS


@pytest.mark.parametrize("order", [1, -1])
def test_an_unconditional_rule_swallows_conditional_ones(order):
    """The reason for `complement`: if this fails one day, the rules can be a tenth as many."""
    rules = [
        {"names": ["ioctl"], "action": "SCMP_ACT_ALLOW"},
        {
            "names": ["ioctl"],
            "action": "SCMP_ACT_ERRNO",
            "args": [{"index": 1, "value": 0x5412, "op": "SCMP_CMP_EQ"}],
        },
    ]
    oci = {"defaultAction": "SCMP_ACT_ERRNO", "defaultErrnoRet": 38, "syscalls": rules[::order]}
    assert run(compiled(oci), syscalls.number_of("ioctl", ARCH), (0, 0x5412)) == ALLOW
