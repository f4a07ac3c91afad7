"""``ringfence image pull``: bring an image here from a registry, or from another tool's files."""

import os
import sys
import time

TYPE_CHECKING = False
if TYPE_CHECKING:
    import argparse
    from collections.abc import Callable

    from ringfence.image.record import ImageRecord
    from ringfence.policy.model import ImageRules

_INTERRUPTED = 130
_BAR = 24
_PERIOD_S = 0.2


def add_parser(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Add the verb to ``ringfence image``."""
    verb = commands.add_parser("pull", help="bring an image here, or what has changed of it")
    verb.add_argument(
        "reference",
        metavar="REF",
        help="alpine, registry.example.com/team/app:1.2, NAME@sha256:..., oci:DIR[:TAG], oci-archive:FILE[:TAG], "
        "docker-archive:FILE[:NAME], containers-storage:NAME",
    )
    verb.add_argument("--platform", default="", metavar="OS/ARCH[/VARIANT]", help="default: this host's")
    verb.add_argument(
        "--policy",
        metavar="POLICY",
        help="refuse what its rules for images refuse, and check signatures by them",
    )
    verb.add_argument("--json", action="store_true", help="print the image's record")
    verb.add_argument("-q", "--quiet", action="store_true", help="say nothing unless it fails")


def pull(args: "argparse.Namespace") -> int:
    """Pull, and print the digest or the record. Raises ImageError, PolicyError."""
    import signal

    from ringfence.image.pull import pull as really
    from ringfence.image.reference import canonical, parse
    from ringfence.image.rules import NoRules
    from ringfence.linux.paths import state_dir

    reference = parse(args.reference)
    rules = _rules(args.policy) if args.policy else NoRules()
    # A polite kill cleans up as Ctrl-C does; what kill -9 leaves, the next pull removes.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    teller = Teller(quiet=args.quiet)
    try:
        record = really(
            state_dir(),
            reference,
            rules_of=rules,
            platform=args.platform,
            say=teller.say,
            progress=teller.progress,
        )
    except KeyboardInterrupt:
        teller.say("interrupted: what has come whole stays, and need not be fetched again")
        return _INTERRUPTED
    finally:
        teller.close()
    _report(canonical(reference), record, as_json=args.json, say=teller.say)
    return 0


def _rules(policy: str) -> "ImageRules":
    from ringfence.policy.load import load

    return load(policy).image


def _report(name: str, record: "ImageRecord", *, as_json: bool, say: "Callable[[str], None]") -> None:
    if as_json:
        from ringfence.cli.tell import print_json

        print_json(record)
        return
    print(record.digest)
    layers = len(record.layers)
    say(
        f"{name}: {record.platform}, {layers} layer{'s' if layers != 1 else ''}, {record.size_bytes / 1e6:.1f} MB"
    )


class Teller:
    """Tells a person what goes on, on standard error: lines, and a bar below them on a terminal."""

    def __init__(self, *, quiet: bool) -> None:
        """With `quiet` nothing is told."""
        self._quiet = quiet
        self._bar = not quiet and sys.stderr.isatty() and os.environ.get("TERM") != "dumb"
        self._drawn = False
        self._next_s = 0.0

    def say(self, step: str) -> None:
        """Tell one step."""
        from ringfence.cli.tell import say

        self.close()
        if not self._quiet:
            say(step)

    def progress(self, done_bytes: int, all_bytes: int) -> None:
        """Draw the bar, not too often; `all_bytes` of 0 is not known."""
        now = time.monotonic()
        if not self._bar or now < self._next_s or not (done_bytes or all_bytes):
            return
        self._next_s = now + _PERIOD_S
        if all_bytes:
            full = _BAR * done_bytes // all_bytes
            text = f"[{'#' * full}{' ' * (_BAR - full)}] {done_bytes / 1e6:.1f} of {all_bytes / 1e6:.1f} MB"
        else:
            text = f"{done_bytes / 1e6:.1f} MB"
        print(f"\r{text}\x1b[K", end="", file=sys.stderr, flush=True)
        self._drawn = True

    def close(self) -> None:
        """Wipe the bar."""
        if self._drawn:
            print("\r\x1b[K", end="", file=sys.stderr, flush=True)
        self._drawn = False
