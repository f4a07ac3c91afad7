"""What a policy says about images: pinned by digest, from these registries, signed as this policy.json asks.

The first two are checked here, before anything is fetched and before every start. Signatures are checked by skopeo
while it fetches. Where an image came from, and that it passed, is kept as empty files whose names are digests over
all that decided it, so that an image fetched without the check, or under other keys, does not count.
"""

import os

from ringfence.errors import ImageError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Protocol

    from ringfence.image.reference import Reference

    class Rules(Protocol):
        """The part `image` of a policy."""

        @property
        def digest_required(self) -> bool:
            """Whether the reference must carry a digest."""

        @property
        def allowed_registries(self) -> tuple[str, ...] | None:
            """Registries, with or without the beginning of a path, and "local"; None is all."""

        @property
        def signatures(self) -> str | None:
            """The absolute path of a policy.json."""


LOCAL = "local"  # what was built or imported on this host
_MOST_BYTES = 4 << 20


class NoRules:
    """Every image may come in."""

    digest_required = False
    allowed_registries: tuple[str, ...] | None = None
    signatures: str | None = None


def check(rules: "Rules", reference: "Reference | None", *, shown: str, local: bool = False) -> None:
    """Refuse an image that breaks `rules`: it is neither fetched nor run. Raises ImageError.

    `reference` is what the user wrote, None for the host's own files and for a directory; `shown` is for the error;
    `local` says that the image did not come from a registry.
    """
    if rules.digest_required and (reference is None or not reference.digest):
        raise ImageError(
            f"the policy does not allow the image {shown!r}: image.digest_required asks for a digest",
            hint="write NAME@sha256:...; 'ringfence image inspect NAME' shows the digest",
        )
    allowed = rules.allowed_registries
    if allowed is None:
        return
    if reference is None or local or reference.transport != "docker":
        if LOCAL not in allowed:
            raise ImageError(
                f"the policy does not allow the image {shown!r}: it is from this host, not from a registry",
                hint=f"add {LOCAL} to image.allowed_registries, which has {_list(allowed)}",
            )
        return
    if not reference.registry:
        raise ImageError(
            f"the policy does not allow the image {shown!r}: it names no registry",
            hint=f"write REGISTRY/NAME; image.allowed_registries has {_list(allowed)}",
        )
    if not any(reference.name == entry or reference.name.startswith(f"{entry}/") for entry in allowed):
        raise ImageError(
            f"the policy does not allow the image {shown!r}: {reference.registry} is not where it may come from",
            hint=f"image.allowed_registries has {_list(allowed)}",
        )


def _list(allowed: tuple[str, ...]) -> str:
    return ", ".join(allowed) or "nothing"


def files(signatures: str) -> tuple[str, ...]:
    """Return the absolute paths of the policy.json `signatures` and of the files it names. Raises ImageError.

    Source: containers-policy.json(5): keyPath, keyPaths, rekorPublicKeyPath, caPath, caRootsPath and the like.
    """
    import msgspec

    try:
        document = msgspec.json.decode(_read(signatures))
    except (msgspec.MsgspecError, ValueError, RecursionError) as error:
        raise ImageError(
            f"{signatures} is no policy.json: {error}", hint="see containers-policy.json(5)"
        ) from error
    return (signatures, *sorted(set(_keys(document))))


def _keys(value: object) -> list[str]:
    if isinstance(value, list):
        return [path for child in value for path in _keys(child)]
    if not isinstance(value, dict):
        return []
    own = [path for key, path in value.items() if key.endswith("Path")]
    own += [
        path
        for key, paths in value.items()
        if key.endswith("Paths") and isinstance(paths, list)
        for path in paths
    ]
    return [path for path in own if isinstance(path, str)] + _keys(list(value.values()))


def _read(path: str) -> bytes:
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
        with open(descriptor, "rb") as file:
            data = file.read(_MOST_BYTES + 1)
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else error
        raise ImageError(
            f"cannot read {path}: {reason}", hint="image.signatures and its keys must be readable"
        ) from error
    if len(data) > _MOST_BYTES:
        raise ImageError(f"{path} is larger than {_MOST_BYTES >> 20} MiB")
    return data


def came_from_registry(images: str, name: str, digest: str) -> bool:
    """Say whether the image `digest` was fetched from a registry as the canonical `name`.

    `images` is the directory of the store. What was built or imported here under such a name was not.
    """
    return os.path.exists(_mark(images, name, digest))


def passed(images: str, rules: "Rules", name: str, digest: str) -> bool:
    """Say whether the image `digest` was fetched as the canonical `name` under the signature policy of `rules`.

    True when the rules ask for no signature. Raises ImageError.
    """
    return rules.signatures is None or os.path.exists(_mark(images, name, digest, rules.signatures))


def remember(images: str, rules: "Rules", name: str, digest: str, *, registry: bool) -> None:
    """Keep that the image was fetched, perhaps from a `registry`, under `rules`; raises OSError, ImageError."""
    paths = [_mark(images, name, digest)] if registry else []
    paths += [_mark(images, name, digest, rules.signatures)] if rules.signatures else []
    for path in paths:
        os.makedirs(os.path.dirname(path), mode=0o755, exist_ok=True)
        os.close(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o644))


def _mark(images: str, name: str, digest: str, signatures: str = "") -> str:
    """Return the path whose existence says it; the contents of policy.json and of the files it names are part of it."""
    import hashlib

    found = hashlib.sha256()
    keys = [_read(path) for path in files(signatures)] if signatures else []
    for part in (name.encode(), digest.encode(), *keys):
        found.update(len(part).to_bytes(8, "big") + part)
    return os.path.join(images, "verified", f"{digest.removeprefix('sha256:')}-{found.hexdigest()}")
