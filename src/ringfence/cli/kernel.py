"""``ringfence kernel``: the kernels that virtual machines boot."""

import os
import sys
import time

TYPE_CHECKING = False
if TYPE_CHECKING:
    import argparse
    from collections.abc import Callable

    from ringfence.runtime.microvm.kernels.store import Kernel

_INTERRUPTED = 130
_PERIOD_S = 0.2
EXAMPLE = """examples:
  ringfence kernel fetch              # Debian's kernel for clouds: within a minute
  ringfence kernel build              # a small hardened one: boots in half the time; compiles for some minutes
  ringfence kernel use ./vmlinux      # one of your own
  ringfence kernel ls
"""


def main(argv: list[str]) -> int:
    """Run ``ringfence kernel ARGS`` and return its exit status; raises RingfenceError."""
    import signal

    args = _parser().parse_args(argv)
    # A polite kill cleans up as Ctrl-C does; what kill -9 leaves, the next build or fetch removes.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    teller = Teller(quiet=getattr(args, "quiet", False))
    try:
        verb: Callable[[argparse.Namespace, Teller], int] = _VERBS[args.command]
        return verb(args, teller)
    except KeyboardInterrupt:
        teller.say("interrupted: no kernel was added")
        return _INTERRUPTED
    finally:
        teller.close()


