"""Untrusted YAML (and so JSON) to a tree of nodes that know their place, with the scalar rules of YAML 1.2.

Built on libyaml's events and not on PyYAML's constructor: stock PyYAML reads ``22:22`` as 1342 and ``no``
as false, keeps the last of two equal keys, and lets a few aliases stand for billions of nodes. Depth, size
and the number of nodes after aliases are expanded are bounded; tags are refused.
Source of the scalar rules: https://yaml.org/spec/1.2.2/#103-core-schema
"""

from __future__ import annotations

import os
import re
import stat
from typing import TYPE_CHECKING

import msgspec
import yaml

from ringfence.errors import PolicyError

if TYPE_CHECKING:
    from collections.abc import Iterator

MAX_BYTES = 1 << 20
MAX_NODES = 10_000
MAX_DEPTH = 16
MAX_TEXT = 4096

_NULL = re.compile(r"~|null|Null|NULL|")
_BOOL = re.compile(r"(true|True|TRUE)|false|False|FALSE")
# Longer digit strings stay text: no field needs them, and int() of thousands of digits is itself an error.
_INT = re.compile(r"[-+]?[0-9]{1,40}|0o[0-7]{1,40}|0x[0-9a-fA-F]{1,40}")
_FLOAT = re.compile(r"[-+]?(?:\.[0-9]{1,40}|[0-9]{1,40}(?:\.[0-9]{0,40})?)(?:[eE][-+]?[0-9]{1,4})?")
_SPECIAL = re.compile(r"[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN)")

# What YAML 1.2 (5.1) does not allow in a stream at all.
_FORBIDDEN = re.compile(r"[^\t\n\r\x20-\x7e\x85\xa0-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")


Scalar = bool | int | float | str | None
Plain = bool | int | float | str | None | list["Plain"] | dict[str, "Plain"]


class Place(msgspec.Struct, frozen=True):
    """Where a value was written: a file with line and column (from 1), or just a source such as a flag."""

    source: str
    line: int = 0
    column: int = 0

    def __str__(self) -> str:
        return f"{self.source}:{self.line}:{self.column}" if self.line else self.source


class Node(msgspec.Struct, frozen=True):
    """A value and its place; `keys` are the places of a mapping's keys, `count` the nodes from here down."""

    value: bool | int | float | str | list[Node] | dict[str, Node] | None
    place: Place
    keys: dict[str, Place] = {}
    count: int = 1


class BadValueError(Exception):
    """A node that a field cannot take; the reader of the field adds which field it was."""

    def __init__(self, place: Place, message: str, hint: str = "") -> None:
        super().__init__(message)
        self.place, self.message, self.hint = place, message, hint


def scalar(text: str) -> Scalar:
    """Return what a plain (unquoted) scalar means in the YAML 1.2 core schema."""
    if _NULL.fullmatch(text):
        return None
    if match := _BOOL.fullmatch(text):
        return match[1] is not None
    if _INT.fullmatch(text):
        return int(text, 0) if text[:2] in ("0o", "0x") else int(text)
    if _FLOAT.fullmatch(text):
        return float(text)
    if _SPECIAL.fullmatch(text):
        return float(text.replace(".", ""))
    return text


def read_file(path: str) -> bytes:
    """Return the content of a regular file of at most 1 MiB; never blocks on a FIFO or a device."""
    try:
        # Asked before opening too, since opening a device can itself do something.
        if not stat.S_ISREG(os.stat(path).st_mode):
            raise PolicyError(f"{path}: not a regular file", hint="a policy is a YAML or JSON file")
        fd = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC)
        with open(fd, "rb") as file:
            info = os.fstat(fd)
            if not stat.S_ISREG(info.st_mode):
                raise PolicyError(f"{path}: not a regular file", hint="a policy is a YAML or JSON file")
            data = b"" if info.st_size > MAX_BYTES else file.read(MAX_BYTES + 1)
            if info.st_size > MAX_BYTES or len(data) > MAX_BYTES:
                raise PolicyError(f"{path}: larger than 1 MiB", hint="a policy is a small YAML or JSON file")
            return data
    except OSError as err:
        raise PolicyError(f"cannot read policy {path}: {err.strerror}") from err
    except ValueError as err:  # a NUL byte in the path
        raise PolicyError(f"cannot read policy {path}: {err}") from err


def parse(data: bytes, source: str) -> Node:
    """Return the one document in `data` as a mapping node; raises PolicyError with ``source:line:column``."""
    if len(data) > MAX_BYTES:
        raise PolicyError(f"{source}: larger than 1 MiB", hint="a policy is a small YAML or JSON file")
    text = _text(data, source)
    try:
        root = _Builder(yaml.parse(text, Loader=yaml.CSafeLoader), source).document()
    except yaml.MarkedYAMLError as err:
        raise _yaml_error(err, text, source) from err
    except yaml.YAMLError as err:
        raise PolicyError(f"{source}: not YAML: {err}") from err
    except BadValueError as err:
        raise PolicyError(f"{err.place}: {err.message}", hint=err.hint) from err
    if root is None:
        raise PolicyError(f"{source}: empty", hint="write at least: extends: untrusted")
    if not isinstance(root.value, dict):
        raise PolicyError(
            f"{root.place}: a policy is a mapping of fields",
            hint="write for example: limits: {memory: 256MiB}",
        )
    return root


def from_python(value: object, source: str, key: str) -> Node:
    """Return a node for builtins and Structs, so that overrides of `key` go through the readers of files."""
    try:
        return _wrap(msgspec.to_builtins(value), Place(source), MAX_DEPTH)
    except BadValueError as err:
        raise PolicyError(f"{source}: {key}: {err.message}", hint=err.hint) from err


