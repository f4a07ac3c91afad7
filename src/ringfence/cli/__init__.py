"""The command line: a table of verbs; the chosen one is imported, nothing else.

Every verb is a module ``ringfence.cli.<verb>`` with ``main(argv: list[str]) -> int``.
"""

import sys

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Sequence

VERBS = {
    "run": "Run a command in a fresh sandbox under a policy.",
    "exec": "Run another command in a running sandbox.",
    "ps": "List sandboxes.",
    "logs": "Show the output of a detached sandbox.",
    "stop": "Stop sandboxes: SIGTERM, then SIGKILL.",
    "rm": "Remove stopped sandboxes and their logs.",
    "gc": "Remove what crashed runs left behind.",
    "plan": "Print what a run would do, and do nothing.",
    "policy": "List, show, validate and compare policies.",
    "image": "Build and list the images that Ringfence can run.",
    "doctor": "Say what this host can enforce and how.",
}


def usage() -> str:
    """Return the text of ``ringfence --help``."""
    lines = [
        "usage: ringfence COMMAND ...",
        "",
        "  ringfence run -- python3 -c 'print(sum(range(10)))'",
        "",
        "commands:",
        *(f"  {verb:9} {text}" for verb, text in VERBS.items()),
        "",
        "'ringfence COMMAND --help' says more. Options for all: --debug (show tracebacks), --version.",
    ]
    return "\n".join(lines)


def main(argv: "Sequence[str]") -> int:
    """Run one command and return its exit status; expected failures become one line on stderr."""
    args = list(argv)
    if not args or args[0] in ("-h", "--help", "help"):
        print(usage(), file=sys.stdout if args else sys.stderr)
        return 0 if args else 2
    if args[0] in ("-V", "--version"):
        from ringfence.version import VERSION

        print(f"ringfence {VERSION}")
        return 0
    own = args[: args.index("--")] if "--" in args else args
    debug = "--debug" in own
    if debug:
        args.remove("--debug")
    verb, *rest = args
    if verb not in VERBS:
        print(
            f"ringfence: no command {verb!r}{_nearest(verb)}; see 'ringfence --help' [RF-USAGE]",
            file=sys.stderr,
        )
        return 2
    from importlib import import_module

    from ringfence.errors import RingfenceError

    try:
        status: int = import_module(f"ringfence.cli.{verb.replace('-', '_')}").main(rest)
    except RingfenceError as error:
        if debug:
            raise
        print(f"ringfence: {error}", file=sys.stderr)
        return error.exit_status
    return status


def _nearest(word: str) -> str:
    import difflib

    close = difflib.get_close_matches(word, VERBS, 1)
    return f", did you mean {close[0]!r}?" if close else ""


def entry() -> None:
    """Run as the ``ringfence`` program."""
    sys.exit(main(sys.argv[1:]))
