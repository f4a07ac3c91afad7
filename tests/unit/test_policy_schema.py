"""The JSON Schema accepts what the loader accepts, and refuses what an editor can see is wrong."""

import jsonschema_rs
import pytest
from hypothesis import given, settings
from test_policy_document import plain
from test_policy_load import WRONG
from test_policy_roundtrip import POLICIES

from ringfence.errors import PolicyError
from ringfence.policy.document import parse
from ringfence.policy.dump import to_plain
from ringfence.policy.fields import FIELDS
from ringfence.policy.load import PRESETS, preset_text
from ringfence.policy.model import Policy
from ringfence.policy.schema import schema

VALIDATOR = jsonschema_rs.Draft202012Validator(schema())


def test_the_schema_is_a_schema() -> None:
    """It fits the meta-schema of 2020-12."""
    assert jsonschema_rs.meta.is_valid(schema())


def test_every_field_is_described() -> None:
    """Editors show for every field what the documentation says."""
    for key, field in FIELDS.items():
        node: object = schema()
        for part in key.split("."):
            assert isinstance(node, dict)
            node = node["properties"][part]
        assert isinstance(node, dict)
        assert node["description"] == field.meaning


@pytest.mark.parametrize("name", PRESETS)
def test_presets_fit(name: str) -> None:
    """Every preset's file fits the schema as it is written."""
    VALIDATOR.validate(plain(parse(preset_text(name), name)))


@settings(max_examples=40, deadline=None)
@given(POLICIES)
def test_dumped_policies_fit(policy: Policy) -> None:
    """Whatever `policy show` prints fits the schema."""
    VALIDATOR.validate(to_plain(policy))


@pytest.mark.parametrize("key", FIELDS)
def test_examples_fit(key: str) -> None:
    """The example of every field is right in the eyes of the schema."""
    nested = key.replace(".", ": {") + ": " + FIELDS[key].example + "}" * key.count(".")
    VALIDATOR.validate(plain(parse(nested.encode(), "example")))


@pytest.mark.parametrize(
    "text",
    [
        "unknown: 1",
        "limits: {memry: 1MiB}",
        "limits: {memory: 256mb}",
        "limits: {memory: -1}",
        "limits: {memory: true}",
        "limits: {cpu_weight: null}",
        "limits: {io: {read: 50MiB}}",
        "limits: {time: 1d}",
        "limits: {time: ''}",
        "limits: {pids: 0}",
        "limits: {pids: 1.5}",
        "isolation: vm",
        "user: root",
        "capabilities: [ALL]",
        "capabilities: CHOWN",
        "seccomp: unconfined",
        "filesystem: {mounts: [{source: a}]}",
        "filesystem: {mounts: [{source: a, target: b}]}",
        "filesystem: {mounts: [{source: a, target: /b, mod: ro}]}",
        "network: {allow: [example.com]}",
        "network: {publish: ['80:80/udp']}",
        "devices: [/etc/passwd]",
        "sysctls: {kernel.core_pattern: x}",
        "image: {allowed_registries: [team/app]}",
        "image: {allowed_registries: local}",
        "image: {signatures: ''}",
        "secrets: [a]",
        "extends: hostil",
        "no_new_privileges: no",
    ],
)
def test_wrong_files_do_not_fit(text: str) -> None:
    """Unknown keys, wrong units and wrong words are already red in the editor."""
    assert not VALIDATOR.is_valid(plain(parse(text.encode(), "f")))


def test_the_schema_is_no_stricter_than_the_loader() -> None:
    """Most of the loader's refusals are the schema's too; the rest are contradictions, ranges and paths."""
    refused = 0
    for text, _ in WRONG:
        try:
            refused += not VALIDATOR.is_valid(plain(parse(text.encode(), "f")))
        except PolicyError:
            refused += 1
    assert refused > len(WRONG) // 2
