"""The pages say what the code does: links, commands, options, controls and names are compared with it."""

import inspect
import json
import os
import re
from pathlib import Path

import msgspec
import plan_inputs
import pytest
from test_host_enforce import ROOT_V1, ROOT_V2

import ringfence
from ringfence import cli
from ringfence.cli import plan as plan_verb
from ringfence.cli import run as run_verb
from ringfence.host.facts import Host, Lsm
from ringfence.host.sources import Source
from ringfence.plan.make import make_plan
from ringfence.plan.workload import Workload
from ringfence.policy.load import load, override
from ringfence.proof.observe import Subject
from ringfence.proof.prove import prove
from ringfence.runtime.base import Instance

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md", *sorted(DOCS.rglob("*.md"))]
DECISIONS = sorted((DOCS / "decisions").glob("*.md"))
OUR_OWN = {"--debug", "--version", "--help"}


def name_of(page: Path) -> str:
    return os.fspath(page.relative_to(ROOT))


def section(page: str, heading: str) -> str:
    """Return what stands below `heading` of a page, up to the next one of its kind."""
    text = (DOCS / page).read_text()
    assert f"\n## {heading}\n" in text
    return text.partition(f"\n## {heading}\n")[2].partition("\n## ")[0]


def anchors(page: Path) -> set[str]:
    """Return the names by which a page's headings can be linked to."""
    found = re.findall(r"^#+ (.*)", re.sub(r"^```.*?^```", "", page.read_text(), flags=re.M | re.S), re.M)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in found}


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_links_lead_to_a_file_and_to_a_heading_in_it(page: Path) -> None:
    """Every relative link names a file that exists and, after #, a heading of that page."""
    broken = []
    for path, anchor in re.findall(r"\]\((?!https?:)([^)#\s]*)#?([^)\s]*)\)", page.read_text()):
        target = page.parent / path if path else page
        if not target.exists() or (anchor and anchor not in anchors(target)):
            broken.append(f"{path}#{anchor}")
    assert broken == []


def test_every_page_can_be_found() -> None:
    """The README lists every page of docs/, architecture.md every decision; decisions are numbered without gaps."""
    readme = (ROOT / "README.md").read_text()
    assert [page.name for page in sorted(DOCS.glob("*.md")) if f"](docs/{page.name})" not in readme] == []
    architecture = (DOCS / "architecture.md").read_text()
    assert [page.name for page in DECISIONS if f"](decisions/{page.name})" not in architecture] == []
    assert [int(page.name[:4]) for page in DECISIONS] == list(range(1, len(DECISIONS) + 1))


@pytest.mark.parametrize("page", DECISIONS, ids=name_of)
def test_a_decision_says_why_and_what_it_costs(page: Path) -> None:
    """Each has its number and its four parts, in order, and is short; architecture.md has its title."""
    text = page.read_text()
    title = re.match(r"# (\d+)\. (.+)\n", text)
    assert title and int(title[1]) == int(page.name[:4])
    parts = [text.find(f"**{part}.**") for part in ("Context", "Decision", "Why", "What it costs")]
    assert parts == sorted(parts)
    assert parts[0] > 0
    assert len(text.splitlines()) <= 32
    assert f"| [{title[1]}](decisions/{page.name}) | {title[2]} |" in (DOCS / "architecture.md").read_text()


def commands(text: str) -> list[list[str]]:
    """Return the words of each command line that begins with ``ringfence``, up to a comment or another command."""
    code = re.findall(r"^```\w*\n(.*?)^```", text, re.M | re.S) + re.findall(r"`([^`\n]+)`", text)
    lines = [line for block in code for line in re.split(r"[\n;|]| #|\$\(|&&", block)]
    found = [re.match(r"\s*(?:\$ )?(?:sudo )?(?:\.venv/bin/)?ringfence (.+)", line) for line in lines]
    return [match[1].split() for match in found if match]


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_commands_exist(page: Path) -> None:
    """What follows `ringfence` on a page is a verb or an option of its own."""
    known = {*cli.VERBS, *OUR_OWN, "VERB", "COMMAND"}
    assert {words[0] for words in commands(page.read_text())} - known == set()


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_options_of_run_and_plan_exist(page: Path) -> None:
    """Every option after `ringfence run` or `ringfence plan`, before the command, is one that it takes."""
    wrong = []
    for verb, *words in commands(page.read_text()):
        if verb in ("run", "plan"):
            parser = (run_verb if verb == "run" else plan_verb).parser()
            known = {option for action in parser._actions for option in action.option_strings} | OUR_OWN
            ours = words[: words.index("--")] if "--" in words else words
            options = [
                word.partition("=")[0].rstrip(".,") for word in ours if word.startswith("-") and word != "-"
            ]
            wrong += [option for option in options if option not in known and option not in ("-it", "-ti")]
    assert wrong == []


