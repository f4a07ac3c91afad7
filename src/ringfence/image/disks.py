"""Read-only disk images for virtual machines: the layers of an image as one erofs file, built once.

The file depends on nothing but the layers: owners, modes, times and attributes are theirs, the UUID comes from their
digests, and mkfs.erofs sorts what it reads. So the same layers give the same bytes, here and on another host.
"""

import hashlib
import os
import shutil
import subprocess
import sys
import uuid

from ringfence.errors import ImageError
from ringfence.image import store
from ringfence.image.trees import remove_tree

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

    from ringfence.image.record import ImageRecord

# A new number makes new files: raise it when what mkfs.erofs is asked for changes.
_RECIPE = "erofs-1"
_TIMEOUT_S = 1800
# mkfs.erofs takes this as the time of the build, which it writes into the file, and as the latest that a file may
# have; it is the last second that its short form of a time can hold.
_SOURCE_DATE_EPOCH = str((1 << 32) - 1)


def disk_path(state: str, record: "ImageRecord") -> str:
    """Return where the disk image of `record` is or will be; images of the same layers share it."""
    return store.images_dir(state, "disks", f"{_key(record).hexdigest()}.erofs")


def _key(record: "ImageRecord") -> "hashlib._Hash":
    return hashlib.sha256("\n".join((_RECIPE, *(layer.diff_id for layer in record.layers))).encode())


def disk(state: str, digest: str, *, say: "Callable[[str], None]" = lambda _: None) -> str:
    """Return the path of the read-only erofs image of the image `digest`, made now if it is not there.

    Raises ImageError when mkfs.erofs is missing or fails, or the image is not in the store.
    """
    record = store.read_record(state, digest)
    path = disk_path(state, record)
    if os.path.exists(path):
        return path
    for program in ("mkfs.erofs", "unshare"):
        if shutil.which(program) is None:
            raise ImageError(f"{program} is not installed", hint="apt-get install erofs-utils util-linux")
    with (
        store.working(state),
        store.named(state, os.path.basename(path), lambda: say("waiting for another build")),
    ):
        if not os.path.exists(path):
            say(f"building a disk image of {len(record.layers)} layers")
            _build(state, record, path)
    return path


def _build(state: str, record: "ImageRecord", path: str) -> None:
    place = store.images_dir(state, "disks", f".new-{os.getpid()}-{os.urandom(4).hex()}")
    made = os.path.join(place, "disk.erofs")
    layers = [os.path.join(store.layer_path(state, layer.diff_id), "fs") for layer in record.layers]
    try:
        os.mkdir(place, 0o700)
        _run(place, made, layers, str(uuid.UUID(bytes=_key(record).digest()[:16])))
        descriptor = os.open(made, os.O_RDONLY | os.O_CLOEXEC)
        try:
            os.fchmod(descriptor, 0o400)
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
        os.rename(made, path)
    except OSError as error:
        raise store.cannot("write", path, error) from error
    finally:
        remove_tree(place)


def _run(place: str, made: str, layers: list[str], identity: str) -> None:
    """Pack what the layers show when they are mounted over each other, in a namespace that ends with the command."""
    mapped = [] if os.geteuid() == 0 else ["--map-root-user"]
    command = ["unshare", *mapped, "--mount", "--propagation=private", "--fork", "--kill-child=KILL"]
    command += [sys.executable, "-P", "-m", "ringfence.image.stack", place, *layers, "--"]
    command += ["mkfs.erofs", "--quiet", "-U", identity, made, os.path.join(place, "root")]
    environment = {
        "LC_ALL": "C.UTF-8",
        "PATH": "/usr/sbin:/usr/bin:/sbin:/bin",
        "PYTHONPATH": os.path.dirname(os.path.dirname(os.path.dirname(__file__))),
        "SOURCE_DATE_EPOCH": _SOURCE_DATE_EPOCH,
        **({} if os.geteuid() == 0 else {"OVERLAY_USER": "1"}),
    }
    said = subprocess.run(
        command,
        env=environment,
        cwd="/",
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        timeout=_TIMEOUT_S,
        check=False,
    )
    if said.returncode != 0:
        words = said.stderr.decode("utf-8", "replace").strip().splitlines() or ["it said nothing"]
        raise ImageError(f"mkfs.erofs failed: {words[-1][:300]}", hint="is there room on the disk?")
