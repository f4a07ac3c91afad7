"""Units: what people write becomes exact numbers, and wrong text becomes one line with right examples."""

import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ringfence.errors import PolicyError
from ringfence.policy import units

SIZES = [
    ("256MiB", 256 << 20),
    ("256MB", 256_000_000),
    ("1.5GiB", 1536 << 20),
    ("512m", 512 << 20),
    ("1k", 1024),
    ("1kB", 1000),
    ("7b", 7),
    ("100", 100),
    (100, 100),
    ("1 TiB", 1 << 40),
    ("1.1GiB", 1_181_116_006),
    (2**63 - 1, 2**63 - 1),
]


@pytest.mark.parametrize(("text", "size"), SIZES)
def test_sizes(text: object, size: int) -> None:
    """Binary, decimal and docker's single-letter units, fractions cut to whole bytes."""
    assert units.parse_size(text) == size


@pytest.mark.parametrize(
    "text",
    [
        "256mb",
        "256 MiBs",
        "",
        "MiB",
        "-1",
        -1,
        1.0,
        True,
        None,
        2**63,
        "8388608TiB",
        "inf",
        "nan",
        "1e3",
        "0.5",
        "٣",
        "9" * 30,
        pytest.param("1" * 10000, id="long"),
        pytest.param(10**5000, id="huge"),
        "1\n",
        [1],
    ],
)
def test_wrong_sizes(text: object) -> None:
    """Nothing is guessed; the one line quotes the value, cut, and shows right ones."""
    with pytest.raises(PolicyError, match=r"256MiB, 1\.5GiB or 512m") as error:
        units.parse_size(text)
    assert len(str(error.value)) < 250
    assert "\n" not in str(error.value)


def test_least_size() -> None:
    """A tmpfs of size 0 has no limit, so a field can refuse what is too small."""
    with pytest.raises(PolicyError, match="from 4KiB"):
        units.parse_size(0, least=4096)


@pytest.mark.parametrize(
    ("text", "rate"), [("50MiB/s", 50 << 20), ("1B/s", 1), (7, 7), ("7", 7), ("1m/s", 1 << 20)]
)
def test_rates(text: object, rate: int) -> None:
    """A rate is a size with /s, or a bare number."""
    assert units.parse_rate(text) == rate


@pytest.mark.parametrize("text", ["50MiB", "50MiB/m", "5/s", 0, "0B/s", True, -3, None, "/s", "٣"])
def test_wrong_rates(text: object) -> None:
    """A size is not a rate, and a rate of nothing is absurd."""
    with pytest.raises(PolicyError, match=r"50MiB/s, 1\.5GiB/s"):
        units.parse_rate(text)


@pytest.mark.parametrize(
    ("text", "seconds"),
    [
        ("30s", 30),
        ("500ms", 0.5),
        ("2m", 120),
        ("1h30m", 5400),
        (2, 2),
        (0.25, 0.25),
        ("1.5", 1.5),
        ("0.1s", 0.1),
    ],
)
def test_durations(text: object, seconds: float) -> None:
    """Hours to milliseconds, and bare numbers are seconds."""
    assert units.parse_duration(text) == seconds


@pytest.mark.parametrize(
    "text",
    [
        "30m1h",
        "1h1h",
        "1 h",
        "1d",
        "",
        "s",
        0,
        -1,
        True,
        None,
        float("nan"),
        float("inf"),
        1e300,
        1e-09,
        "0.0001s",
        "367000h",
        "1s" * 100,
        pytest.param(10**400, id="huge"),
    ],
)
def test_wrong_durations(text: object) -> None:
    """Zero, NaN, infinity, disorder and unknown units are refused."""
    with pytest.raises(PolicyError, match="30s, 500ms or 1h30m"):
        units.parse_duration(text)


@pytest.mark.parametrize(
    ("text", "cpus"), [("1.5", 1.5), (1, 1), (0.29, 0.29), (1 / 3, 0.333), ("0.01", 0.01)]
)
def test_cpus(text: object, cpus: float) -> None:
    """CPUs are numbers, cut to thousandths and never rounded up."""
    assert units.parse_cpus(text) == cpus


@pytest.mark.parametrize("text", ["500m", 0, 0.009, -1, True, None, float("nan"), 8193, "1,5", "two"])
def test_wrong_cpus(text: object) -> None:
    """Kubernetes' milli-CPUs are not ours; less than the kernel's least quota is refused."""
    with pytest.raises(PolicyError, match=r"1, 0\.5 or 1\.5"):
        units.parse_cpus(text)


@settings(deadline=None)
@given(st.integers(0, 2**63 - 1))
def test_size_round_trip(size: int) -> None:
    """The text of a size is read back exactly, and is no longer than the bytes written out."""
    text = units.format_size(size)
    assert units.parse_size(text) == size
    assert len(text) <= len(f"{size}B")
    assert re.fullmatch(units.SIZE_PATTERN, text)


@settings(deadline=None)
@given(st.integers(1, 2**63 - 1))
def test_rate_round_trip(rate: int) -> None:
    """The text of a rate is read back exactly and fits the schema's pattern."""
    assert units.parse_rate(units.format_rate(rate)) == rate
    assert re.fullmatch(units.RATE_PATTERN, units.format_rate(rate))


@settings(deadline=None)
@given(st.integers(1, units.MAX_DURATION_MS))
def test_duration_round_trip(milliseconds: int) -> None:
    """Every duration of whole milliseconds survives."""
    text = units.format_duration(milliseconds / 1000)
    assert units.parse_duration(text) == milliseconds / 1000
    assert re.fullmatch(units.DURATION_PATTERN, text)


@settings(deadline=None)
@given(st.floats(0.01, units.MAX_CPUS))
def test_cpus_are_cut_once(cpus: float) -> None:
    """Cutting to thousandths never adds CPU time, and does nothing the second time."""
    cut = units.parse_cpus(cpus)
    assert cpus - 0.001 < cut <= cpus
    assert units.parse_cpus(cut) == cut == units.parse_cpus(units.format_cpus(cut))


@settings(deadline=None)
@given(st.text(max_size=20) | st.integers() | st.floats() | st.none() | st.booleans())
def test_parsers_raise_only_policy_errors(value: object) -> None:
    """Whatever the value, it is a number in range or a PolicyError."""
    for parse, most in (
        (units.parse_size, units.MAX_BYTES),
        (units.parse_rate, units.MAX_BYTES),
        (units.parse_duration, units.MAX_DURATION_MS / 1000),
        (units.parse_cpus, units.MAX_CPUS),
    ):
        try:
            number = parse(value)
        except PolicyError:
            continue
        assert 0 <= number <= most
