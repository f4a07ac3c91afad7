"""docs/policy.md says what the table of fields says, and its examples work."""

import contextlib
import io
import json
import os
import re
from pathlib import Path

import pytest

from ringfence import cli
from ringfence.policy.dump import plain_value
from ringfence.policy.fields import FIELDS
from ringfence.policy.load import PRESETS, load, loads
from ringfence.policy.model import Policy

PAGE = Path(__file__).parents[2] / "docs" / "policy.md"
TEXT = PAGE.read_text()
BEGIN, END = "<!-- fields: begin (checked by tests/unit/test_policy_docs.py) -->\n", "<!-- fields: end -->"


def table() -> str:
    """Return the table of fields as the page must hold it; run this file to write it there."""
    default = load("untrusted")
    rows = ["| field | unit | default | example | meaning |", "|---|---|---|---|---|"]
    for key, field in FIELDS.items():
        value = plain_value(default, key)
        shown = value if isinstance(value, str) else json.dumps(value)
        rows.append(f"| `{key}` | {field.unit} | `{shown}` | `{field.example}` | {field.meaning} |")
    return "\n".join(rows) + "\n"


def blocks(language: str) -> list[str]:
    """Return the page's code blocks in one language."""
    return re.findall(rf"^```{language}\n(.*?)^```", TEXT, re.MULTILINE | re.DOTALL)


def test_the_table_is_the_table() -> None:
    """Every field with its unit, default, example and meaning, from the code."""
    assert TEXT.partition(BEGIN)[2].partition(END)[0] == table()


@pytest.mark.parametrize("key", FIELDS)
def test_examples_of_fields_load(key: str) -> None:
    """Every example is right, alone or with the mode it names."""
    needs = {
        "network.allow": "network: {mode: egress, allow: %s}",
        "network.publish": "network: {mode: ports, publish: %s}",
    }
    nested = key.replace(".", ": {") + ": %s" + "}" * key.count(".")
    text = needs.get(key, nested) % FIELDS[key].example
    if key == "isolation":
        assert loads(text.encode(), source="example").isolation == "gvisor"
    assert isinstance(loads(text.encode(), source="example"), Policy)


def test_presets_are_listed() -> None:
    """The page names every preset with its floor, in the order of `policy list`."""
    assert re.findall(r"^\| `(\w+)` \| (\w+) \|", TEXT.partition("## Fields")[0], re.MULTILINE) == [
        (n, load(n).floor) for n in PRESETS
    ]


def test_consoles_say_what_is_printed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The commands on the page are run, and print what the page shows."""
    (tmp_path / "policy.yaml").write_text(blocks("yaml")[0])
    (tmp_path / "wrong.yaml").write_text("limits: {memry: 1}")
    monkeypatch.chdir(tmp_path)
    for block in blocks("console"):
        command, _, shown = block.partition("\n")
        out = io.StringIO()
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(out):
            cli.main(command.removeprefix("$ ringfence ").split())
        assert out.getvalue().replace(os.fspath(tmp_path), "/srv/app") == shown


def test_commands_of_the_page_work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every `ringfence policy` line of the page runs."""
    (tmp_path / "policy.yaml").write_text(blocks("yaml")[0])
    monkeypatch.chdir(tmp_path)
    lines = [line.partition(" #")[0].partition(" >")[0] for line in blocks("sh")[0].splitlines()]
    statuses = {}
    for line in lines:
        if line.startswith("ringfence policy"):
            with contextlib.redirect_stdout(io.StringIO()):
                statuses[line] = cli.main(line.split()[1:])
    assert list(statuses.values()) == [0, 0, 0, 1, 0]


def test_the_python_example_works(capsys: pytest.CaptureFixture[str]) -> None:
    """What the page shows is public and does what it says."""
    exec(blocks("python")[0], {})
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("sha256:")
    assert lines[1:] == [
        "widens may use 512MiB of memory instead of 256MiB",
        "widens may run for any time instead of 30s",
    ]


if __name__ == "__main__":
    before, _, rest = TEXT.partition(BEGIN)
    PAGE.write_text(before + BEGIN + table() + END + rest.partition(END)[2])
