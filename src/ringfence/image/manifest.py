"""Strict readers of what describes an image: OCI index, manifest and configuration, and Docker's equivalents.

Everything in them was written by somebody else. Sizes are bounded, digests and media types are those we know, and a
document that could be read in two ways is refused: CVE-2021-41190.
Source: https://github.com/opencontainers/image-spec (manifest.md, image-index.md, config.md) and, for schema 2,
https://distribution.github.io/distribution/spec/manifest-v2-2/
"""

import platform as machine
import re

import msgspec

from ringfence.errors import ImageError
from ringfence.image.record import HistoryEntry, Platform, RunConfig

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

MAX_BYTES = 4 << 20
OCI_INDEX = "application/vnd.oci.image.index.v1+json"
OCI_MANIFEST = "application/vnd.oci.image.manifest.v1+json"
OCI_CONFIG = "application/vnd.oci.image.config.v1+json"
OCI_LAYER = "application/vnd.oci.image.layer.v1.tar"
_DOCKER = "application/vnd.docker."
_INDEXES = (OCI_INDEX, f"{_DOCKER}distribution.manifest.list.v2+json")
_MANIFESTS = (OCI_MANIFEST, f"{_DOCKER}distribution.manifest.v2+json")
_CONFIGS = (OCI_CONFIG, f"{_DOCKER}container.image.v1+json")
LAYERS = (
    OCI_LAYER,
    f"{OCI_LAYER}+gzip",
    f"{OCI_LAYER}+zstd",
    f"{_DOCKER}image.rootfs.diff.tar",
    f"{_DOCKER}image.rootfs.diff.tar.gzip",
    f"{_DOCKER}image.rootfs.diff.tar.zstd",
)
_MAX_DEPTH = 3  # an index of indexes of manifests
_MAX_LAYERS = 500  # overlayfs takes as many lower directories: OVL_MAX_STACK in fs/overlayfs/params.h
_SIZE_LIMIT = 1 << 50
_DIGEST = re.compile(r"sha256:[0-9a-f]{64}")
# Of Python's names for machines to those of Go, which images use.
_ARCHITECTURES = {
    "x86_64": "amd64",
    "i686": "386",
    "aarch64": "arm64",
    "armv7l": "arm",
    "ppc64le": "ppc64le",
    "s390x": "s390x",
    "riscv64": "riscv64",
    "loongarch64": "loong64",
}


class _PlatformJson(msgspec.Struct, frozen=True):
    architecture: str = ""
    os: str = ""
    variant: str = ""


class Descriptor(msgspec.Struct, frozen=True, rename="camel"):
    """What one document says of a blob: its media type, digest and size in bytes, and perhaps its platform."""

    media_type: str
    digest: str
    size: int
    platform: _PlatformJson | None = None


class _Any(msgspec.Struct, frozen=True, rename="camel"):
    """An index or a manifest before we know which."""

    schema_version: int = 0
    media_type: str = ""
    manifests: list[Descriptor] | None = None
    config: Descriptor | None = None
    layers: list[Descriptor] | None = None


class Manifest(msgspec.Struct, frozen=True):
    """A checked manifest: what it is called itself, its configuration, its layers from the lowest up."""

    digest: str
    media_type: str
    size_bytes: int
    config: Descriptor
    layers: tuple[Descriptor, ...]


class _RunJson(msgspec.Struct, frozen=True, rename="pascal"):
    """The part `config` of a configuration; Docker writes null for what is not set, and once wrote text for lists."""

    entrypoint: list[str] | str | None = None
    cmd: list[str] | str | None = None
    env: list[str] | None = None
    working_dir: str | None = None
    user: str | None = None
    stop_signal: str | None = None
    volumes: dict[str, msgspec.Raw] | None = None
    exposed_ports: dict[str, msgspec.Raw] | None = None
    labels: dict[str, str] | None = None


class _HistoryJson(msgspec.Struct, frozen=True):
    created: str | None = None
    created_by: str | None = None
    comment: str | None = None
    empty_layer: bool | None = None


class _RootfsJson(msgspec.Struct, frozen=True):
    type: str
    diff_ids: list[str] | None = None


