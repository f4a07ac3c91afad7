"""Sizes, rates, durations and CPU counts: from what people write to exact numbers, and back to one text.

Every ``parse_*`` raises PolicyError that quotes the wrong value and shows three right ones. Nothing is
guessed: NaN, infinities, negative and absurd numbers are errors, and a boolean is not a number.
"""

from __future__ import annotations

import re
from decimal import ROUND_FLOOR, Decimal

from ringfence.errors import PolicyError

MAX_BYTES = 2**63 - 1  # the kernel keeps sizes in a signed 64-bit loff_t
MAX_DURATION_MS = 366 * 24 * 3600 * 1000
MAX_CPUS = 8192  # CONFIG_NR_CPUS_RANGE_END of x86-64, the largest of the architectures we know

SIZE_EXAMPLES = "256MiB, 1.5GiB or 512m"
RATE_EXAMPLES = "50MiB/s, 1.5GiB/s or 1048576"
DURATION_EXAMPLES = "30s, 500ms or 1h30m"
CPUS_EXAMPLES = "1, 0.5 or 1.5"

# Single letters are powers of 1024 as docker reads them. "kb" and "mb" are refused: docker means 1024 by
# them, the SI means 1000, and a network engineer means bits.
_BINARY = {"KiB": 2**10, "MiB": 2**20, "GiB": 2**30, "TiB": 2**40}
_DECIMAL = {"KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}
_LETTERS = {"B": 1, "K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}
_SIZE_UNITS = {
    "": 1,
    **_LETTERS,
    **{k.lower(): v for k, v in _LETTERS.items()},
    **_BINARY,
    **_DECIMAL,
    "kB": 10**3,
}
_DURATION_UNITS_MS = {"h": 3_600_000, "m": 60_000, "s": 1000, "ms": 1}

NUMBER = r"[0-9]{1,19}(?:\.[0-9]{1,9})?"
SIZE_PATTERN = rf"^{NUMBER} ?(?:[KMGT]iB|[kKMGT]B|[bBkKmMgGtT])?$"
RATE_PATTERN = rf"^(?:{NUMBER} ?(?:[KMGT]iB|[kKMGT]B|[bBkKmMgGtT])/s|[0-9]{{1,19}})$"
DURATION_PATTERN = rf"^(?:{NUMBER}|(?=.)(?:{NUMBER}h)?(?:{NUMBER}m)?(?:{NUMBER}s)?(?:{NUMBER}ms)?)$"
CPUS_PATTERN = rf"^{NUMBER}$"

_SIZE = re.compile(rf"({NUMBER}) ?([A-Za-z]{{0,3}})")
_DURATION_PART = re.compile(rf"({NUMBER})(ms|h|m|s)")


def parse_size(value: object, *, least: int = 0, examples: str = SIZE_EXAMPLES) -> int:
    """Return bytes: a whole number, or text such as ``256MiB``; a fraction of a byte is dropped."""
    size = _integer(value)
    if size is None:
        match = _SIZE.fullmatch(value) if isinstance(value, str) else None
        scale = _SIZE_UNITS.get(match[2], 0) if match else 0
        if match is None or scale == 0 or (scale == 1 and "." in match[1]):
            raise _wrong(value, "a size", examples)
        size = int(Decimal(match[1]) * scale)
    if not least <= size <= MAX_BYTES:
        raise _wrong(value, f"a size from {format_size(least)} to 2^63-1 bytes", examples)
    return size


def parse_rate(value: object) -> int:
    """Return bytes per second, at least 1: a whole number, or text such as ``50MiB/s``."""
    text = value
    if isinstance(value, str) and not value.isdecimal():
        if not value.endswith("/s"):
            raise _wrong(value, "a rate", RATE_EXAMPLES)
        text = value.removesuffix("/s")
        if text.isdecimal():
            raise _wrong(value, "a rate", RATE_EXAMPLES)
    try:
        return parse_size(text, least=1)
    except PolicyError:
        raise _wrong(value, "a rate from 1B/s to 2^63-1 bytes a second", RATE_EXAMPLES) from None


def parse_duration(value: object) -> float:
    """Return seconds, cut to whole milliseconds: a number of seconds, or text such as ``1h30m``."""
    milliseconds = _milliseconds(value)
    if milliseconds is None or not 1 <= milliseconds <= MAX_DURATION_MS:
        raise _wrong(value, "a duration from 1ms to 366 days", DURATION_EXAMPLES)
    return milliseconds / 1000


def parse_cpus(value: object) -> float:
    """Return a number of CPUs, cut to steps of 0.001, from 0.01 (the kernel's least quota) to 8192."""
    number = _decimal(value)
    if number is None or not Decimal("0.01") <= number <= MAX_CPUS:
        raise _wrong(value, "a number of CPUs from 0.01 to 8192", CPUS_EXAMPLES)
    return float(number.quantize(Decimal("0.001"), ROUND_FLOOR))


def parse_count(value: object, *, least: int, most: int) -> int:
    """Return a whole number from `least` to `most`, also from decimal text."""
    number = _integer(value)
    if isinstance(value, str) and re.fullmatch("[0-9]{1,19}", value):
        number = int(value)
    if number is None or not least <= number <= most:
        middle = min(most, max(least + 1, 64))
        raise _wrong(value, f"a whole number from {least} to {most}", f"{least}, {middle} or {most}")
    return number


def format_size(size_bytes: int) -> str:
    """Return the shortest exact text with a unit; of two equally short ones, the binary one."""
    if size_bytes == 0:
        return "0"
    units = {"B": 1, **_BINARY, **_DECIMAL}
    texts = [f"{size_bytes // scale}{unit}" for unit, scale in units.items() if size_bytes % scale == 0]
    return min(texts, key=lambda text: (len(text.rstrip("BKMGTi")), not text.endswith("iB")))


def format_rate(bytes_per_s: int) -> str:
    """Return the shortest exact text, such as ``50MiB/s``."""
    return f"{format_size(bytes_per_s)}/s"


def format_duration(seconds: float) -> str:
    """Return the shortest exact text, such as ``1h30m``; fractions below a second are in milliseconds."""
    rest, text = round(seconds * 1000), ""
    for unit, scale in _DURATION_UNITS_MS.items():
        count, rest = divmod(rest, scale)
        text += f"{count}{unit}" if count else ""
    return text


def format_cpus(cpus: float) -> str:
    """Return the shortest exact text, such as ``1`` or ``0.25``."""
    return f"{cpus:.3f}".rstrip("0").rstrip(".")


def show(value: object) -> str:
    """Return a wrong value as it may stand in an error: as YAML spells it, and cut when long."""
    if isinstance(value, int) and abs(value) > 2**100:
        return "a number that large"
    text = {"None": "null", "True": "true", "False": "false"}.get(repr(value), repr(value))
    return text if len(text) <= 60 else f"{text[:57]}..."


def _milliseconds(value: object) -> int | None:
    number = _decimal(value)
    if number is not None:
        return int(number * 1000)
    if not isinstance(value, str) or len(value) > 80:
        return None
    total, position, units = Decimal(0), 0, list(_DURATION_UNITS_MS)
    for part in _DURATION_PART.finditer(value):
        if part.start() != position or part[2] not in units:
            return None
        units = units[units.index(part[2]) + 1 :]
        total += Decimal(part[1]) * _DURATION_UNITS_MS[part[2]]
        position = part.end()
    return int(total) if position == len(value) and value else None


def _decimal(value: object) -> Decimal | None:
    """Return a finite decimal for an int, a float or plain decimal text, or None."""
    if isinstance(value, str):
        return Decimal(value) if re.fullmatch(NUMBER, value) else None
    number = _integer(value)
    if number is not None:
        return Decimal(number) if abs(number) <= MAX_BYTES else None
    if isinstance(value, float):
        exact = Decimal(repr(value))
        return exact if exact.is_finite() else None
    return None


def _integer(value: object) -> int | None:
    return value if isinstance(value, int) and not isinstance(value, bool) else None


def _wrong(value: object, wanted: str, examples: str) -> PolicyError:
    return PolicyError(f"{show(value)} is not {wanted}", hint=f"write for example {examples}")
