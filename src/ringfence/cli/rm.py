"""``ringfence rm``: remove ended sandboxes and their logs."""

from __future__ import annotations

from ringfence.cli.tell import complain
from ringfence.errors import RingfenceError, SandboxError, UsageError
from ringfence.sandbox import reap, store

TYPE_CHECKING = False
if TYPE_CHECKING:
    import argparse

    from ringfence.sandbox.store import Entry

_HELP = """examples:
  ringfence rm web
  ringfence rm --force web     # also if it runs
  ringfence rm --all           # all that have ended

Remove sandboxes that have ended, with their logs and proofs.
"""


def main(argv: list[str]) -> int:
    """Run the verb; see the module's docstring."""
    args = _parser().parse_args(argv)
    if args.all == bool(args.names):
        raise UsageError("rm takes names, or --all", hint="'ringfence ps --all' lists them")
    reap.sweep()
    if args.all:
        chosen = [(entry.id, entry) for entry in store.entries() if args.force or not entry.alive()]
        return _remove(chosen, force=args.force)
    status, chosen = 0, []
    for name in args.names:
        try:
            chosen.append((name, store.find(name)))
        except UsageError as error:
            status = complain(error)
    return max(status, _remove(chosen, force=args.force))


def _remove(chosen: list[tuple[str, Entry]], *, force: bool) -> int:
    status = 0
    for name, entry in chosen:
        try:
            if entry.alive():
                _end(name, entry, force=force)
            _discard(entry)
        except RingfenceError as error:
            status = max(status, complain(error))
        else:
            print(name)
    return status


def _discard(entry: Entry) -> None:
    entry.try_lock()  # what is settled has no lock
    try:
        reap.discard(entry)
    finally:
        entry.unlock()


def _end(name: str, entry: Entry, *, force: bool) -> None:
    if not force:
        raise SandboxError(f"{name} is running", hint=f"ringfence stop {name}, or rm --force")
    from ringfence.sandbox.attach import stop

    for problem in stop([entry], grace_s=0):
        if problem is not None:
            raise problem


def _parser() -> argparse.ArgumentParser:
    import argparse

    from ringfence.cli.parser import Parser

    parser = Parser(
        prog="ringfence rm",
        description=_HELP,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("names", nargs="*", metavar="NAME", help="name, id, or beginning of an id")
    parser.add_argument("-f", "--force", action="store_true", help="kill those that are running first")
    parser.add_argument("-a", "--all", action="store_true", help="all that have ended (with --force, all)")
    return parser
