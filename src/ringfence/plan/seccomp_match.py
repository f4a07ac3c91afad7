"""Argument conditions of seccomp rules: making them, and deciding by them without a kernel.

Two facts about libseccomp shape this module; the tests of the compiled filters show both. First, an
unconditional rule swallows the conditional ones of the same system call, whichever came first, so "allow
ioctl, but not TIOCSTI" must be written as rules that cover everything else (`complement`). Second, crun
and runc turn two conditions on one argument of one rule into "either" instead of "both", so no rule here
names an argument twice.
"""

from typing import TYPE_CHECKING, Literal, NotRequired, TypedDict

if TYPE_CHECKING:
    from collections.abc import Sequence

Operator = Literal[
    "SCMP_CMP_NE",
    "SCMP_CMP_LT",
    "SCMP_CMP_LE",
    "SCMP_CMP_EQ",
    "SCMP_CMP_GE",
    "SCMP_CMP_GT",
    "SCMP_CMP_MASKED_EQ",
]
Pattern = tuple[int, int]  # (mask, value): a number n fits when n & mask == value

SCMP_ARCH = {"x86_64": "SCMP_ARCH_X86_64", "aarch64": "SCMP_ARCH_AARCH64"}  # keys as `uname -m` says
INT_BITS = 32
WHOLE_INT = (1 << 32) - 1  # the kernel reads an int from the low half of the register and ignores the rest
WHOLE = (1 << 64) - 1


class Arg(TypedDict):
    """One condition, as `linux.seccomp.syscalls[].args[]` of the OCI spec; MASKED_EQ: value is the mask."""

    index: int
    value: int
    valueTwo: NotRequired[int]
    op: Operator


class Rule(TypedDict):
    """One entry of `linux.seccomp.syscalls[]`; without args it is unconditional."""

    names: list[str]
    action: str
    errnoRet: NotRequired[int]
    args: NotRequired[list[Arg]]


class LinuxSeccomp(TypedDict):
    """The object `linux.seccomp` of an OCI config.json."""

    defaultAction: str
    defaultErrnoRet: NotRequired[int]
    architectures: list[str]
    flags: list[str]
    syscalls: list[Rule]


def fits(index: int, pattern: Pattern) -> Arg:
    """Return the condition that argument `index` fits `pattern`; bits outside the mask do not matter."""
    mask, value = pattern
    return {"index": index, "value": mask, "valueTwo": value, "op": "SCMP_CMP_MASKED_EQ"}


def equals(index: int, value: int) -> Arg:
    """Return the condition that the whole 64-bit argument `index` is `value`."""
    return {"index": index, "value": value, "op": "SCMP_CMP_EQ"}


def complement(patterns: "Sequence[Pattern]", bits: int = INT_BITS) -> "list[Pattern]":
    """Return disjoint patterns for exactly the numbers of `bits` bits that fit none of `patterns`.

    It walks the bits from the top and splits only where some pattern still cares, so one excluded number
    costs `bits` patterns, and numbers with a common prefix share its cost.
    """

    def rest(left: "Sequence[Pattern]", bit: int, mask: int, value: int) -> "list[Pattern]":
        if not left:
            return [(mask, value)]
        if any(wanted & ((1 << bit) - 1) == 0 for wanted, _ in left):
            return []  # this branch lies wholly inside one of the patterns
        one = 1 << (bit - 1)
        if not any(wanted & one for wanted, _ in left):
            return rest(left, bit - 1, mask, value)
        zeros = [p for p in left if not p[0] & one or not p[1] & one]
        ones = [p for p in left if not p[0] & one or p[1] & one]
        return rest(zeros, bit - 1, mask | one, value) + rest(ones, bit - 1, mask | one, value | one)

    return rest(patterns, bits, 0, 0)


def beyond(index: int, patterns: "Sequence[Pattern]", bits: int) -> list[Arg]:
    """Return conditions for exactly those 64-bit values of argument `index` that fit none of `patterns`.

    The patterns must have 64-bit masks and values below 2**bits: one comparison then covers all above.
    """
    upper = WHOLE & ~((1 << bits) - 1)
    largest: Arg = {"index": index, "value": (1 << bits) - 1, "op": "SCMP_CMP_GT"}
    return [*(fits(index, (upper | mask, value)) for mask, value in complement(patterns, bits)), largest]


def decide(oci: LinuxSeccomp, syscall: str, args: "Sequence[int]" = ()) -> tuple[str, int]:
    """Return (action, errno) that the filter `oci` gives to `syscall` with 64-bit `args`; missing ones are 0.

    The errno is 0 for actions that have none. Raises ValueError when rules that disagree match: the
    runtime-spec has no order of precedence, so a profile must not depend on one.
    Source: OCI runtime-spec, config-linux.md, "Seccomp".
    """
    registers = [*args, 0, 0, 0, 0, 0, 0][:6]
    outcomes = {
        _outcome(rule["action"], rule.get("errnoRet"))
        for rule in oci["syscalls"]
        if syscall in rule["names"]
        and all(holds(arg, registers[arg["index"]]) for arg in rule.get("args", ()))
    }
    if len(outcomes) > 1:
        raise ValueError(f"rules for {syscall}{tuple(args)} disagree: {sorted(outcomes)}")
    return outcomes.pop() if outcomes else _outcome(oci["defaultAction"], oci.get("defaultErrnoRet"))


def holds(arg: Arg, register: int) -> bool:
    """Return whether the condition `arg` holds for the 64-bit `register`; all comparisons are unsigned."""
    register &= 0xFFFF_FFFF_FFFF_FFFF
    value = arg["value"]
    match arg["op"]:
        case "SCMP_CMP_NE":
            return register != value
        case "SCMP_CMP_LT":
            return register < value
        case "SCMP_CMP_LE":
            return register <= value
        case "SCMP_CMP_EQ":
            return register == value
        case "SCMP_CMP_GE":
            return register >= value
        case "SCMP_CMP_GT":
            return register > value
        case "SCMP_CMP_MASKED_EQ":
            return register & value == arg.get("valueTwo", 0)


def _outcome(action: str, errno: int | None) -> tuple[str, int]:
    if action != "SCMP_ACT_ERRNO":
        return action, 0
    return action, 1 if errno is None else errno  # EPERM is the runtimes' default