def _wrap(value: object, place: Place, depth: int) -> Node:
    if depth == 0:
        raise BadValueError(place, f"nested deeper than {MAX_DEPTH} levels")
    if isinstance(value, list | tuple):
        return Node([_wrap(item, place, depth - 1) for item in value], place)
    if isinstance(value, dict):
        items = {_checked(str(key), place): _wrap(item, place, depth - 1) for key, item in value.items()}
        return Node(items, place, dict.fromkeys(items, place))
    if value is None or isinstance(value, bool | int | float):
        return Node(value, place)
    return Node(_checked(str(value), place), place)


def _text(data: bytes, source: str) -> str:
    if b"\0" in data:
        raise PolicyError(f"{source}: binary data, not YAML")
    try:
        text = data.removeprefix(b"\xef\xbb\xbf").decode()
    except UnicodeDecodeError as err:
        line = data.count(b"\n", 0, err.start) + 1
        raise PolicyError(f"{source}:{line}: not UTF-8 text") from err
    if found := _FORBIDDEN.search(text):
        line = text.count("\n", 0, found.start()) + 1
        column = found.start() - text.rfind("\n", 0, found.start())
        raise PolicyError(
            f"{source}:{line}:{column}: control character {found[0]!r}", hint="no field takes one"
        )
    return text


def _checked(text: str, place: Place) -> str:
    if len(text) > MAX_TEXT:
        raise BadValueError(place, f"text longer than {MAX_TEXT} characters")
    if not text.isprintable():
        raise BadValueError(place, f"control character in {text[:60]!r}", "no field takes one")
    return text


def _yaml_error(err: yaml.MarkedYAMLError, text: str, source: str) -> PolicyError:
    mark, problem = err.problem_mark, err.problem or "unreadable"
    if mark is None:
        return PolicyError(f"{source}: not YAML: {problem}")
    lines = text.split("\n")
    line = lines[mark.line] if mark.line < len(lines) else ""
    hint = "YAML indents with spaces, not tabs" if "\t" in line else ""
    return PolicyError(f"{source}:{mark.line + 1}:{mark.column + 1}: not YAML: {problem}", hint=hint)


class _Builder:
    """Builds nodes from events, top down, with every bound checked on the way."""

    def __init__(self, events: Iterator[yaml.Event], source: str) -> None:
        self.events, self.source = events, source
        self.anchors: dict[str, Node] = {}
        self.total = 0

    def document(self) -> Node | None:
        """Return the root of the only document, or None when the stream holds none."""
        next(self.events)
        if not isinstance(next(self.events), yaml.DocumentStartEvent):
            return None
        root = self.node(next(self.events), MAX_DEPTH)
        next(self.events)
        extra = next(self.events)
        if isinstance(extra, yaml.DocumentStartEvent):
            raise PolicyError(f"{self.place(extra)}: a second document", hint="one policy a file")
        return None if root.value is None else root

    def node(self, event: yaml.Event, depth: int) -> Node:
        place = self.place(event)
        if depth == 0:
            raise PolicyError(f"{place}: nested deeper than {MAX_DEPTH} levels")
        if isinstance(event, yaml.AliasEvent):
            # An anchor is known only once its node is complete, so an alias cannot contain itself.
            known = self.anchors.get(str(event.anchor))
            if known is None:
                raise PolicyError(f"{place}: alias *{event.anchor} has no earlier complete &{event.anchor}")
            self.grow(known.count, place)
            return known
        self.grow(1, place)
        if getattr(event, "tag", None) is not None:
            raise PolicyError(f"{place}: YAML tags are not used in policies", hint="remove the !tag")
        node = self.fresh(event, place, depth)
        anchor = getattr(event, "anchor", None)
        if anchor is not None:
            self.anchors[anchor] = node
        return node

    def fresh(self, event: yaml.Event, place: Place, depth: int) -> Node:
        if isinstance(event, yaml.ScalarEvent):
            text = _checked(event.value, place)
            return Node(scalar(text) if event.implicit[0] else text, place)
        if isinstance(event, yaml.SequenceStartEvent):
            items = []
            while not isinstance(event := next(self.events), yaml.SequenceEndEvent):
                items.append(self.node(event, depth - 1))
            return Node(items, place, count=1 + sum(item.count for item in items))
        return self.mapping(place, depth)

    def mapping(self, place: Place, depth: int) -> Node:
        values: dict[str, Node] = {}
        keys: dict[str, Place] = {}
        while not isinstance(event := next(self.events), yaml.MappingEndEvent):
            at = self.place(event)
            if not isinstance(event, yaml.ScalarEvent):
                raise PolicyError(f"{at}: a key must be plain text")
            key = _checked(event.value, at)
            if key in keys:
                raise PolicyError(f"{at}: key {key!r} is written twice, first at line {keys[key].line}")
            self.grow(1, at)
            keys[key] = at
            values[key] = self.node(next(self.events), depth - 1)
        return Node(values, place, keys, 1 + len(keys) + sum(node.count for node in values.values()))

    def grow(self, count: int, place: Place) -> None:
        self.total += count
        if self.total > MAX_NODES:
            raise PolicyError(f"{place}: more than {MAX_NODES} values once aliases are expanded")

    def place(self, event: yaml.Event) -> Place:
        mark = event.start_mark
        return Place(self.source, mark.line + 1, mark.column + 1) if mark else Place(self.source)