def test_options_on_pages_are_options_of_something() -> None:
    """A long option that a page writes alone, as `--set`, is one of `run`, or stands in a module of the CLI."""
    known = {option for action in run_verb.parser()._actions for option in action.option_strings} | OUR_OWN
    source = "".join(path.read_text() for path in (ROOT / "src/ringfence/cli").glob("*.py"))
    unknown = []
    for page in [ROOT / "README.md", DOCS / "proof.md", DOCS / "python.md", DOCS / "security.md", *DECISIONS]:
        for option in re.findall(r"`(--[a-z][a-z-]+)", page.read_text()):
            if option not in known and f'"{option}"' not in source and option not in ELSEWHERE:
                unknown.append(f"{page.name}: {option}")
    assert unknown == []


# The agent's.
ELSEWHERE = {"--userns"}


EVERYTHING = {
    "filesystem.sysfs": True,
    "filesystem.mounts": [{"source": "/srv/data", "target": "/data", "mode": "rw"}],
    "sysctls": {"net.core.somaxconn": "1024"},
    "limits.cpuset": "0",
}
GENERAL = {"mount:/data": "mount:TARGET", "sysctl:net.core.somaxconn": "sysctl:NAME"}
GENERAL |= {f"cgroup.io.{key}:254:0": f"cgroup.io.{key}:DISK" for key in ("rbps", "wbps", "riops", "wiops")}


def everything(host: Host) -> list[str]:
    """Return the names of all controls of a plan that asks for everything."""
    policy = override(load("untrusted"), EVERYTHING)
    workload = Workload(
        image="base",
        image_digest="sha256:0",
        layers=("/var/lib/ringfence/x",),
        env=(),
        disks=("254:0",),
        sources=(Source("/srv/data", "/srv/data", "/data", "directory", False),),
    )
    complete = msgspec.structs.replace(
        host,
        overlayfs=True,
        idmapped_mounts=True,
        lsm=Lsm(apparmor=True, apparmor_profile=True),
    )
    io = frozenset({"limits.io.write", "limits.io.write_iops"} if host.cgroup.version == "v1" else ())
    return [
        control["name"] for control in make_plan(policy, workload, complete, allow_unenforced=io)["controls"]
    ]


def test_the_page_on_proofs_lists_every_control() -> None:
    """The table of proof.md has the controls that plans for v1 and v2 ask for, and no other."""
    plans = {*everything(ROOT_V1), *everything(ROOT_V2)}
    assert sorted(listed(section("proof.md", "Controls"))) == sorted(
        {GENERAL.get(name, name) for name in plans}
    )


def listed(text: str) -> list[str]:
    """Return the names in the first column of the tables of `text`."""
    rows = re.findall(r"^\| (`[^|]*) \|", text, re.M)
    return [name for row in rows for name in re.findall(r"`([^`]+)`", row)]


def subsection(page: str, heading: str) -> str:
    text = (DOCS / page).read_text()
    assert f"\n### {heading}\n" in text
    return re.split(r"\n##+ ", text.partition(f"\n### {heading}\n")[2])[0]


