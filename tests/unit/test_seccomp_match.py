"""Argument patterns: what `complement` leaves out, and what `decide` answers."""

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ringfence.plan.seccomp_match import beyond, complement, decide, equals, fits, holds

BITS = 5
NUMBERS = range(1 << BITS)
PATTERNS = st.tuples(st.integers(0, 31), st.integers(0, 31)).map(lambda p: (p[0], p[0] & p[1]))


def all_except(values, bits=32):
    return complement([((1 << bits) - 1, value) for value in values], bits)


def fitting(number, patterns):
    return sum(number & mask == value for mask, value in patterns)


@pytest.mark.parametrize("count", [0, 1, 2, 3])
def test_all_except_covers_every_other_number_exactly_once(count):
    """For all sets of up to three of 16 values: an excluded one fits no pattern, any other fits one."""
    for values in itertools.combinations(range(16), count):
        patterns = all_except(values, bits=4)
        assert [fitting(n, patterns) for n in range(16)] == [int(n not in values) for n in range(16)], values


@given(st.lists(PATTERNS, max_size=4))
def test_complement_is_exact_and_disjoint(patterns):
    """Every number fits either one of the given patterns or exactly one pattern of the complement."""
    others = complement(patterns, bits=BITS)
    assert all(fitting(n, others) == (0 if fitting(n, patterns) else 1) for n in NUMBERS)


@given(st.lists(st.integers(0, 31), max_size=4), st.integers(0, (1 << 64) - 1))
def test_beyond_is_exact_over_all_64_bits(values, register):
    """Conditions made by `beyond` hold for exactly the registers that equal none of the values."""
    others = beyond(0, [((1 << 64) - 1, value) for value in values], bits=BITS)
    for number in (register, register % 32, register << 5 & (1 << 64) - 1):
        assert any(holds(arg, number) for arg in others) == (number not in values)


def test_one_excluded_value_costs_one_pattern_a_bit():
    """The price of a denied number: 32 rules, and two numbers share what they have in common."""
    assert len(all_except([0x5412])) == 32
    assert len(all_except([0x5412, 0x541C])) == 34


@pytest.mark.parametrize(
    ("op", "matching"),
    [
        ("SCMP_CMP_NE", {6, 8, 2**64 - 1}),
        ("SCMP_CMP_LT", {6}),
        ("SCMP_CMP_LE", {6, 7}),
        ("SCMP_CMP_EQ", {7}),
        ("SCMP_CMP_GE", {7, 8, 2**64 - 1}),
        ("SCMP_CMP_GT", {8, 2**64 - 1}),
    ],
)
def test_comparisons_are_unsigned(op, matching):
    """-1 in a register is the largest number, not the smallest."""
    assert {n for n in (6, 7, 8, 2**64 - 1) if holds({"index": 0, "value": 7, "op": op}, n)} == matching
    assert holds({"index": 0, "value": 7, "op": op}, -1) == (2**64 - 1 in matching)


def profile(*rules):
    return {
        "defaultAction": "SCMP_ACT_ERRNO",
        "defaultErrnoRet": 38,
        "architectures": [],
        "flags": [],
        "syscalls": list(rules),
    }


def test_decide_needs_all_conditions_of_one_rule_and_any_rule():
    """Conditions of a rule are joined by "and", rules of a call by "or", the rest gets the default."""
    both = {"names": ["socket"], "action": "SCMP_ACT_ALLOW", "args": [equals(0, 16), equals(2, 0)]}
    unix = {"names": ["socket"], "action": "SCMP_ACT_ALLOW", "args": [fits(0, (0xFFFFFFFF, 1))]}
    oci = profile(both, unix)
    assert decide(oci, "socket", (16, 3, 0)) == ("SCMP_ACT_ALLOW", 0)
    assert decide(oci, "socket", (16, 3, 9)) == ("SCMP_ACT_ERRNO", 38)
    assert decide(oci, "socket", (1 << 32 | 1,)) == ("SCMP_ACT_ALLOW", 0)
    assert decide(oci, "bind") == ("SCMP_ACT_ERRNO", 38)


def test_decide_refuses_rules_that_disagree():
    """No order of precedence is defined, so nothing may depend on one."""
    oci = profile(
        {"names": ["ioctl"], "action": "SCMP_ACT_ALLOW"},
        {"names": ["ioctl"], "action": "SCMP_ACT_ERRNO", "args": [equals(1, 0x5412)]},
    )
    assert decide(oci, "ioctl", (0, 1)) == ("SCMP_ACT_ALLOW", 0)
    with pytest.raises(ValueError, match="disagree"):
        decide(oci, "ioctl", (0, 0x5412))
