"""The command line: a table of verbs; the chosen one is imported, nothing else.

Every verb is a module ``ringfence.cli.<verb>`` with ``main(argv: list[str]) -> int``.
"""

import os
import sys

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Sequence

VERBS = {
    "run": "Run a command in a fresh sandbox under a policy.",
    "exec": "Run another command in a running sandbox.",
    "ps": "List sandboxes.",
    "cp": "Copy files into a running sandbox, or out of one.",
    "logs": "Show the output of a detached sandbox.",
    "stop": "Stop sandboxes: SIGTERM, then SIGKILL.",
    "rm": "Remove stopped sandboxes and their logs.",
    "gc": "Remove what crashed runs left behind.",
    "plan": "Print what a run would do, and do nothing.",
    "policy": "List, show, validate and compare policies.",
    "image": "Build and list the images that Ringfence can run.",
    "kernel": "Build, fetch and choose the kernels of virtual machines.",
    "doctor": "Say what this host can enforce and how.",
}

_FAILED, _INTERRUPTED, _NOBODY_READS = 125, 130, 141


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
    """Run one command and return its exit status; expected failures become one line on stderr.

    141 (128 + SIGPIPE) when nobody reads our output any more, 130 (128 + SIGINT) after Ctrl-C.
    """
    own = argv[: argv.index("--")] if "--" in argv else argv
    try:
        try:
            return _command(argv, debug="--debug" in own)
        finally:
            # Here and not at the interpreter's end, where it is too late to say anything about it.
            if sys.stdout is not None:
                sys.stdout.flush()
    except BrokenPipeError:
        _drop_output()
        return _NOBODY_READS
    except KeyboardInterrupt:
        return _INTERRUPTED
    except OSError as error:
        if "--debug" in own:
            raise
        from ringfence.errors import one_line

        _drop_output()
        about = f" ({error.filename})" if error.filename else ""
        print(
            f"ringfence: {one_line(f'{error.strerror or error}{about}')}; see --debug [RF-ERROR]",
            file=sys.stderr,
        )
        return _FAILED


def _command(argv: "Sequence[str]", *, debug: bool) -> int:
    args = list(argv)
    if not args or args[0] in ("-h", "--help", "help"):
        print(usage(), file=sys.stdout if args else sys.stderr)
        return 0 if args else 2
    if args[0] in ("-V", "--version"):
        from ringfence.version import VERSION

        print(f"ringfence {VERSION}")
        return 0
    if debug:
        args.remove("--debug")
    verb, *rest = args
    if verb not in VERBS:
        print(
            f"ringfence: no command {verb!r}{_nearest(verb)}; see 'ringfence --help' [RF-USAGE]",
            file=sys.stderr,
        )
        return 2
    from ringfence.errors import RingfenceError

    try:
        status: int = __import__(f"ringfence.cli.{verb}", fromlist=["main"]).main(rest)
    except RingfenceError as error:
        if debug:
            raise
        print(f"ringfence: {error}", file=sys.stderr)
        return error.exit_status
    return status


def _drop_output() -> None:
    """Let what is still to be written go nowhere, or the interpreter would try once more at its end."""
    null = os.open(os.devnull, os.O_WRONLY)
    os.dup2(null, 1)
    os.close(null)


def _nearest(word: str) -> str:
    import difflib

    close = difflib.get_close_matches(word, VERBS, 1)
    return f", did you mean {close[0]!r}?" if close else ""


def entry() -> None:
    """Run as the ``ringfence`` program."""
    status = main(sys.argv[1:])
    if sys.stderr is not None:
        try:
            sys.stderr.flush()
        except OSError:
            pass  # whoever read what we had to say has gone: the command's own status still counts
    # Everything is closed and flushed; taking the interpreter apart would only cost time.
    os._exit(status)
