"""``ringfence image ls | inspect | history | rm | prune | verify``."""

import re

from ringfence.cli.tell import print_json, say
from ringfence.errors import ImageError, one_line
from ringfence.image import store
from ringfence.image.reference import canonical, parse
from ringfence.linux.paths import image_states, state_dir

TYPE_CHECKING = False
if TYPE_CHECKING:
    import argparse

    from ringfence.image.record import ImageRecord

_SHORT = 12  # digits of a digest in a table
_PROBLEMS = 1


def find(text: str) -> "tuple[str, str, ImageRecord]":
    """Return state directory, name ("" when asked for by digest) and record of an image; raises ImageError."""
    own = state_dir()
    for state in image_states(own):
        name, digest = _resolve(state, text)
        if digest is not None:
            return state, name, store.read_record(state, digest)
    raise ImageError(f"no image {text!r}", hint="'ringfence image ls' lists them")


def _resolve(state: str, text: str) -> tuple[str, str | None]:
    """Return the canonical name that `text` means and its digest; by the beginning of a digest there is no name."""
    if re.fullmatch(r"(sha256:)?[0-9a-f]{6,64}", text):
        digits = text.removeprefix("sha256:")
        found = [one for one in _digests(state) if one.removeprefix("sha256:").startswith(digits)]
        if len(found) == 1:
            return "", found[0]
        if len(found) > 1:
            raise ImageError(f"{text!r} is the beginning of {len(found)} digests", hint="give more of it")
    name = canonical(parse(text))
    return name, store.resolve(state, name)


def _digests(state: str) -> list[str]:
    names = (
        entry.removesuffix(".json").replace("sha256-", "sha256:", 1)
        for entry in store.entries(state, "images")
    )
    return [name for name in names if store.is_digest(name)]


def ls_(args: "argparse.Namespace") -> int:
    """List what can be run; the image "host" is always there."""
    from ringfence.image.host import host_digest

    rows: list[dict[str, object]] = [{"name": "host", "digest": host_digest(), "source": "this host"}]
    rows += [row for state in image_states(state_dir()) for row in _rows(state)]
    if args.json:
        print_json(rows)
        return 0
    table = [("NAME", "DIGEST", "PLATFORM", "LAYERS", "SIZE", "CREATED")]
    table += [_line(row) for row in rows]
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    for line in table:
        print("  ".join(word.ljust(width) for word, width in zip(line, widths, strict=True)).rstrip())
    return 0


def _rows(state: str) -> list[dict[str, object]]:
    names: dict[str, list[str]] = {}
    for name, digest in store.names(state).items():
        names.setdefault(digest, []).append(name)
    return [
        {
            "name": name,
            "digest": record.digest,
            "platform": str(record.platform),
            "layers": len(record.layers),
            "size_bytes": record.size_bytes,
            "created": record.created,
            "pulled_at": record.pulled_at,
            "source": record.source,
            "state": state,
        }
        for record in store.records(state)
        for name in names.get(record.digest, [""])
    ]


def _line(row: dict[str, object]) -> tuple[str, str, str, str, str, str]:
    digits = str(row["digest"]).partition(":")[2][:_SHORT]
    size, name = row.get("size_bytes"), one_line(str(row["name"])) or "<none>"
    shown = f"{size / 1e6:.1f}MB" if isinstance(size, int) else "-"
    created = one_line(str(row.get("created", "")))[:10] or "-"
    return name, digits, one_line(str(row.get("platform", "-"))), str(row.get("layers", "-")), shown, created


def inspect_(args: "argparse.Namespace") -> int:
    """Print a record with its names, where its files are, and the Debian packages in it."""
    if args.name == "host":
        print_json(_host())
        return 0
    import msgspec

    from ringfence.image.disks import disk_path
    from ringfence.image.packages import debian_packages

    state, _, record = find(args.name)
    facts = msgspec.to_builtins(record)
    facts["names"] = [name for name, digest in store.names(state).items() if digest == record.digest]
    facts["size_bytes"] = record.size_bytes
    facts["state"] = state
    facts["unpacked"] = [f"{store.layer_path(state, layer.diff_id)}/fs" for layer in record.layers]
    facts["disk"] = disk_path(state, record)
    facts["packages"] = debian_packages(facts["unpacked"])
    print_json(facts)
    return 0


