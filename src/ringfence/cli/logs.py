"""``ringfence logs``: what a detached sandbox wrote, stream by stream and byte by byte."""

from __future__ import annotations

import os
import sys
import time

from ringfence.cli.terminal import fill_standard_streams
from ringfence.errors import SandboxError, one_line
from ringfence.sandbox import protocol, store
from ringfence.sandbox.logs import end_of, follow, utc

TYPE_CHECKING = False
if TYPE_CHECKING:
    import argparse
    from collections.abc import Callable

    from ringfence.sandbox.store import Entry

_HELP = """examples:
  ringfence logs web
  ringfence logs --follow --timestamps web
  ringfence logs --stderr-only web 2> errors

Print what a detached sandbox wrote to its standard output and error, on ours.
"""
_LOOK_AGAIN_S = 0.05
_NAMES = {protocol.STDOUT: "stdout", protocol.STDERR: "stderr"}


def main(argv: list[str]) -> int:
    """Run the verb; see the module's docstring."""
    fill_standard_streams()
    args = _parser().parse_args(argv)
    entry = store.find(args.name)
    if not entry.record().get("detached"):
        raise SandboxError(
            f"sandbox {entry.id} has no log: its output goes to where it was started",
            hint="ringfence run --detach keeps one",
        )
    write = _writer(args)
    path = entry.log_path()
    if os.path.exists(path):
        for time_ns, stream, data in follow(path, wait=_until_ended(entry) if args.follow else None):
            if stream in args.streams:
                write(time_ns, stream, data)
    _explain(entry)
    return 0


def _parser() -> argparse.ArgumentParser:
    import argparse

    from ringfence.cli.parser import Parser

    parser = Parser(
        prog="ringfence logs",
        description=_HELP,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("name", metavar="NAME", help="name, id, or beginning of an id")
    parser.add_argument("-f", "--follow", action="store_true", help="go on until the sandbox ends")
    which = parser.add_mutually_exclusive_group()
    which.set_defaults(streams=tuple(_NAMES))
    for stream, name in _NAMES.items():
        which.add_argument(
            f"--{name}-only",
            dest="streams",
            action="store_const",
            const=(stream,),
            help=f"leave out all but {name}",
        )
    how = parser.add_mutually_exclusive_group()
    how.add_argument("-t", "--timestamps", action="store_true", help="begin each line with its time")
    how.add_argument("--json", action="store_true", help="print one JSON object for each piece of output")
    return parser


def _until_ended(entry: Entry) -> Callable[[], bool]:
    def wait() -> bool:
        if not entry.alive():
            return False
        time.sleep(_LOOK_AGAIN_S)
        return True

    return wait


def _writer(args: argparse.Namespace) -> Callable[[int, int, bytes], None]:
    if args.json:
        return _write_json
    if args.timestamps:
        return _Stamps().write
    return lambda _, stream, data: _write(stream, data)


def _write(stream: int, data: bytes) -> None:
    """Write all of `data` to our own descriptor of the same number."""
    rest = memoryview(data)
    while rest:
        rest = rest[os.write(stream, rest) :]


def _write_json(time_ns: int, stream: int, data: bytes) -> None:
    import json

    piece: dict[str, str] = {"time": utc(time_ns), "stream": _NAMES[stream]}
    try:
        piece["text"] = data.decode()
    except UnicodeDecodeError:
        import base64

        piece["base64"] = base64.b64encode(data).decode()
    _write(protocol.STDOUT, json.dumps(piece).encode() + b"\n")


class _Stamps:
    """Puts the time before each line; a line may come in several pieces."""

    def __init__(self) -> None:
        self.inside: set[int] = set()

    def write(self, time_ns: int, stream: int, data: bytes) -> None:
        stamp = utc(time_ns).encode() + b" "
        for line in _lines(data):
            _write(stream, line if stream in self.inside else stamp + line)
            self.inside.discard(stream)
            if not line.endswith(b"\n"):
                self.inside.add(stream)


def _lines(data: bytes) -> list[bytes]:
    """Split after newlines alone: bytes.splitlines would split after carriage returns as well."""
    *lines, last = data.split(b"\n")
    return [*(line + b"\n" for line in lines), *([last] if last else [])]


def _explain(entry: Entry) -> None:
    """Say on stderr what the reader of the log cannot see from it."""
    end = end_of(entry.log_path())
    if end is not None and end.truncated:
        print(
            f"ringfence: the log is not complete: output limit reached, {end.dropped_bytes} bytes dropped"
            " (limits.output)",
            file=sys.stderr,
        )
    elif end is None and not entry.alive():
        reason = entry.ended().get("reason")
        more = f" ({one_line(str(reason))})" if reason else ""
        print(f"ringfence: the log has no end: the sandbox was killed{more}", file=sys.stderr)
