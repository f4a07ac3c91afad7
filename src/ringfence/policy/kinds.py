"""The kinds of values that fields hold: how each is read from a node, written back, and told to JSON Schema.

A reader takes the node and the directory that relative paths start at; it returns the canonical value, or
raises BadValueError (with a place inside the node) or PolicyError (the whole node is meant).
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Callable

import msgspec

from ringfence.errors import PolicyError
from ringfence.policy import paths, units
from ringfence.policy.document import Node, Plain

Schema = dict[str, Plain]


class Kind(msgspec.Struct, frozen=True):
    """How values of one kind are read, written and described."""

    read: Callable[[Node, str], object]
    write: Callable[[object], Plain]
    schema: Schema


def nearest(word: str, known: list[str]) -> str:
    """Return "did you mean 'x'?" for the closest of `known`, or the list of what is known."""
    close = difflib.get_close_matches(word, known, 1)
    return f"did you mean {close[0]!r}?" if close else f"known: {', '.join(known)}"


def _amount(
    parse: Callable[[object], object], text: Callable[[object], Plain], forms: list[Plain], *, null: bool
) -> Kind:
    """Return a kind whose value is a number that `null` may leave out."""

    def read(node: Node, _directory: str) -> object:
        value = scalar(node)
        return None if null and value is None else parse(value)

    def write(value: object) -> Plain:
        return None if value is None else text(value)

    return Kind(read, write, {"anyOf": [*forms, {"type": "null"}] if null else forms})


def size(*, least: int, null: bool = False) -> Kind:
    """Bytes, at least `least`."""
    forms: list[Plain] = [
        {"type": "integer", "minimum": least, "maximum": units.MAX_BYTES},
        {"type": "string", "pattern": units.SIZE_PATTERN},
    ]
    return _amount(
        lambda value: units.parse_size(value, least=least),
        lambda v: units.format_size(_int(v)) if v else 0,
        forms,
        null=null,
    )


def rate() -> Kind:
    """Bytes per second, or null."""
    forms: list[Plain] = [
        {"type": "integer", "minimum": 1, "maximum": units.MAX_BYTES},
        {"type": "string", "pattern": units.RATE_PATTERN},
    ]
    return _amount(units.parse_rate, lambda v: units.format_rate(_int(v)), forms, null=True)


def duration() -> Kind:
    """Seconds, or null."""
    forms: list[Plain] = [
        {"type": "number", "minimum": 0.001, "maximum": units.MAX_DURATION_MS / 1000},
        {"type": "string", "pattern": units.DURATION_PATTERN},
    ]
    return _amount(units.parse_duration, lambda v: units.format_duration(_float(v)), forms, null=True)


def cpus() -> Kind:
    """A number of CPUs, or null."""
    forms: list[Plain] = [
        {"type": "number", "minimum": 0.01, "maximum": units.MAX_CPUS},
        {"type": "string", "pattern": units.CPUS_PATTERN},
    ]

    def write(value: object) -> Plain:
        return int(_float(value)) if _float(value).is_integer() else _float(value)

    return _amount(units.parse_cpus, write, forms, null=True)


def count(*, least: int, most: int, null: bool = False) -> Kind:
    """A whole number."""
    forms: list[Plain] = [
        {"type": "integer", "minimum": least, "maximum": most},
        {"type": "string", "pattern": "^[0-9]{1,19}$"},
    ]
    return _amount(lambda value: units.parse_count(value, least=least, most=most), _int, forms, null=null)


def flag() -> Kind:
    """A yes or no."""

    def read(node: Node, _directory: str) -> object:
        if not isinstance(node.value, bool):
            raise PolicyError(f"{shown(node)} is not true or false")
        return node.value

    return Kind(read, bool, {"type": "boolean"})


def choice(*values: str) -> Kind:
    """One of a few words."""

    def read(node: Node, _directory: str) -> object:
        if node.value not in values:
            hint = nearest(str(node.value), list(values))
            raise PolicyError(
                f"{shown(node)} is not one of {', '.join(values)}", hint=hint if "?" in hint else ""
            )
        return node.value

    return Kind(read, str, {"enum": list(values)})


def _text(parse: Callable[[object, str], object], schema: Schema) -> Kind:
    """Return a kind of text with its own syntax."""
    return Kind(lambda node, directory: parse(scalar(node), directory), _str_or_none, schema)


def user() -> Kind:
    """``dedicated`` or ``UID[:GID]``; the group is the same number when left out."""

    def parse(value: object, _directory: str) -> str:
        text = str(value)
        match = re.fullmatch(r"([0-9]{1,5})(?::([0-9]{1,5}))?", text)
        ids = [int(match[1]), int(match[2] or match[1])] if match else []
        if text == "dedicated" or (ids and max(ids) <= 65535 and not isinstance(value, bool)):
            return text if not ids else f"{ids[0]}:{ids[1]}"
        hint = "write dedicated, 1000 or 1000:1000; names are not looked up, and ids end at 65535"
        raise PolicyError(f"{units.show(value)} is not a user", hint=hint)

    forms: list[Plain] = [
        {"type": "integer", "minimum": 0, "maximum": 65535},
        {"type": "string", "pattern": r"^(?:dedicated|[0-9]{1,5}(?::[0-9]{1,5})?)$"},
    ]
    return _text(parse, {"anyOf": forms})


def seccomp() -> Kind:
    """``default``, ``strict`` or the path of a JSON profile."""

    def parse(value: object, directory: str) -> str:
        if value in ("default", "strict"):
            return str(value)
        if not isinstance(value, str) or not ("/" in value or value.endswith(".json")):
            close = difflib.get_close_matches(str(value), ["default", "strict"], 1)
            hint = f"did you mean {close[0]!r}?" if close else "it cannot be turned off; a path contains a /"
            raise PolicyError(f"{units.show(value)} is not default, strict or a path", hint=hint)
        return paths.host_path(value, directory)

    return _text(parse, {"type": "string", "pattern": r"^(?:default|strict|.*/.*|.*\.json)$"})


def file() -> Kind:
    """The path of a file, or null."""

    def parse(value: object, directory: str) -> str | None:
        return None if value is None else paths.host_path(value, directory)

    return _text(parse, {"anyOf": [{"type": "string", "minLength": 1}, {"type": "null"}]})


def cpuset() -> Kind:
    """Numbers and ranges of CPUs as the kernel lists them, or null."""

    def parse(value: object, _directory: str) -> str | None:
        if value is None:
            return None
        text = str(value)
        if (
            isinstance(value, bool)
            or len(text) > 1024
            or not re.fullmatch(r"[0-9]{1,4}([-,][0-9]{1,4})*", text)
        ):
            raise _not_cpus(value)
        numbers: set[int] = set()
        for part in text.split(","):
            first, _, last = part.partition("-")
            if "-" in last or not int(first) <= int(last or first) < units.MAX_CPUS:
                raise _not_cpus(value)
            numbers.update(range(int(first), int(last or first) + 1))
        return _ranges(sorted(numbers))

    forms: list[Plain] = [
        {"type": "integer", "minimum": 0, "maximum": units.MAX_CPUS - 1},
        {"type": "string", "pattern": r"^[0-9]{1,4}(?:-[0-9]{1,4})?(?:,[0-9]{1,4}(?:-[0-9]{1,4})?)*$"},
        {"type": "null"},
    ]
    return _text(parse, {"anyOf": forms})


def scalar(node: Node) -> object:
    if isinstance(node.value, list | dict):
        raise PolicyError(f"{shown(node)} stands where a single value belongs")
    return node.value


def shown(node: Node) -> str:
    if isinstance(node.value, list):
        return "a list"
    return "a mapping" if isinstance(node.value, dict) else units.show(node.value)


def _ranges(numbers: list[int]) -> str:
    parts: list[list[int]] = []
    for number in numbers:
        if parts and parts[-1][1] == number - 1:
            parts[-1][1] = number
        else:
            parts.append([number, number])
    return ",".join(str(a) if a == b else f"{a}-{b}" for a, b in parts)


def _not_cpus(value: object) -> PolicyError:
    return PolicyError(f"{units.show(value)} is not a set of CPUs", hint="write for example 0, 0-3 or 0-1,4")


def _int(value: object) -> int:
    return msgspec.convert(value, int)


def _float(value: object) -> float:
    return msgspec.convert(value, float)


def _str_or_none(value: object) -> str | None:
    return msgspec.convert(value, str | None)