def _host() -> dict[str, object]:
    from ringfence.image.host import host_digest, host_view

    view = host_view()
    return {
        "names": ["host"],
        "digest": host_digest(),
        "binds": view.binds,
        "symlinks": dict(view.symlinks),
        "files": {path: len(content) for path, content in view.files},
    }


def history_(args: "argparse.Namespace") -> int:
    """Show the steps of a build, the last one first, with the layer that each added."""
    _, _, record = find(args.name)
    layers = iter(record.layers)
    steps = [(step, None if step.empty_layer else next(layers, None)) for step in record.history]
    if args.json:
        print_json(
            [
                {
                    "created": step.created,
                    "created_by": step.created_by,
                    "comment": step.comment,
                    "layer": layer.digest if layer else None,
                    "size_bytes": layer.size_bytes if layer else 0,
                }
                for step, layer in reversed(steps)
            ]
        )
        return 0
    print(f"{'CREATED':10}  {'SIZE':>10}  CREATED BY")
    for step, layer in reversed(steps):
        size = f"{layer.size_bytes / 1e6:.1f}MB" if layer else "-"
        print(f"{one_line(step.created)[:10] or '-':10}  {size:>10}  {one_line(step.created_by)[:100]}")
    return 0


def rm_(args: "argparse.Namespace") -> int:
    """Remove names, and images with the last of theirs."""
    from ringfence.image.removal import remove

    state, status, done = state_dir(), 0, []
    for text in args.names:
        try:
            if text == "host":
                raise ImageError("'host' is this host's own files, there is nothing to remove")
            name, digest = _resolve(state, text)
            if digest is None:
                raise ImageError(f"no image {text!r}", hint="'ringfence image ls' lists them")
            removed = remove(state, name or digest, waiting=_waiting)
        except ImageError as error:
            if len(args.names) == 1:
                raise
            say(str(error))
            status = error.exit_status
        else:
            done.append(removed)
            if not args.json:
                print("\n".join(removed.names or removed.images))
                _note(removed.note)
    if args.json:
        print_json(done)
    return status


def prune_(args: "argparse.Namespace") -> int:
    """Remove what no image needs."""
    from ringfence.image.removal import prune

    removed = prune(state_dir(), waiting=_waiting)
    if args.json:
        print_json(removed)
        return 0
    for digest in removed.images:
        print(digest)
    say(
        f"removed {len(removed.images)} images, {removed.layers} layers, {removed.blobs} blobs, {removed.disks} "
        f"disk images, {removed.unfinished} rests of unfinished work: {removed.freed_bytes / 1e6:.1f} MB"
    )
    _note(removed.note)
    return 0


def verify_(args: "argparse.Namespace") -> int:
    """Check blobs and layers; 1 when something is not as it should be."""
    from ringfence.image.verifying import verify

    state = state_dir()
    records = store.records(state)
    if args.names:
        wanted = [find(name) for name in args.names]
        states = {found[0] for found in wanted}
        if len(states) > 1:
            raise ImageError("these images lie in two stores", hint="verify one after the other")
        state, records = states.pop(), [found[2] for found in wanted]
    checked = verify(state, records, say=say)
    if args.json:
        print_json(checked)
    else:
        for problem in checked.problems:
            print(one_line(problem))
        say(
            f"{len(checked.images)} images, {checked.blobs} blobs, {checked.layers} layers: "
            + (f"{len(checked.problems)} problems" if checked.problems else "all as they should be")
        )
    return _PROBLEMS if checked.problems else 0


def _waiting() -> None:
    say("waiting for another image command")


def _note(text: str) -> None:
    if text:
        say(text)
