"""From a preset's name, a file or the command line to one resolved policy."""

from __future__ import annotations

import os
from collections.abc import Mapping

import msgspec

from ringfence.errors import PolicyError
from ringfence.policy import document
from ringfence.policy.check import check
from ringfence.policy.document import Node
from ringfence.policy.fields import FIELDS, value_of
from ringfence.policy.kinds import nearest, shown
from ringfence.policy.layer import Layer, build, merge, read, read_part
from ringfence.policy.model import Policy

# From the freest to the strictest, which is the order in which they are listed.
PRESETS = ("trusted", "ci", "service", "untrusted", "tenants", "hostile")
ROOT = "untrusted"  # complete, and what a file without `extends` starts from
MAX_CHAIN = 8

_DIRECTORY = os.path.join(os.path.dirname(__file__), "presets")
_PRESET_SOURCES = frozenset(f"preset {name}" for name in PRESETS)


def load(ref: str) -> Policy:
    """Return the policy that `ref` names: a preset, or a file when `is_path` says so.

    Raises PolicyError, with file, line and column for everything that stands in a file.
    """
    return _checked(_resolve(ref, "", (), ""))


def loads(text: bytes, *, source: str, directory: str = "") -> Policy:
    """Return the policy in `text`; `source` names it in errors, relative paths start at `directory`.

    An empty `directory` is the current one. Raises PolicyError.
    """
    return _checked(_layers(document.parse(text, source), directory, (source,)))


def override(policy: Policy, values: Mapping[str, object], *, source: str = "command line") -> Policy:
    """Return `policy` with single fields replaced, by dotted YAML key, checked exactly as a file is.

    A value is what YAML would hold: "512m", 1.5, ["NET_RAW"], None. Lists and mappings replace what was
    there. Relative paths start at the current directory. Raises PolicyError naming `source` and the key.
    """
    layer = Layer({key: value_of(policy, key) for key in FIELDS}, {})
    for key, value in values.items():
        new = read_part(document.from_python(value, source, key), _absolute(""), key)
        layer = Layer({**layer.values, **new.values}, {**layer.places, **new.places})
    return _checked(layer)


def files_of(ref: str) -> tuple[str, ...]:
    """Return the absolute paths of the files that `load` reads for `ref`, itself first; none for a preset.

    Raises PolicyError like `load`, for what it meets on the way.
    """
    found: list[str] = []
    directory = ""
    while is_path(ref) and len(found) < MAX_CHAIN:
        path = os.path.abspath(os.path.join(directory, ref))
        node = document.parse(document.read_file(path), path)
        found.append(path)
        parent = node.value.get("extends") if isinstance(node.value, dict) else None
        if parent is None or not isinstance(parent.value, str):
            break
        ref, directory = parent.value, os.path.dirname(path)
    return tuple(found)


def is_path(ref: str) -> bool:
    """Return whether `ref` means a file and not a preset: it has a / or ends in .yaml, .yml or .json."""
    return "/" in ref or ref.endswith((".yaml", ".yml", ".json"))


def preset_text(name: str) -> bytes:
    """Return the file of a preset; raises PolicyError naming the nearest for an unknown name."""
    if name not in PRESETS:
        hint = f"{nearest(name, list(PRESETS))} (the path of a file has a / or ends in .yaml)"
        raise PolicyError(f"unknown preset {name!r}", hint=hint)
    return document.read_file(os.path.join(_DIRECTORY, f"{name}.yaml"))


def _checked(layer: Layer) -> Policy:
    policy = build(layer)
    check(policy, layer.places, _PRESET_SOURCES)
    return policy


def _resolve(ref: str, directory: str, chain: tuple[str, ...], at: str) -> Layer:
    """Return the merged layers of a preset or file; `chain` are the names on the way here, `at` who asked."""
    path = os.path.join(directory, ref) if is_path(ref) else ""
    try:
        name = _next_name(path or ref, chain)
        data = document.read_file(path) if path else preset_text(ref)
    except PolicyError as err:
        raise PolicyError(f"{at}{err.message}", hint=err.hint) from err
    node = document.parse(data, path or f"preset {ref}")
    return _layers(node, os.path.dirname(path) if path else _DIRECTORY, (*chain, name), root=ref == ROOT)


def _next_name(ref: str, chain: tuple[str, ...]) -> str:
    """Return what `ref` is called in the chain of extends; raises PolicyError for a circle."""
    # The real path, so that a circle through symbolic links is seen in its first round.
    name = os.path.realpath(ref) if is_path(ref) and "\0" not in ref else ref
    if name in chain:
        raise PolicyError(f"policies extend each other in a circle: {' -> '.join((*chain, name))}")
    if len(chain) == MAX_CHAIN:
        raise PolicyError(f"more than {MAX_CHAIN} policies extend each other: {' -> '.join((*chain, name))}")
    return name


def _layers(node: Node, directory: str, chain: tuple[str, ...], *, root: bool = False) -> Layer:
    """Return what `node` says over what it extends."""
    fields = dict(node.value) if isinstance(node.value, dict) else {}
    parent = fields.pop("extends", None)
    own = read(msgspec.structs.replace(node, value=fields), _absolute(directory))
    if root:
        return own
    if parent is None:
        return merge(_resolve(ROOT, directory, chain, ""), own)
    at = f"{parent.place}: extends: "
    if not isinstance(parent.value, str):
        raise PolicyError(
            f"{at}{shown(parent)} is not a policy", hint=f"one of {', '.join(PRESETS)}, or a path"
        )
    return merge(_resolve(parent.value, directory, chain, at), own)


def _absolute(directory: str) -> str:
    try:
        return os.path.abspath(directory)
    except OSError as err:
        raise PolicyError(f"the current directory is gone: {err.strerror}", hint="change to another") from err
