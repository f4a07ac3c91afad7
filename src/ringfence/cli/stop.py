"""``ringfence stop``: end sandboxes, politely first."""

from __future__ import annotations

from ringfence.cli.tell import complain
from ringfence.errors import RingfenceError
from ringfence.sandbox import store

TYPE_CHECKING = False
if TYPE_CHECKING:
    import argparse

_HELP = """examples:
  ringfence stop web
  ringfence stop --time 1 web 3f2a

Send SIGTERM to the commands of sandboxes, and kill what has not ended in time. The name of each is printed when
nothing of it lives any more.
"""
_MOST_S = 86400.0


def main(argv: list[str]) -> int:
    """Run the verb; see the module's docstring."""
    args = _parser().parse_args(argv)
    status = 0
    living = []
    for name in args.names:
        try:
            entry = store.find(name)
        except RingfenceError as error:
            status = complain(error)
            continue
        if entry.alive():
            living.append((name, entry))
        else:
            print(f"{name} (had ended)")
    if living:
        from ringfence.sandbox.attach import stop

        problems = stop([entry for _, entry in living], grace_s=args.time)
        for (name, _), problem in zip(living, problems, strict=True):
            if problem is not None:
                status = complain(problem)
            else:
                print(name)
    return status


def _parser() -> argparse.ArgumentParser:
    import argparse

    from ringfence.cli.parser import Parser

    parser = Parser(
        prog="ringfence stop",
        description=_HELP,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("names", nargs="+", metavar="NAME", help="name, id, or beginning of an id")
    parser.add_argument(
        "-t",
        "--time",
        type=_seconds,
        default=10.0,
        metavar="SECONDS",
        help="time to end in; 10; 0 kills at once",
    )
    return parser


def _seconds(text: str) -> float:
    from argparse import ArgumentTypeError

    try:
        seconds = float(text)
    except ValueError:
        seconds = -1
    if not 0 <= seconds <= _MOST_S:
        raise ArgumentTypeError(f"{text!r} is not a number of seconds from 0 to {_MOST_S:.0f}")
    return seconds
