"""One source of values for fields (a file, or the command line), and how a later one goes over an earlier.

A layer is flat: dotted YAML keys to canonical values, and to the places where they were written. So merging
is one dictionary over another: mappings merge deep, lists and single values replace.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import cast

import msgspec

from ringfence.errors import PolicyError
from ringfence.policy.document import BadValueError, Node, Place
from ringfence.policy.fields import FIELDS, GROUPS, nest
from ringfence.policy.kinds import nearest, shown
from ringfence.policy.model import Policy


class Layer(msgspec.Struct, frozen=True):
    """Canonical values by dotted key, and where each was written."""

    values: dict[str, object]
    places: dict[str, Place]


def read(node: Node, directory: str) -> Layer:
    """Return what a whole document says; relative paths start at `directory`.

    Raises PolicyError that starts with the place: ``file:line:column: limits.memory: ...``.
    """
    try:
        return _read(node, directory, "")
    except BadValueError as err:
        raise PolicyError(f"{err.place}: {err.message}", hint=err.hint) from err


def read_part(node: Node, directory: str, key: str) -> Layer:
    """Return what `node` says about one field or group by its dotted key; raises PolicyError."""
    if key not in FIELDS and key not in GROUPS:
        raise PolicyError(f"{node.place}: unknown field {key!r}", hint=_nearest(key))
    try:
        return _read(node, directory, key)
    except BadValueError as err:
        raise PolicyError(f"{err.place}: {err.message}", hint=err.hint) from err


def merge(below: Layer, above: Layer) -> Layer:
    """Return `below` with everything that `above` says put over it."""
    values = {**below.values, **above.values}
    if "sysctls" in below.values and "sysctls" in above.values:  # the one field that is itself a mapping
        values["sysctls"] = {**_mapping(below.values["sysctls"]), **_mapping(above.values["sysctls"])}
    return Layer(values, {**below.places, **above.places})


def build(layer: Layer) -> Policy:
    """Return the policy of a layer that has every field; raises PolicyError naming a missing one."""
    for key in FIELDS:
        if key not in layer.values:
            raise PolicyError(
                f"policy field {key} has no value", hint="extend a preset, for example untrusted"
            )
    return msgspec.convert(nest(layer.values), Policy)


def _read(node: Node, directory: str, key: str) -> Layer:
    field = FIELDS.get(key)
    if field is not None:
        try:
            return Layer({key: field.kind.read(node, directory)}, {key: node.place})
        except BadValueError as err:
            raise BadValueError(err.place, f"{key}: {err.message}", err.hint) from err
        except PolicyError as err:
            raise BadValueError(node.place, f"{key}: {err.message}", err.hint) from err
    if not isinstance(node.value, dict):
        example = next(name for name in FIELDS if name.startswith(f"{key}."))
        hint = f"it holds fields such as {example.removeprefix(f'{key}.')}"
        raise BadValueError(node.place, f"{key}: {shown(node)} is not a mapping", hint)
    whole = Layer({}, {})
    for name, child in node.value.items():
        dotted = f"{key}.{name}" if key else name
        if "." in name or (dotted not in FIELDS and dotted not in GROUPS):
            where = f" in {key}" if key else ""
            raise BadValueError(node.keys[name], f"unknown key {name!r}{where}", _nearest(dotted))
        whole = merge(whole, _read(child, directory, dotted))
    return whole


def _nearest(dotted: str) -> str:
    """Look among the siblings first, then for the last word elsewhere, so that ``memory`` finds its group."""
    if dotted in FIELDS:
        return f"nest it: {dotted.replace('.', ': {')}: ...{'}' * dotted.count('.')}"
    group, _, word = dotted.rpartition(".")
    siblings = {name.rpartition(".")[2] for name in (*FIELDS, *GROUPS) if name.rpartition(".")[0] == group}
    if not group:
        siblings.add("extends")
    hint = nearest(word, sorted(siblings))
    if "?" in hint:
        return hint
    elsewhere = nearest(word, [name.rpartition(".")[2] for name in FIELDS])
    for name in FIELDS:
        if f"'{name.rpartition('.')[2]}'?" in elsewhere:
            return f"did you mean {name!r}?"
    return hint


def _mapping(value: object) -> Mapping[str, object]:
    return cast("Mapping[str, object]", value)