class _ConfigJson(msgspec.Struct, frozen=True):
    rootfs: _RootfsJson
    architecture: str = ""
    os: str = ""
    variant: str | None = None
    created: str | None = None
    config: _RunJson | None = None
    history: list[_HistoryJson] | None = None


class Configuration(msgspec.Struct, frozen=True):
    """A checked configuration of an image."""

    platform: Platform
    diff_ids: tuple[str, ...]
    run: RunConfig
    created: str
    history: tuple[HistoryEntry, ...]


def host_platform() -> Platform:
    """Return the platform of this host."""
    name = machine.machine()
    return Platform("linux", _ARCHITECTURES.get(name, name))


def parse_platform(text: str) -> Platform:
    """Read "linux/arm64/v8" or "arm64". Raises ImageError."""
    parts = text.split("/")
    if len(parts) == 1:
        parts = ["linux", *parts]
    if len(parts) > 3 or not all(re.fullmatch(r"[a-z0-9][a-z0-9._-]*", part) for part in parts):
        raise ImageError(f"{text!r} is no platform", hint="write it as linux/arm64 or linux/arm/v7")
    if parts[0] != "linux":
        raise ImageError(f"cannot run images for {parts[0]}", hint="write the platform as linux/arm64")
    return Platform(*parts)


def find_manifest(read: "Callable[[str], bytes]", digest: str, wanted: Platform) -> Manifest:
    """Return the manifest that `digest` is or, if it is an index, the one in it for the platform `wanted`.

    `read` returns the verified bytes of a blob. Raises ImageError.
    """
    seen: set[str] = set()
    for _ in range(_MAX_DEPTH):
        if digest in seen:
            raise ImageError(f"the index {digest} contains itself", hint="ask whoever built the image")
        seen.add(digest)
        data = read(digest)
        found = _parse(data, digest)
        if found.manifests is None:
            return _manifest(found, digest, len(data))
        digest = _choose(found.manifests, digest, wanted)
    raise ImageError(
        f"{digest} is an index more than {_MAX_DEPTH - 1} levels deep", hint="ask whoever built the image"
    )


def _parse(data: bytes, digest: str) -> _Any:
    if len(data) > MAX_BYTES:
        raise ImageError(f"the manifest {digest} is larger than {MAX_BYTES >> 20} MiB")
    try:
        found = msgspec.json.decode(data, type=_Any)
    except (msgspec.MsgspecError, ValueError, RecursionError) as error:
        raise ImageError(f"{digest} is no manifest that we can read: {error}") from error
    if found.schema_version != 2:
        raise ImageError(
            f"the manifest {digest} is of schema version {found.schema_version}, not 2",
            hint="have the image pushed again by a current tool",
        )
    index, manifest = found.manifests is not None, found.config is not None or found.layers is not None
    if index == manifest:
        raise ImageError(f"{digest} is {'both an index and' if index else 'neither an index nor'} a manifest")
    known = _INDEXES if index else _MANIFESTS
    if found.media_type and found.media_type not in known:
        raise ImageError(f"{digest} has the media type {found.media_type!r}, not one of {', '.join(known)}")
    return found


def _manifest(found: _Any, digest: str, size: int) -> Manifest:
    if found.config is None or found.layers is None:
        raise ImageError(f"the manifest {digest} has no {'config' if found.config is None else 'layers'}")
    _check(found.config, _CONFIGS, digest)
    if len(found.layers) > _MAX_LAYERS:
        raise ImageError(
            f"the image {digest} has {len(found.layers)} layers", hint=f"at most {_MAX_LAYERS} can be mounted"
        )
    for layer in found.layers:
        _check(layer, LAYERS, digest)
    return Manifest(digest, found.media_type or OCI_MANIFEST, size, found.config, tuple(found.layers))


def _check(descriptor: Descriptor, known: tuple[str, ...], inside: str) -> None:
    if descriptor.media_type not in known:
        raise ImageError(
            f"{inside} names a blob of the media type {descriptor.media_type!r}, not one of {', '.join(known)}",
            hint="it is no image of a file system, or of a kind that Ringfence does not know",
        )
    if not _DIGEST.fullmatch(descriptor.digest):
        raise ImageError(f"{inside} names a blob {descriptor.digest!r}", hint="only sha256 digests are known")
    if not 0 <= descriptor.size < _SIZE_LIMIT:
        raise ImageError(f"{inside} names a blob of {descriptor.size} bytes")


