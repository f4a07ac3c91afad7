"""``ringfence cp``: files into a running sandbox, and out of one."""

from __future__ import annotations

import os
import signal
import sys

from ringfence.cli.terminal import fill_standard_streams
from ringfence.errors import SandboxError, UsageError, one_line

TYPE_CHECKING = False
if TYPE_CHECKING:
    import argparse

    from ringfence.sandbox.copying import LeftOut
    from ringfence.sandbox.store import Entry

_HELP = """examples:
  ringfence cp data.csv web:/tmp/
  ringfence cp web:/tmp/results ./
  ringfence cp web:/var/log - | tar t

Copy SRC to DST; one of them is a path in the running sandbox NAME (a name, an id, or the beginning of one). In a
directory the copy gets SRC's name; SRC/. means the content of SRC. '-' is an archive, on standard input or output.
What is copied belongs to the sandbox's user inside and to you outside. Links are copied as links, if they stay
within what is copied.

exit status: 0 all was copied; 1 something was left out, which is said; 125 it failed; 2 no such sandbox
"""


def main(argv: list[str]) -> int:
    """Run the verb; see the module's docstring."""
    fill_standard_streams()
    args = _parser().parse_args(argv)
    source, target = _sides(args.source, args.target)
    # An end by a signal must still remove the half of a file.
    signal.signal(signal.SIGTERM, _interrupt)
    from ringfence.sandbox.copying import LeftOut

    left_out = LeftOut(lambda text: print(f"ringfence: {one_line(text)}", file=sys.stderr))
    try:
        if source[0]:
            _out(source, target[1], args, left_out)
        else:
            _in(source[1], target, args, left_out)
    except OSError as error:
        if isinstance(error, BrokenPipeError):
            raise
        about = f" {os.fsdecode(error.filename)!r}" if error.filename else ""
        raise SandboxError(f"cannot copy{about}: {error.strerror}") from error
    finally:
        left_out.finish()
    return 1 if left_out.count else 0


def _interrupt(*_: object) -> None:
    raise KeyboardInterrupt


def _parser() -> argparse.ArgumentParser:
    import argparse

    from ringfence.cli.parser import Parser

    parser = Parser(
        prog="ringfence cp",
        usage="ringfence cp [OPTIONS] NAME:PATH DST | SRC NAME:PATH",
        description=_HELP,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("source", metavar="SRC", help=argparse.SUPPRESS)
    parser.add_argument("target", metavar="DST", help=argparse.SUPPRESS)
    parser.add_argument(
        "-L", "--follow-link", action="store_true", help="if SRC itself is a link, copy what it leads to"
    )
    parser.add_argument(
        "--max-size",
        metavar="SIZE",
        default="1GiB",
        help="let no more than this come out of a sandbox (1GiB)",
    )
    return parser


def _sides(source: str, target: str) -> tuple[tuple[str, str], tuple[str, str]]:
    """Return (sandbox, path) of both, with no sandbox for the host's."""
    sides = _side(source), _side(target)
    if bool(sides[0][0]) == bool(sides[1][0]):
        raise UsageError(
            "one of SRC and DST has to be in a sandbox, and only one",
            hint="NAME:/PATH is in one; ./NAME:PATH is a file",
        )
    return sides


def _side(word: str) -> tuple[str, str]:
    name, colon, path = word.partition(":")
    if not colon or not name or "/" in name or name.startswith("."):
        return "", word
    return name, path


def _find(name: str) -> Entry:
    from ringfence.sandbox import store
    from ringfence.sandbox.attach import not_running

    entry = store.find(name)
    if not entry.alive():
        raise not_running(entry)
    return entry


def _out(source: tuple[str, str], to: str, args: argparse.Namespace, left_out: LeftOut) -> None:
    from ringfence.policy.units import parse_size
    from ringfence.sandbox.copying import copy_out

    most_bytes = parse_size(args.max_size, least=1)
    if to == "-" and os.isatty(1):
        raise UsageError("an archive is not for a terminal", hint="redirect it, or give a directory")
    copy_out(
        _find(source[0]),
        source[1],
        _write if to == "-" else to,
        follow=args.follow_link,
        most_bytes=most_bytes,
        left_out=left_out,
    )


def _in(source: str, target: tuple[str, str], args: argparse.Namespace, left_out: LeftOut) -> None:
    from ringfence.sandbox.copying import copy_in

    if source == "-" and os.isatty(0):
        raise UsageError("an archive is not typed", hint="tar c . | ringfence cp - NAME:/PATH")
    entry = _find(target[0])
    copy_in(_read if source == "-" else source, entry, target[1], follow=args.follow_link, left_out=left_out)


def _read(size: int) -> bytes:
    return os.read(0, size)


def _write(data: bytes | memoryview) -> None:
    rest = memoryview(data)
    while rest:
        rest = rest[os.write(1, rest) :]
