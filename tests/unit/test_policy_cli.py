"""``ringfence policy``: exit statuses, streams and forms of output."""

import json
from pathlib import Path

import pytest

from ringfence import cli
from ringfence.policy.load import PRESETS, load, loads

Captured = pytest.CaptureFixture[str]


def run(*argv: str) -> int:
    """Run the whole command line."""
    return cli.main(["policy", *argv])


def test_list(capsys: Captured) -> None:
    """One line for each preset: name, floor, and what its file says first."""
    assert run("list") == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == list(PRESETS)
    assert "hostile    gvisor   Code that attacks:" in lines[-1]
    assert all(40 < len(line) <= 120 for line in lines)


def test_list_json(capsys: Captured) -> None:
    """The same as data."""
    assert run("list", "--json") == 0
    rows = json.loads(capsys.readouterr().out)
    assert [row["name"] for row in rows] == list(PRESETS)
    assert {row["floor"] for row in rows} == {"linux", "gvisor", "microvm"}


@pytest.mark.parametrize("form", [[], ["--json"]])
def test_show_prints_a_policy_that_loads(form: list[str], capsys: Captured) -> None:
    """What is shown is a complete policy file."""
    assert run("show", "ci", *form) == 0
    assert loads(capsys.readouterr().out.encode(), source="shown") == load("ci")


def test_validate(tmp_path: Path, capsys: Captured) -> None:
    """Every file gets its line: the right ones on stdout, the wrong ones on stderr, and then 2."""
    good, bad = tmp_path / "good.yaml", tmp_path / "bad.yaml"
    good.write_text("extends: hostile")
    bad.write_text("limits: {memry: 1}")
    assert run("validate", str(good)) == 0
    capsys.readouterr()
    assert run("validate", str(bad), str(good), str(tmp_path / "none.yaml")) == 2
    streams = capsys.readouterr()
    assert streams.out == f"{good}: ok\n"
    assert [line.split("; ")[0] for line in streams.err.splitlines()] == [
        f"ringfence: {bad}:1:10: unknown key 'memry' in limits",
        f"ringfence: cannot read policy {tmp_path}/none.yaml: No such file or directory [RF-POLICY]",
    ]
    assert run("validate", "--json", str(bad), str(good)) == 2
    rows = json.loads(capsys.readouterr().out)
    assert [row["ok"] for row in rows] == [False, True]
    assert rows[1]["digest"].startswith("sha256:")


def test_schema(capsys: Captured) -> None:
    """The schema is JSON on stdout."""
    assert run("schema") == 0
    assert json.loads(capsys.readouterr().out)["title"] == "Ringfence policy"


@pytest.mark.parametrize(
    ("a", "b", "status"),
    [
        ("untrusted", "hostile", 0),
        ("hostile", "untrusted", 1),
        ("ci", "ci", 0),
        ("ci", "nope", 2),
        ("/dev/zero", "ci", 2),
    ],
)
def test_diff_status(a: str, b: str, status: int, capsys: Captured) -> None:
    """0 when nothing widened, 1 when something did, 2 when there is nothing to compare."""
    assert run("diff", a, b) == status
    streams = capsys.readouterr()
    assert bool(streams.err) == (status == 2)
    assert bool(streams.out) == (status != 2)


def test_diff_words(tmp_path: Path, capsys: Captured) -> None:
    """The words of a change, and the same as data."""
    file = tmp_path / "p.yaml"
    file.write_text("limits: {memory: 512MiB}\ncapabilities: [net_bind_service]\n")
    assert run("diff", "untrusted", str(file)) == 1
    out = capsys.readouterr().out
    assert "widens   capabilities           gains capability CAP_NET_BIND_SERVICE\n" in out
    assert "may use 512MiB of memory instead of 256MiB\n" in out
    assert run("diff", str(file), "untrusted", "--json") == 0
    data = json.loads(capsys.readouterr().out)
    assert data["widens"] is False
    assert data["changes"][0] == {
        "field": "capabilities",
        "direction": "narrows",
        "words": "loses capability CAP_NET_BIND_SERVICE",
    }


@pytest.mark.parametrize(
    "argv", [[], ["shwo"], ["show"], ["show", "ci", "hostile"], ["diff", "ci"], ["list", "--jsn"]]
)
def test_usage_errors(argv: list[str], capsys: Captured) -> None:
    """Wrong usage is 2, on stderr."""
    with pytest.raises(SystemExit) as stop:
        run(*argv)
    assert stop.value.code == 2
    assert "usage: ringfence policy" in capsys.readouterr().err


def test_hostile_names_cannot_forge_output(capsys: Captured) -> None:
    """Control characters in a name are shown and not sent to the terminal."""
    assert run("show", "a\x1b[31m\nringfence: all is well/") == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert "\x1b" not in error
