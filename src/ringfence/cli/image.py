"""``ringfence image``: build, list, describe and remove images."""

import sys

TYPE_CHECKING = False
if TYPE_CHECKING:
    import argparse

    from ringfence.image.store import Manifest

EXAMPLE = """examples:
  ringfence image bootstrap base
  ringfence image ls
"""


def main(argv: list[str]) -> int:
    """Run ``ringfence image ARGS`` and return its exit status; raises RingfenceError."""
    args = _parser().parse_args(argv)
    commands = {"ls": _ls, "inspect": _inspect, "bootstrap": _bootstrap, "rm": _rm}
    return commands[args.command](args)


def _parser() -> "argparse.ArgumentParser":
    import argparse

    parser = argparse.ArgumentParser(
        prog="ringfence image",
        description="Build and list the images that Ringfence can run.",
        epilog=EXAMPLE,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    ls = commands.add_parser("ls", help="list the images")
    ls.add_argument("--json", action="store_true", help="print JSON")
    inspect = commands.add_parser("inspect", help="print everything known about an image, as JSON")
    inspect.add_argument("name")
    bootstrap = commands.add_parser(
        "bootstrap", help="build an image from Debian packages, unless it is there"
    )
    bootstrap.add_argument("name", choices=["base"])
    bootstrap.add_argument(
        "--suite", choices=["auto", "bookworm", "trixie"], default="auto", help="default: this host's"
    )
    bootstrap.add_argument("--force", action="store_true", help="build it anew")
    rm = commands.add_parser("rm", help="remove a built image")
    rm.add_argument("name")
    return parser


def _ls(args: "argparse.Namespace") -> int:
    rows = [_host_facts(), _base_facts()]
    if args.json:
        _print_json(rows)
        return 0
    print(f"{'NAME':6} {'STATE':10} {'SUITE':10} {'SIZE':>8}  {'DIGEST':21} CREATED")
    for row in rows:
        name, state, suite, digest, created = (
            str(row.get(key, "-")) for key in ("name", "state", "suite", "digest", "created")
        )
        size_bytes = row.get("size_bytes")
        size = f"{size_bytes / 2**20:.0f}MiB" if isinstance(size_bytes, int) else "-"
        print(f"{name:6} {state:10} {suite:10} {size:>8}  {digest[:19]:21} {created}")
    return 0


def _inspect(args: "argparse.Namespace") -> int:
    from ringfence.image.find import find
    from ringfence.linux.paths import state_dir

    image = find(args.name, None, state_dir=state_dir())
    facts: dict[str, object] = {
        "name": image.name,
        "kind": image.kind,
        "digest": image.digest,
        "rootfs": image.rootfs,
        "env": image.env,
        "cwd": image.cwd,
    }
    if image.kind == "host":
        from ringfence.image.host import host_view

        view = host_view()
        facts |= {
            "binds": view.binds,
            "symlinks": dict(view.symlinks),
            "files": {path: len(content) for path, content in view.files},
        }
    else:
        found, _ = _find_base()
        facts["manifest"] = found
    _print_json(facts)
    return 0


def _bootstrap(args: "argparse.Namespace") -> int:
    import signal

    from ringfence.image.bootstrap import bootstrap
    from ringfence.linux.paths import state_dir

    own = state_dir()
    found, state = _find_base()
    if found and state != own and not args.force and args.suite in ("auto", found.suite):
        _say(f"base: using root's, {state} has it")
        return 0
    # A polite kill cleans up as Ctrl-C does; what kill -9 leaves, the next bootstrap removes.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        made, fresh = bootstrap(own, suite=args.suite, force=args.force, say=_say)
    except KeyboardInterrupt:
        _say("interrupted: nothing was built")
        return 130
    _say(f"base: {'built' if fresh else 'already there'}: Debian {made.suite}, {made.digest}")
    return 0


def _rm(args: "argparse.Namespace") -> int:
    from ringfence.errors import ImageError
    from ringfence.image import store
    from ringfence.linux.paths import state_dir

    if args.name == "host":
        raise ImageError("'host' is this host's own files, there is nothing to remove")
    state = state_dir()
    with store.locked(state, lambda: _say("waiting for another image command")):
        if args.name not in store.NAMES or not store.remove(state, args.name):
            raise ImageError(f"no built image {args.name!r}", hint="'ringfence image ls' lists them")
    print(args.name)
    return 0


def _host_facts() -> dict[str, object]:
    from ringfence.image.host import host_digest

    return {"name": "host", "state": "ready", "digest": host_digest()}


def _base_facts() -> dict[str, object]:
    found, _ = _find_base()
    if found is None:
        return {"name": "base", "state": "not built"}
    return {
        "name": "base",
        "state": "ready",
        "suite": found.suite,
        "size_bytes": found.size_bytes,
        "digest": found.digest,
        "created": found.created,
    }


def _find_base() -> "tuple[Manifest | None, str]":
    """Return the manifest of the base that a run would take and the state directory that holds it."""
    from ringfence.image import store
    from ringfence.linux.paths import image_states, state_dir

    for state in image_states(state_dir()):
        found = store.manifest(state, "base")
        if found is not None:
            return found, state
    return None, ""


def _print_json(value: object) -> None:
    import msgspec

    print(msgspec.json.format(msgspec.json.encode(value)).decode())


def _say(step: str) -> None:
    print(f"image: {step}", file=sys.stderr, flush=True)