def _parser() -> "argparse.ArgumentParser":
    import argparse

    from ringfence.cli.parser import Parser

    parser = Parser(
        prog="ringfence kernel",
        description="Build, fetch, list and choose the kernels that virtual machines boot.",
        epilog=EXAMPLE,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    commands: argparse._SubParsersAction[argparse.ArgumentParser] = parser.add_subparsers(  # type: ignore[assignment]
        dest="command", required=True, metavar="COMMAND"
    )
    build = commands.add_parser("build", help="compile a small hardened kernel from Debian's kernel source")
    build.add_argument(
        "-j", "--jobs", type=int, default=0, metavar="N", help="compilers at once; default: CPUs"
    )
    build.add_argument("--config", default="", metavar="FILE", help="more options, CONFIG_NAME=value lines")
    build.add_argument(
        "--source", default="", metavar="TAR", help="another source; default: Debian's linux-source"
    )
    fetch = commands.add_parser("fetch", help="make a kernel of Debian's package for clouds")
    use = commands.add_parser("use", help="choose the default kernel, or bring one of your own")
    use.add_argument(
        "kernel", metavar="NAME|FILE", help="name or its beginning; or the path, with a /, of a vmlinux"
    )
    use.add_argument(
        "--cmdline", default="", metavar="WORDS", help="for a FILE: what it needs on its command line"
    )
    ls = commands.add_parser("ls", help="list the kernels; * marks the default")
    rm = commands.add_parser("rm", help="remove kernels; machines that run go on")
    rm.add_argument("kernels", nargs="+", metavar="NAME", help="name or its beginning")
    for verb in (build, fetch, use, ls, rm):
        verb.add_argument("--json", action="store_true", help="print JSON")
    for verb in (build, fetch, use):
        verb.add_argument("-q", "--quiet", action="store_true", help="say nothing unless it fails")
    return parser


class Teller:
    """Tells a person what goes on, on standard error: lines, and on a terminal one below them that changes."""

    def __init__(self, *, quiet: bool) -> None:
        """With `quiet` nothing is told."""
        self._quiet = quiet
        self._draws = not quiet and sys.stderr.isatty() and os.environ.get("TERM") != "dumb"
        self._drawn = False
        self._next_s = 0.0

    def say(self, step: str) -> None:
        """Tell one step."""
        from ringfence.errors import one_line

        self.close()
        if not self._quiet:
            print(f"kernel: {one_line(step)}", file=sys.stderr, flush=True)

    def progress(self, done: int, elapsed_s: float) -> None:
        """Draw how many files are done, not too often."""
        now = time.monotonic()
        if not self._draws or now < self._next_s:
            return
        self._next_s = now + _PERIOD_S
        minutes, seconds = divmod(int(elapsed_s), 60)
        print(f"\r{done} steps, {minutes}:{seconds:02}\x1b[K", end="", file=sys.stderr, flush=True)
        self._drawn = True

    def close(self) -> None:
        """Wipe what was drawn."""
        if self._drawn:
            print("\r\x1b[K", end="", file=sys.stderr, flush=True)
        self._drawn = False


def _build(args: "argparse.Namespace", teller: Teller) -> int:
    from ringfence.errors import UsageError
    from ringfence.linux.paths import state_dir
    from ringfence.runtime.microvm.kernels.build import build

    if args.jobs < 0:
        raise UsageError(f"--jobs {args.jobs}: not a number of compilers")
    kernel, fresh = build(
        state_dir(),
        say=teller.say,
        progress=teller.progress,
        jobs=args.jobs,
        config=args.config,
        source=args.source,
    )
    return _report(kernel, "built" if fresh else "already built", args, teller)


def _fetch(args: "argparse.Namespace", teller: Teller) -> int:
    from ringfence.linux.paths import state_dir
    from ringfence.runtime.microvm.kernels.fetch import fetch

    kernel, fresh = fetch(state_dir(), say=teller.say)
    return _report(kernel, "ready" if fresh else "already there", args, teller)


def _use(args: "argparse.Namespace", teller: Teller) -> int:
    from ringfence.errors import UsageError
    from ringfence.linux.paths import state_dir
    from ringfence.runtime.microvm.kernel import find_kernel
    from ringfence.runtime.microvm.kernels import own, store

    state = state_dir()
    if "/" in args.kernel:
        kernel, lacks = own.bring(state, args.kernel, cmdline=args.cmdline)
        if lacks:
            teller.say(f"{args.kernel} seems to lack {', '.join(lacks)}: then no job can start with it")
    elif args.cmdline:
        raise UsageError("--cmdline is for a FILE: a kernel that is here does not change")
    else:
        kernel = find_kernel(state, args.kernel)
    store.set_default(kernel.state, kernel.name)
    return _report(kernel, "ready", args, teller)


def _report(kernel: "Kernel", how: str, args: "argparse.Namespace", teller: Teller) -> int:
    from ringfence.runtime.microvm.kernel import default

    chosen = default(kernel.state)
    if args.json:
        from ringfence.cli.tell import print_json

        print_json(_facts(kernel, chosen))
        return 0
    print(kernel.name)
    more = "the default" if chosen == kernel.name else f"the default is {chosen}"
    teller.say(f"{how}: Linux {kernel.release}, {kernel.record.size_bytes / 1e6:.1f} MB; {more}")
    if chosen != kernel.name:
        teller.say(f"choose it with: ringfence kernel use {kernel.name}")
    return 0


def _facts(kernel: "Kernel", chosen: str) -> dict[str, object]:
    import msgspec

    return {
        "name": kernel.name,
        "default": kernel.name == chosen,
        **msgspec.to_builtins(kernel.record),
        "path": kernel.path,
        "state": kernel.state,
    }


def _ls(args: "argparse.Namespace", _teller: Teller) -> int:
    from ringfence.linux.paths import image_states, state_dir
    from ringfence.runtime.microvm.kernel import default
    from ringfence.runtime.microvm.kernels.store import kernels

    states = image_states(state_dir())
    found = [(kernel, default(state)) for state in states for kernel in kernels(state)]
    if args.json:
        from ringfence.cli.tell import print_json

        print_json([_facts(kernel, chosen) for kernel, chosen in found])
        return 0
    table = [("", "NAME", "KIND", "SIZE", "MODULES", "MADE", "SOURCE")]
    table += [_line(kernel, chosen) for kernel, chosen in found]
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    for line in table:
        print(" ".join(word.ljust(width + 1) for word, width in zip(line, widths, strict=True)).rstrip())
    return 0


def _line(kernel: "Kernel", chosen: str) -> tuple[str, str, str, str, str, str, str]:
    from ringfence.errors import one_line

    record = kernel.record
    return (
        "*" if kernel.name == chosen else "",
        one_line(kernel.name),
        one_line(record.kind),
        f"{record.size_bytes / 1e6:.1f}MB",
        str(len(record.modules)),
        one_line(record.made_at)[:10],
        one_line(record.source)[:80],
    )


def _rm(args: "argparse.Namespace", teller: Teller) -> int:
    from ringfence.cli.tell import complain, print_json
    from ringfence.errors import HostError
    from ringfence.linux.paths import state_dir
    from ringfence.runtime.microvm.kernel import match
    from ringfence.runtime.microvm.kernels.store import remove

    state, status, removed = state_dir(), 0, []
    for text in args.kernels:
        try:
            name = match(state, text)
            if not name:
                raise HostError(f"no kernel {text!r}", hint="'ringfence kernel ls' lists them")
            next_one = remove(state, name)
        except HostError as error:
            status = complain(error)
            continue
        removed.append(name)
        if not args.json:
            print(name)
        if next_one:
            teller.say(f"the default is {next_one} now")
    if args.json:
        print_json(removed)
    return status


_VERBS = {"build": _build, "fetch": _fetch, "ls": _ls, "use": _use, "rm": _rm}
