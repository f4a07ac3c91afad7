"""``ringfence gc``: remove what crashes left behind."""

from __future__ import annotations

import sys

from ringfence.errors import one_line
from ringfence.sandbox import reap

TYPE_CHECKING = False
if TYPE_CHECKING:
    import argparse

    from ringfence.cgroup.layout import Layout

_HELP = """example:
  ringfence gc

Remove processes, cgroups, id ranges, directories and logs that crashed runs left behind. Every run does most of
this, too. Living sandboxes, and the records and logs of ended detached ones, are kept.

exit status: 0 all is clean, 125 something could not be removed
"""
_STUCK = 125


def main(argv: list[str]) -> int:
    """Run the verb; see the module's docstring."""
    args = _parser().parse_args(argv)
    collected = reap.collect(_layout())
    if args.json:
        import json

        shown = {"removed": collected.removed, "kept": collected.kept, "problems": collected.problems}
        print(json.dumps(shown, indent=2))
    else:
        for word, lines in (("removed", collected.removed), ("kept", collected.kept)):
            for line in lines:
                print(f"{word} {one_line(line)}")
        if not collected.removed and not collected.problems:
            print("nothing to clean up")
    for problem in collected.problems:
        print(f"ringfence: {one_line(problem)}", file=sys.stderr)
    return _STUCK if collected.problems else 0


def _layout() -> Layout | None:
    """Return where this host's cgroups are; None when it has none."""
    from msgspec.structs import asdict

    from ringfence.cgroup.layout import Layout
    from ringfence.host.cache import detect_cached
    from ringfence.linux.paths import run_dir

    facts = detect_cached(f"{run_dir()}/host.json").cgroup
    return Layout.from_dict(asdict(facts)) if facts.version != "none" else None


def _parser() -> argparse.ArgumentParser:
    import argparse

    from ringfence.cli.parser import Parser

    parser = Parser(
        prog="ringfence gc",
        description=_HELP,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--json", action="store_true", help="print JSON")
    return parser
