"""``ringfence policy``: list, show, validate and compare policies, and print their JSON Schema."""

from __future__ import annotations

import sys

TYPE_CHECKING = False
if TYPE_CHECKING:
    import argparse
    from collections.abc import Callable

EXAMPLES = """examples:
  ringfence policy show hostile
  ringfence policy validate ./policy.yaml
  ringfence policy diff untrusted ./policy.yaml
"""


def main(argv: list[str]) -> int:
    """Run ``ringfence policy`` and return its exit status: 1 for a diff that widens, 2 for bad input."""
    from ringfence.errors import PolicyError

    args = _parser().parse_args(argv)
    command: Callable[[argparse.Namespace], int] = args.command
    try:
        return command(args)
    except PolicyError as error:
        print(f"ringfence: {error}", file=sys.stderr)
        return 2


def _parser() -> argparse.ArgumentParser:
    import argparse

    parser = argparse.ArgumentParser(
        prog="ringfence policy",
        description="List, show, validate and compare policies.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    verbs = parser.add_subparsers(title="commands", required=True, metavar="COMMAND")

    def verb(name: str, command: Callable[[argparse.Namespace], int], text: str) -> argparse.ArgumentParser:
        sub = verbs.add_parser(name, help=text, description=text, allow_abbrev=False)
        sub.add_argument("--json", action="store_true", help="print JSON")
        sub.set_defaults(command=command)
        return sub

    verb("list", _list, "List the presets.")
    show = verb("show", _show, "Print a policy with every field, after extends and merging.")
    show.add_argument("policy", metavar="NAME|FILE")
    validate = verb("validate", _validate, "Check files; exit 0 when all are right, else 2.")
    validate.add_argument("files", metavar="FILE", nargs="+")
    verb("schema", _schema, "Print the JSON Schema of policy files.")
    diff = verb(
        "diff", _diff, "Say what B permits that A does not; exit 1 if anything widened or might have."
    )
    diff.add_argument("a", metavar="A", help="a preset or a file")
    diff.add_argument("b", metavar="B", help="a preset or a file")
    return parser


def _list(args: argparse.Namespace) -> int:
    from ringfence.policy.load import PRESETS, load, preset_text

    rows = []
    for name in PRESETS:
        # The first line of every preset is a comment that says what it is for.
        description = preset_text(name).decode().partition("\n")[0].removeprefix("# ")
        rows.append({"name": name, "floor": load(name).floor, "description": description})
    if args.json:
        _print_json(rows)
    else:
        for row in rows:
            print(f"{row['name']:10} {row['floor']:8} {row['description']}")
    return 0


def _show(args: argparse.Namespace) -> int:
    from ringfence.policy.dump import dump_yaml, to_plain
    from ringfence.policy.load import load

    policy = load(args.policy)
    if args.json:
        _print_json(to_plain(policy))
    else:
        print(dump_yaml(policy), end="")
    return 0


def _validate(args: argparse.Namespace) -> int:
    from ringfence.errors import PolicyError
    from ringfence.policy.digest import digest
    from ringfence.policy.load import load

    results: list[dict[str, str | bool]] = []
    for file in args.files:
        try:
            found = digest(load(file))
        except PolicyError as error:
            results.append({"file": file, "ok": False, "error": str(error)})
        else:
            results.append({"file": file, "ok": True, "digest": found})
    if args.json:
        _print_json(results)
    else:
        for result in results:
            print(
                f"{result['file']}: ok" if result["ok"] else f"ringfence: {result['error']}",
                file=sys.stdout if result["ok"] else sys.stderr,
            )
    return 0 if all(result["ok"] for result in results) else 2


def _schema(_args: argparse.Namespace) -> int:
    from ringfence.policy.schema import schema

    _print_json(schema())
    return 0


def _diff(args: argparse.Namespace) -> int:
    from ringfence.policy.diff import diff, widens
    from ringfence.policy.load import load

    changes = diff(load(args.a), load(args.b))
    if args.json:
        rows = [{"field": c.field, "direction": c.direction, "words": c.words} for c in changes]
        _print_json({"a": args.a, "b": args.b, "widens": widens(changes), "changes": rows})
    else:
        for change in changes:
            print(f"{change.direction:8} {change.field:22} {change.words}")
        if not changes:
            print("no difference")
    return 1 if widens(changes) else 0


def _print_json(value: object) -> None:
    import json

    print(json.dumps(value, indent=2, ensure_ascii=False))
