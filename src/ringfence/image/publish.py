"""From blobs in the store to an image that can be run: everything checked, layers unpacked, then named."""

import hashlib
import os

import msgspec

from ringfence.errors import ImageError
from ringfence.image import store
from ringfence.image.layers import share, unpack
from ringfence.image.manifest import (
    MAX_BYTES,
    Configuration,
    Manifest,
    find_manifest,
    host_platform,
    parse_platform,
    read_configuration,
)
from ringfence.image.record import ImageRecord, Layer

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

_CHUNK = 1 << 20
AGAIN = "pull or import it again"


class BrokenBlob(ImageError):
    """A blob is missing or not what its name says; a broken one is removed, so another pull brings it anew."""


def publish(
    state: str,
    name: str,
    manifest_digest: str,
    *,
    source: str,
    platform: str = "",
    shared: bool = False,
    say: "Callable[[str], None]" = lambda _: None,
) -> ImageRecord:
    """Make the image whose blobs lie in the store runnable under the canonical `name` ("": without one).

    Every blob is hashed before it is believed, and every layer is unpacked once. With `shared`, which takes root, all
    users of this host can read its layers; refused where one of them could change any of it. The caller is inside
    `store.working`, so nothing is removed meanwhile. Raises BrokenBlob, ImageError; then the store is as before.
    """
    wanted = parse_platform(platform) if platform else host_platform()
    manifest = find_manifest(lambda digest: read_blob(state, digest), manifest_digest, wanted)
    config = read_configuration(read_blob(state, manifest.config.digest), manifest)
    if config.platform.architecture != wanted.architecture:
        raise ImageError(
            f"the image {name or manifest.digest} is for {config.platform}, not for {wanted}",
            hint=f"--platform {config.platform} takes it all the same",
        )
    record = _record(manifest, config, source)
    verified = _verified_blobs(state)
    for position, layer in enumerate(record.layers, 1):
        if not os.path.isdir(store.layer_path(state, layer.diff_id)):
            say(f"unpacking layer {position} of {len(record.layers)}")
        _unpack(state, layer, verified=layer.digest in verified)
    try:
        with store.locked(state):
            if shared:
                for layer in record.layers:
                    share(state, layer.diff_id)
            path = store.record_path(state, record.digest)
            # Not replaced while it is sound: sandboxes hold their locks on the file that is there.
            if not _is_sound(state, record.digest):
                store.write_file(path, msgspec.json.format(msgspec.json.encode(record)) + b"\n", 0o644)
            if name:
                store.set_name(state, name, record.digest)
    except OSError as error:
        raise store.cannot("write to", store.images_dir(state), error) from error
    return store.read_record(state, record.digest)


def _verified_blobs(state: str) -> set[str]:
    """Return the digests of blobs that were hashed when an image of the store was published."""
    try:
        return {digest for known in store.records(state) for digest in known.blobs()}
    except (
        ImageError
    ):  # a damaged record; whoever lists images hears of it, and here hashing once more does no harm
        return set()


def _is_sound(state: str, digest: str) -> bool:
    try:
        store.read_record(state, digest)
    except ImageError:
        return False
    return True


def _record(manifest: Manifest, config: Configuration, source: str) -> ImageRecord:
    pairs = zip(manifest.layers, config.diff_ids, strict=True)
    return ImageRecord(
        digest=manifest.digest,
        manifest_media_type=manifest.media_type,
        manifest_size_bytes=manifest.size_bytes,
        config_digest=manifest.config.digest,
        layers=tuple(Layer(layer.digest, diff_id, layer.size, layer.media_type) for layer, diff_id in pairs),
        platform=config.platform,
        config=config.run,
        created=config.created,
        source=source,
        pulled_at=store.now(),
        history=config.history,
    )


def _unpack(state: str, layer: Layer, *, verified: bool) -> None:
    path = store.blob_path(state, layer.digest)
    try:
        size = os.stat(path).st_size
    except FileNotFoundError as error:
        raise BrokenBlob(f"the layer {layer.digest} is not here", hint=AGAIN) from error
    if size != layer.size_bytes:
        os.unlink(path)
        raise BrokenBlob(
            f"the layer {layer.digest} has {size} bytes instead of {layer.size_bytes}", hint=AGAIN
        )
    if os.path.isdir(store.layer_path(state, layer.diff_id)):
        if not verified and not check_blob(state, layer.digest):
            os.unlink(path)
            raise BrokenBlob(f"the layer {layer.digest} is not what its name says", hint=AGAIN)
        return
    unpack(state, path, media_type=layer.media_type, digest=layer.digest, diff_id=layer.diff_id)


def read_blob(state: str, digest: str, most_bytes: int = MAX_BYTES) -> bytes:
    """Return the bytes of a small blob, hashed. Raises BrokenBlob, and ImageError when it is too large."""
    path = store.blob_path(state, digest)
    try:
        with open(path, "rb") as file:
            data = file.read(most_bytes + 1)
    except FileNotFoundError as error:
        raise BrokenBlob(f"the blob {digest} is not here", hint=AGAIN) from error
    except OSError as error:
        raise store.cannot("read", path, error) from error
    if len(data) > most_bytes:
        raise ImageError(f"the blob {digest} is larger than the {most_bytes >> 20} MiB of a description")
    if f"sha256:{hashlib.sha256(data).hexdigest()}" != digest:
        os.unlink(path)
        raise BrokenBlob(f"the blob {digest} is not what its name says", hint=AGAIN)
    return data


def check_blob(state: str, digest: str) -> bool:
    """Say whether the blob of this name has this digest; raises OSError when it cannot be read."""
    found = hashlib.sha256()
    with open(store.blob_path(state, digest), "rb") as file:
        while chunk := file.read(_CHUNK):
            found.update(chunk)
    return f"sha256:{found.hexdigest()}" == digest


def add_blob(state: str, data: bytes) -> str:
    """Put a small blob into the store and return its digest; raises OSError."""
    digest = f"sha256:{hashlib.sha256(data).hexdigest()}"
    store.write_file(store.blob_path(state, digest), data, 0o644)
    return digest
