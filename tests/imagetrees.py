"""Directory trees and stores for the tests of images."""

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from ringfence.errors import ImageError
from ringfence.image import store
from ringfence.image.removal import prune

TIME_NS = 1_600_000_000 * 10**9


@contextmanager
def quick_place() -> Iterator[Path]:
    """A directory in memory, where that can keep attributes: a busy disk takes seconds to sync. Others can pass it."""
    with tempfile.TemporaryDirectory(prefix="ringfence-image-", dir="/dev/shm") as memory:
        try:
            os.setxattr(memory, "user.note", b"kept")
            os.setxattr(memory, "trusted.note", b"kept")
        except OSError:
            with tempfile.TemporaryDirectory(prefix="ringfence-image-") as disk:
                Path(disk).chmod(0o711)
                yield Path(disk)
        else:
            Path(memory).chmod(0o711)
            yield Path(memory)


def make_tree(root: Path, *, files: int = 15) -> Path:
    """Fill `root` with one of everything that a layer can hold, and with real programs' files."""
    for directory in ("etc", "usr/bin", "usr/share/a b", "tmp", "var/empty"):
        (root / directory).mkdir(parents=True)
    (root / "etc/passwd").write_text("root:x:0:0::/root:/bin/sh\n")
    programs = [
        path
        for path in sorted(Path("/usr/bin").iterdir())
        if path.is_file() and path.stat().st_size < 1 << 17
    ]
    for source in programs[:files]:
        shutil.copyfile(source, root / "usr/bin" / source.name)
        (root / "usr/bin" / source.name).chmod(0o755)
    (root / "usr/bin/set-uid").write_bytes(b"#!/bin/sh\n")
    (root / "usr/bin/set-uid").chmod(0o4755)
    os.link(root / "etc/passwd", root / "usr/share/linked")
    (root / "usr/link").symlink_to("/etc/passwd")
    (root / "usr/share/\udcff name\n").write_bytes(b"odd")
    (root / ("n" * 200)).mkdir()
    (root / ("n" * 200) / ("m" * 200)).write_bytes(b"long")
    os.mkfifo(root / "tmp/fifo")
    os.setxattr(root / "etc/passwd", "user.note", b"\xff\0bytes")
    with open(root / "var/holes", "wb") as sparse:
        sparse.truncate(1 << 20)
        sparse.seek(1 << 19)
        sparse.write(b"in the middle")
    if os.geteuid() == 0:
        os.chown(root / "usr/share/a b", 1000, 2000)
        os.chown(root / "usr/link", 33, 33, follow_symlinks=False)
    (root / "tmp").chmod(0o1777)
    (root / "var/empty").chmod(0o555)
    settle(root)
    return root


def settle(root: Path) -> None:
    """Give everything below `root` one time."""
    for directory, names, files in os.walk(root, topdown=False):
        for name in (*files, *names):
            os.utime(os.path.join(directory, name), ns=(TIME_NS, TIME_NS), follow_symlinks=False)
    os.utime(root, ns=(TIME_NS, TIME_NS))


def files_of(state: Path, digest: str) -> list[Path]:
    """The directories of the unpacked layers of an image, the lowest first."""
    record = store.read_record(str(state), digest)
    return [Path(store.layer_path(str(state), layer.diff_id)) / "fs" for layer in record.layers]


def contents(state: Path) -> list[str]:
    """What lies in a store: names, records, layers, blobs, disks and whatever is unfinished, without locks."""
    found = []
    for directory, names, entries in os.walk(state / "images"):
        if Path(directory).name.startswith("sha256-"):
            names.clear()
            continue
        if Path(directory).name != "locks":
            found += [os.path.relpath(os.path.join(directory, entry), state / "images") for entry in entries]
            found += [f"{Path(directory).name}/{name}" for name in names if name.startswith(("sha256-", "."))]
    return sorted(entry for entry in found if entry != "lock")


def empty(state: Path) -> list[str]:
    """Remove all names, prune, and return what is left."""
    for name in store.names(str(state)):
        (state / "images/refs" / store_name(name)).unlink()
    try:
        prune(str(state))
    except ImageError as error:
        return [str(error)]
    return contents(state)


def store_name(name: str) -> str:
    from ringfence.image.reference import encode

    return encode(name)