def _choose(manifests: list[Descriptor], digest: str, wanted: Platform) -> str:
    """Return the digest of the first entry for `wanted`, of the same variant if there is one."""
    fitting = []
    for entry in manifests:
        here = entry.platform or _PlatformJson()
        if (here.os or "linux", here.architecture or wanted.architecture) == (wanted.os, wanted.architecture):
            fitting.append(entry)
    if wanted.variant or len(fitting) > 1:
        exact = [entry for entry in fitting if entry.platform and entry.platform.variant == wanted.variant]
        fitting = exact or ([] if wanted.variant else fitting)
    if not fitting:
        there = sorted({_name(entry.platform) for entry in manifests if entry.platform})
        raise ImageError(
            f"the image {digest} is not there for {wanted}",
            hint=f"it is for {', '.join(there) or 'nothing'}; --platform takes one of them",
        )
    _check(fitting[0], _INDEXES + _MANIFESTS, digest)
    return fitting[0].digest


def _name(found: _PlatformJson) -> str:
    return "/".join(filter(None, (found.os, found.architecture, found.variant)))


def read_configuration(data: bytes, manifest: Manifest) -> Configuration:
    """Return the configuration of `manifest` from its bytes; raises ImageError."""
    if len(data) > MAX_BYTES:
        raise ImageError(f"the configuration {manifest.config.digest} is larger than {MAX_BYTES >> 20} MiB")
    try:
        found = msgspec.json.decode(data, type=_ConfigJson)
    except (msgspec.MsgspecError, ValueError, RecursionError) as error:
        raise ImageError(f"cannot read the configuration {manifest.config.digest}: {error}") from error
    diff_ids = tuple(found.rootfs.diff_ids or ())
    if found.rootfs.type != "layers" or not all(map(_DIGEST.fullmatch, diff_ids)):
        raise ImageError(f"the configuration {manifest.config.digest} has no list of layers by sha256 digest")
    if len(diff_ids) != len(manifest.layers):
        raise ImageError(
            f"the image {manifest.digest} has {len(manifest.layers)} layers, but {len(diff_ids)} diff_ids"
        )
    if found.os not in ("", "linux"):
        raise ImageError(f"the image {manifest.digest} is for {found.os}", hint="Ringfence runs Linux images")
    return Configuration(
        platform=Platform("linux", found.architecture or host_platform().architecture, found.variant or ""),
        diff_ids=diff_ids,
        run=_run_config(found.config or _RunJson(), manifest.config.digest),
        created=_time(found.created),
        history=tuple(
            HistoryEntry(
                _time(step.created), step.created_by or "", step.comment or "", bool(step.empty_layer)
            )
            for step in found.history or ()
        ),
    )


def _run_config(found: _RunJson, digest: str) -> RunConfig:
    run = RunConfig(
        entrypoint=_words(found.entrypoint),
        cmd=_words(found.cmd),
        env=tuple(found.env or ()),
        cwd=found.working_dir or "",
        user=found.user or "",
        stop_signal=found.stop_signal or "",
        volumes=tuple(sorted(found.volumes or ())),
        exposed_ports=tuple(sorted(found.exposed_ports or ())),
        labels=found.labels or {},
    )
    words = (*run.entrypoint, *run.cmd, *run.env, run.cwd, run.user, run.stop_signal, *run.volumes)
    if any("\0" in word for word in words):
        raise ImageError(f"the configuration {digest} has a NUL in what it starts")
    return run


def _words(value: list[str] | str | None) -> tuple[str, ...]:
    if isinstance(value, str):
        return ("/bin/sh", "-c", value) if value else ()
    return tuple(value or ())


def _time(text: str | None) -> str:
    """Return an RFC 3339 time, "" for none and for the zero time that some tools write instead."""
    return "" if text is None or text.startswith("0001-01-01") else text