@pytest.mark.parametrize("accelerated", [True, False])
def test_the_page_on_proofs_lists_every_control_of_a_machine(*, accelerated: bool) -> None:
    """The tables about virtual machines have the controls that their plans ask for, each once, and no other."""
    host = plan_inputs.ROOT_V1_QEMU if accelerated else plan_inputs.ROOT_V1_EMULATED
    changes = {**EVERYTHING, "filesystem.mounts": [{"source": "/srv/data", "target": "/data", "mode": "ro"}]}
    workload = msgspec.structs.replace(
        plan_inputs.MACHINE,
        disks=("254:0",),
        sources=(Source("/srv/data", "/srv/data", "/data", "directory", True),),
    )
    policy = override(load("untrusted"), {**changes, "isolation": "microvm"})
    plan = make_plan(policy, workload, host, emulation=not accelerated)
    asked = {GENERAL.get(control["name"], control["name"]) for control in plan["controls"]}
    reported = listed(subsection("proof.md", "What the guest reports"))
    observed = listed(subsection("proof.md", "What the host sees of the machine"))
    assert sorted(reported + observed) == sorted(asked)
    own = {name for name in asked if name.startswith(("vmm.", "bridge.", "cgroup."))}
    assert set(observed) == own


def test_the_page_on_proofs_lists_every_control_behind_gvisor() -> None:
    """Of a plan for gVisor every control stands in the tables about it, or in the general one; and none is invented."""
    workload = msgspec.structs.replace(
        plan_inputs.BASE,
        disks=("254:0",),
        sources=(Source("/srv/data", "/srv/data", "/data", "directory", True),),
    )
    changes = {
        "filesystem.sysfs": True,
        "filesystem.mounts": [{"source": "/srv/data", "target": "/data", "mode": "ro"}],
    }
    policy = override(load("untrusted"), {**changes, "isolation": "gvisor", "limits.cpuset": "0"})
    plan = make_plan(policy, workload, plan_inputs.ROOT_V1_GVISOR)
    asked = {GENERAL.get(control["name"], control["name"]) for control in plan["controls"]}
    tables = [
        *listed(subsection("proof.md", "What the sentry reports")),
        *listed(subsection("proof.md", "What the host sees of its parts")),
    ]
    assert set(tables) - asked == set()
    assert asked - set(tables) - set(listed(section("proof.md", "Controls"))) == set()


def test_the_json_of_a_proof_has_the_keys_of_the_page() -> None:
    """The example in proof.md has the keys, in order, of a proof that is made of this very process."""
    shown = json.loads(re.findall(r"^```json\n(.*?)^```", section("proof.md", "The JSON"), re.M | re.S)[0])
    workload = Workload(image="base", image_digest="sha256:0", layers=("/x",), env=())
    host = msgspec.structs.replace(ROOT_V1, overlayfs=True, idmapped_mounts=True)
    plan = make_plan(load("untrusted"), workload, host)
    instance = Instance(id="a", directory="/a", staging="/b", base=1, cgroup_path="")
    subject = Subject(pid=os.getpid(), base=1, size=1, cgroup=None, rules=())
    made = prove(plan, instance, subject, reported_descriptors=3)
    assert not made["holds"]
    assert list(shown) == list(made)
    assert list(shown["lines"][0]) == list(made["lines"][0])


def test_the_page_on_python_has_every_name() -> None:
    """python.md lists the parameters of ringfence.run, in order, with their defaults, and what a Result has."""
    table = section("python.md", "`ringfence.run(argv, …) -> Result`")
    rows = dict(re.findall(r"^\| `(\w+)` \| (.*?) \|", table, re.M))
    parameters = inspect.signature(ringfence.run).parameters
    assert list(rows) == list(parameters)
    assert rows["policy"] == '`"untrusted"`'
    listed = re.findall(r"^\| (`.*?) \|", section("python.md", "`Result`"), re.M)
    names = [name for cell in listed for name in re.findall(r"`(\w+)`", cell)]
    assert sorted(names) == sorted(ringfence.Result.__slots__)


def test_the_tour_is_short() -> None:
    """The README's tour is one screen, and its first example is that of the help."""
    readme = (ROOT / "README.md").read_text()
    tour = readme.partition("\n## A tour\n")[2].partition("```\n")[2].partition("```")[0]
    assert len(tour.splitlines()) <= 30
    assert len([line for line in tour.splitlines() if line.startswith("$ ")]) <= 20
    assert "ringfence run -- python3 -c 'print(sum(range(10)))'" in readme
    assert "ringfence run -- python3 -c 'print(sum(range(10)))'" in cli.usage()
