"""``ringfence image import | bootstrap | export``."""

import os

from ringfence.cli.tell import print_json, say
from ringfence.errors import ImageError, UsageError
from ringfence.image import store
from ringfence.image.reference import canonical, parse
from ringfence.linux.paths import image_states, state_dir

TYPE_CHECKING = False
if TYPE_CHECKING:
    import argparse

    from ringfence.image.record import ImageRecord

_INTERRUPTED = 130
_TOOLS = ("oci", "oci-archive", "docker-archive", "containers-storage")


def _interruptible() -> None:
    """Let a polite kill clean up as Ctrl-C does; what kill -9 leaves, `prune` removes."""
    import signal

    signal.signal(signal.SIGTERM, signal.default_int_handler)


def import_(args: "argparse.Namespace") -> int:
    """Make an image of what the user has."""
    _interruptible()
    name = _name(args.name) if args.name else ""
    try:
        record, name = _imported(args.source, name, args.platform)
    except KeyboardInterrupt:
        say("interrupted: nothing was imported")
        return _INTERRUPTED
    _report(name, record, as_json=args.json)
    return 0


def _imported(source: str, name: str, platform: str) -> "tuple[ImageRecord, str]":
    from ringfence.image.importing import import_directory, import_tar

    state = state_dir()
    path = source.removeprefix("dir:")
    if path == "-" or os.path.exists(path):
        if not name:
            raise UsageError(
                f"import {source} needs a name for the image", hint="ringfence image import SOURCE NAME"
            )
        if not os.path.isdir(path):
            return import_tar(state, path, name, platform=platform, say=say), name
        if os.path.exists(os.path.join(path, "oci-layout")):
            raise UsageError(f"{path} is an OCI layout, no root file system", hint=f"write oci:{path}")
        return import_directory(state, path, name, platform=platform, say=say), name
    if source.partition(":")[0] not in _TOOLS:
        raise ImageError(
            f"cannot import {source!r}: there is no such file or directory",
            hint="an image in a registry is fetched with: ringfence image pull",
        )
    from ringfence.image.importing import import_image

    return import_image(state, source, name, platform=platform, say=say)


def _name(text: str) -> str:
    reference = parse(text)
    if reference.transport != "docker" or reference.digest:
        raise UsageError(f"{text!r} is no name for an image here", hint="write NAME or NAME:TAG")
    return canonical(reference)


def bootstrap_(args: "argparse.Namespace") -> int:
    """Build an image from Debian packages."""
    from ringfence.image.bootstrap import bootstrap

    own, name = state_dir(), _name(args.name or args.what)
    include = tuple(word for words in args.include for word in words.split(",") if word)
    for state in image_states(own)[1:]:
        if args.what == "base" and not (args.force or include) and store.resolve(state, name):
            say(f"{name}: using root's, {state} has it")
            return 0
    _interruptible()
    try:
        record, fresh = bootstrap(
            own, args.what, name=name, suite=args.suite, include=include, force=args.force, say=say
        )
    except KeyboardInterrupt:
        say("interrupted: nothing was built")
        return _INTERRUPTED
    say(f"{name}: {'built' if fresh else 'already there'}: {record.digest}")
    if args.json:
        print_json(record)
    return 0


def _report(name: str, record: "ImageRecord", *, as_json: bool) -> None:
    if as_json:
        print_json(record)
    else:
        print(record.digest)
        say(f"{name}: {record.platform}, layers: {len(record.layers)}, {record.size_bytes / 1e6:.1f} MB")


def export_(args: "argparse.Namespace") -> int:
    """Write an image for other tools."""
    from ringfence.cli.image_store import find
    from ringfence.image.exporting import export_archive, export_directory

    if args.target.partition(":")[0] not in ("oci", "oci-archive"):
        raise UsageError(
            f"cannot export to {args.target!r}", hint="write oci:DIR[:TAG] or oci-archive:FILE[:TAG]"
        )
    target = parse(args.target)
    state, name, record = find(args.name)
    tag = target.tag or name.rpartition(":")[2] or "latest"
    export = export_directory if target.transport == "oci" else export_archive
    export(state, record, target.path, tag)
    written = f"{target.transport}:{target.path}:{tag}"
    if args.json:
        print_json({"name": name, "digest": record.digest, "target": written})
    else:
        print(written)
    return 0
