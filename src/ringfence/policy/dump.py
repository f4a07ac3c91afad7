"""A policy as text that loads back equal: YAML for people, canonical JSON for programs and digests."""

from __future__ import annotations

import json
import re

from ringfence.policy.document import Plain, scalar
from ringfence.policy.fields import FIELDS, nest, value_of
from ringfence.policy.model import Policy

_PLAIN = re.compile(r"(?:[A-Za-z0-9/_](?:[A-Za-z0-9/_.+-]|:(?=[A-Za-z0-9/]))*)")


def plain_value(policy: Policy, key: str) -> Plain:
    """Return one field in the words of a file."""
    return FIELDS[key].kind.write(value_of(policy, key))


def to_plain(policy: Policy) -> dict[str, object]:
    """Return the policy as nested builtins in the words of a file, with every field and canonical units."""
    return nest({key: plain_value(policy, key) for key in FIELDS})


def dump_json(policy: Policy) -> str:
    """Return one line of JSON with sorted keys and no spaces; equal policies give equal bytes."""
    return json.dumps(to_plain(policy), sort_keys=True, separators=(",", ":"), ensure_ascii=False)


def dump_yaml(policy: Policy) -> str:
    """Return YAML in the order of the documentation."""
    return "".join(f"{line}\n" for line in _block(to_plain(policy), ""))


def _block(value: object, indent: str) -> list[str]:
    lines: list[str] = []
    if isinstance(value, dict):
        for key, child in value.items():
            lines += _entry(f"{indent}{_text(key)}:", child, indent)
    elif isinstance(value, list):
        for child in value:
            inner = _block(child, "") if isinstance(child, dict) else [_text(child)]
            lines += [f"{indent}{'- ' if i == 0 else '  '}{line}" for i, line in enumerate(inner)]
    return lines


def _entry(head: str, value: object, indent: str) -> list[str]:
    if isinstance(value, dict | list):
        return [head, *_block(value, f"{indent}  ")] if value else [f"{head} {'{}' if value == {} else '[]'}"]
    return [f"{head} {_text(value)}"]


def _text(value: object) -> str:
    """Return a scalar, quoted as in JSON unless it reads back as the same text without quotes."""
    if isinstance(value, str) and _PLAIN.fullmatch(value) and scalar(value) == value:
        return value
    return json.dumps(value, ensure_ascii=False)
