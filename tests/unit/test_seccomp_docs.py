"""docs/seccomp.md says what the code does. Run this file as a program to write the lists anew."""

from pathlib import Path

from ringfence.plan import seccomp_calls as calls
from ringfence.plan.seccomp import seccomp_for

PAGE = Path(__file__).parents[2] / "docs" / "seccomp.md"
SECTIONS = (
    ("Allowed by default", calls.ALLOWED),
    ("Judged by arguments", calls.CONDITIONAL),
    ("Never, with any capability or profile", calls.NEVER),
    ("Denied", calls.DENIED),
    ("Left out, though the kernel may have it", calls.ABSENT),
    ("The whole of strict", calls.STRICT),
)
LISTS, CAPABILITIES = "<!-- lists -->\n", "<!-- capabilities -->\n"


def code(names):
    return " ".join(f"`{name}`" for name in names.split())


def lists():
    parts = []
    for title, groups in SECTIONS:
        rows = [f"| {group} | {why} | {code(names)} |" for group, why, names in groups]
        parts.append("\n".join([f"### {title}", "", "| what | why | calls |", "|---|---|---|", *rows]))
    return "\n" + "\n\n".join(parts) + "\n"


def capabilities():
    rows = [f"| {cap} | {code(names)} |" for cap, names in sorted(calls.GRANTED_BY.items())]
    return "\n".join(["", "| capability | calls |", "|---|---|", *rows]) + "\n"


def rewritten(page):
    """Return `page` with both generated parts made anew."""
    before, _, _ = page.partition(LISTS)
    head, _, rest = before.partition(CAPABILITIES)
    _, _, tail = rest.partition("\n## ")
    return f"{head}{CAPABILITIES}{capabilities()}\n## {tail}{LISTS}{lists()}"


def test_the_lists_are_those_of_the_code():
    """If this fails, run the file as a program and look at the difference."""
    page = PAGE.read_text()
    assert page == rewritten(page)


def test_the_page_quotes_the_summaries():
    """The two lines at the top are the plan's own words."""
    for name in ("default", "strict"):
        assert seccomp_for(name, arch="x86_64").summary + "\n" in PAGE.read_text()


if __name__ == "__main__":
    PAGE.write_text(rewritten(PAGE.read_text()))
