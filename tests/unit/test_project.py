"""The project itself: its commands, its scripts, and what must not stand in its files."""

import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest

from ringfence.version import VERSION

ROOT = Path(__file__).parents[2]
SCRIPTS = ("scripts/setup", "scripts/demo", "scripts/leftovers", ".ci/run")
TEXT = {".c", ".cfg", ".h", ".md", ".py", ".sh", ".toml", ".yaml", ".yml", ".json", ""}


def project_files() -> list[Path]:
    """Every text file of the project, without what tools make."""
    made = {"build", "_agent", "__pycache__", "dist"}
    found = []
    for directory, names, files in os.walk(ROOT):
        names[:] = [name for name in names if name not in made and (name[0] != "." or name == ".ci")]
        found += [
            Path(directory, name)
            for name in files
            if Path(name).suffix in TEXT and name not in ("LICENSE", ".coverage")
        ]
    return found


@pytest.mark.parametrize("target", ["setup", "demo", "lint", "test", "bench"])
def test_make_has_the_promised_targets_and_help_lists_them(target: str) -> None:
    """Each of the five words is a target that make knows how to run, and stands in `make help`."""
    help_text = subprocess.run(
        ["make", "-s", "help"], cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout
    assert re.search(rf"^{target} +\w", help_text, re.MULTILINE)
    known = subprocess.run(["make", "-n", target], cwd=ROOT, capture_output=True, text=True)
    assert known.returncode == 0, known.stderr


@pytest.mark.parametrize("name", SCRIPTS)
def test_scripts_are_executable_and_parse(name: str) -> None:
    """Each script can be run as it is, stops at the first failure, and has no syntax error."""
    script = ROOT / name
    assert os.access(script, os.X_OK)
    assert "\nset -euo pipefail\n" in script.read_text()
    subprocess.run(["bash", "-n", str(script)], check=True)


def test_continuous_integration_runs_the_one_command() -> None:
    """.ci/run runs `make test` and nothing else."""
    lines = (ROOT / ".ci/run").read_text().splitlines()
    commands = [line for line in lines if line and not line.startswith(("#", "set ", "cd "))]
    assert commands == ["exec make test < /dev/null"]


def test_an_unknown_option_of_setup_changes_nothing() -> None:
    """A wrong word is answered with the right ones."""
    said = subprocess.run([str(ROOT / "scripts/setup"), "--all"], capture_output=True, text=True)
    assert said.returncode == 1
    assert "usage: scripts/setup [--run-only]" in said.stderr
    assert said.stdout == ""


@pytest.mark.skipif(shutil.which("dpkg-query") is None, reason="not a Debian system")
def test_setup_names_only_packages_that_this_debian_has() -> None:
    """A package that is not in the archive would stop setup on a fresh machine; the lists of apt know."""
    named = re.findall(r"_PACKAGES=\(([^)]*)\)", (ROOT / "scripts/setup").read_text())
    packages = " ".join(named).split()
    assert "crun" in packages
    known = subprocess.run(
        ["apt-cache", "show", "--no-all-versions", *packages], capture_output=True, text=True
    )
    listed = set(re.findall(r"^Package: (\S+)", known.stdout, re.MULTILINE))
    if not listed:
        pytest.skip("needs the package lists of apt: run apt-get update")
    assert set(packages) <= listed


def test_the_licence_is_the_whole_apache_2() -> None:
    """LICENSE is the full text, from its title to its appendix."""
    text = (ROOT / "LICENSE").read_text()
    assert "Apache License" in text.splitlines()[1]
    assert "END OF TERMS AND CONDITIONS" in text
    assert "APPENDIX: How to apply the Apache License to your work." in text


def test_the_changelog_tells_of_this_version() -> None:
    """The version in the code stands in the changelog, so no release is silent."""
    assert re.search(rf"^## {re.escape(VERSION)}\b", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)
    assert f'version = "{VERSION}"' in (ROOT / "pyproject.toml").read_text()


def test_no_file_names_a_machine_of_ours() -> None:
    """No path of a developer's machine and no package registry's address stands in the project."""
    # Written in two parts, so that this file does not name them either.
    unwanted = [
        first + second for first, second in (("/work", "/main"), ("/work", "/shared"), ("/tmp", "/w/"))
    ]
    unwanted += [first + second for first, second in (("files.python", "hosted.org"), ("pypi", ".org"))]
    unwanted += [first + second for first, second in (("deb.debian", ".org"), ("docker", ".io"))]
    found = []
    for path in project_files():
        text = path.read_text(encoding="utf-8", errors="replace")
        found += [f"{path.relative_to(ROOT)}: {word}" for word in unwanted if word in text]
    assert found == []


def test_links_between_documents_lead_somewhere() -> None:
    """Every relative link in the Markdown files names a file that exists."""
    broken = []
    for path in project_files():
        if path.suffix == ".md":
            for target in re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", path.read_text()):
                if not (path.parent / target).exists():
                    broken.append(f"{path.relative_to(ROOT)} -> {target}")
    assert broken == []
