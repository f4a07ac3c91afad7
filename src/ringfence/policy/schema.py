"""The JSON Schema of a policy file, for editors; `ringfence policy validate` also knows contradictions."""

from __future__ import annotations

from ringfence.policy.document import Plain
from ringfence.policy.fields import FIELDS
from ringfence.policy.load import PRESETS


def schema() -> dict[str, Plain]:
    """Return a JSON Schema (2020-12) for the file format, in which every field is optional."""
    root = _object()
    root = {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": "Ringfence policy",
        "description": "What a workload may do. Fields that are left out come from the policy it extends.",
        **root,
    }
    properties = _properties(root)
    properties["extends"] = {
        "description": "The policy to start from: a preset, or a path from this file's directory.",
        "anyOf": [{"enum": list(PRESETS)}, {"type": "string", "pattern": r"/|\.ya?ml$|\.json$"}],
        "default": "untrusted",
    }
    for key, field in FIELDS.items():
        *groups, leaf = key.split(".")
        here = properties
        for group in groups:
            here = _properties(here.setdefault(group, _object()))
        here[leaf] = {"description": field.meaning, **field.kind.schema}
    return root


def _object() -> dict[str, Plain]:
    return {"type": "object", "additionalProperties": False, "properties": {}}


def _properties(node: Plain) -> dict[str, Plain]:
    if not isinstance(node, dict) or not isinstance(found := node["properties"], dict):
        raise TypeError("a group of fields is an object with properties")
    return found
