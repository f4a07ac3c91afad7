"""What is known of an image in the store: `ImageRecord`, kept as one JSON file per manifest digest."""

import msgspec


class Layer(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One layer: its blob `digest` and `size_bytes` as transported, and `diff_id`, the digest of its plain tar."""

    digest: str
    diff_id: str
    size_bytes: int
    media_type: str


class Platform(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What an image was built for, in the words of OCI: os "linux", architecture "amd64", variant "v8" or ""."""

    os: str
    architecture: str
    variant: str = ""

    def __str__(self) -> str:
        return "/".join(filter(None, (self.os, self.architecture, self.variant)))


class RunConfig(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What the image asks to be started with: input for a plan, never authority. "" or () where it says nothing."""

    entrypoint: tuple[str, ...] = ()
    cmd: tuple[str, ...] = ()
    env: tuple[str, ...] = ()
    cwd: str = ""
    user: str = ""
    stop_signal: str = ""
    volumes: tuple[str, ...] = ()
    exposed_ports: tuple[str, ...] = ()
    labels: dict[str, str] = {}


class HistoryEntry(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One step of the build; `empty_layer` when it added no layer."""

    created: str = ""
    created_by: str = ""
    comment: str = ""
    empty_layer: bool = False


class ImageRecord(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One image of the store, checked when it was published.

    `digest` is that of its manifest; layers stand lowest first; `created` is the image's own word (RFC 3339 or ""),
    `pulled_at` ours; `source` says where it came from; `manifest_size_bytes` is that of the manifest's blob.
    """

    digest: str
    manifest_media_type: str
    manifest_size_bytes: int
    config_digest: str
    layers: tuple[Layer, ...]
    platform: Platform
    config: RunConfig
    created: str
    source: str
    pulled_at: str
    history: tuple[HistoryEntry, ...] = ()

    @property
    def size_bytes(self) -> int:
        """The bytes of all layers as transported."""
        return sum(layer.size_bytes for layer in self.layers)

    def blobs(self) -> set[str]:
        """Return the digests of all blobs that the image is made of."""
        return {self.digest, self.config_digest, *(layer.digest for layer in self.layers)}
