"""What users call images: references of every transport, and the one name each has in the store.

On the way of every `run`, so it is read by hand: `re` alone would cost 8 ms.
Source of the grammar: https://github.com/distribution/reference (reference.go, regexp.go); of the transports:
containers-transports(5).
"""

import os

from ringfence.errors import ImageError

_TRANSPORTS = ("docker", "oci", "oci-archive", "docker-archive", "dir", "containers-storage")
_OTHERS = ("docker-daemon", "ostree", "sif", "tarball")  # skopeo's, but not ours
_PATHS = ("oci", "oci-archive", "docker-archive", "dir")
_MAX_NAME = 255
_MAX_TAG = 128
_MAX_ENCODED = 255  # NAME_MAX: the name of an image is a file name in the store
_LOWER = "abcdefghijklmnopqrstuvwxyz"
_DIGITS = "0123456789"
_HEX = _DIGITS + "abcdef"
_LETTERS = _LOWER + _LOWER.upper()
_PLAIN = frozenset((_LETTERS + _DIGITS + "._-").encode())
_EXAMPLES = "write for example alpine, registry.example.com/team/app:1.2 or oci:DIR:TAG"


class Reference:
    """A reference, taken apart.

    transport  "docker" (a registry), "oci", "oci-archive", "docker-archive", "dir" or "containers-storage"
    name       the repository, with its registry where one is written; "" for what is found by a path
    path       an absolute path; "" for what is found by a name
    tag        "" where none is written; for oci and the archives whatever picks one of their images
    digest     "sha256:..." or ""
    """

    __slots__ = ("digest", "name", "path", "tag", "transport")

    def __init__(
        self, transport: str, *, name: str = "", path: str = "", tag: str = "", digest: str = ""
    ) -> None:
        """Hold the parts; `parse` checks them."""
        self.transport = transport
        self.name = name
        self.path = path
        self.tag = tag
        self.digest = digest

    def __repr__(self) -> str:
        return f"Reference({canonical(self)!r})"

    @property
    def registry(self) -> str:
        """The registry as written ("host" or "host:port"), "" where none is: skopeo has a default."""
        return _registry(self.name) if self.transport == "docker" else ""


def parse(text: str) -> Reference:
    """Take a reference apart; relative paths start at the current directory. Raises ImageError."""
    if not text.isprintable():
        raise _bad(text, "it holds what cannot be printed")
    scheme, colon, rest = text.partition(":")
    if rest.startswith("//") and scheme != "docker":
        raise _bad(text, f"the transport {scheme}:// is not known", f"known: {', '.join(_TRANSPORTS)}")
    if colon and scheme in _OTHERS:
        raise _bad(text, f"the transport {scheme}: cannot be read", f"known: {', '.join(_TRANSPORTS)}")
    if colon and scheme in _PATHS:
        return _at_path(text, scheme, rest)
    if colon and scheme == "containers-storage":
        return _named(text, scheme, rest)
    return _named(text, "docker", rest[2:] if scheme == "docker" and rest.startswith("//") else text)


def canonical(reference: Reference) -> str:
    """Return the one name of this reference in the store: ``alpine`` is ``alpine:latest``."""
    tag = f":{reference.tag}" if reference.tag else ""
    if reference.transport in _PATHS:
        return f"{reference.transport}:{reference.path}{tag}"
    transport = "" if reference.transport == "docker" else f"{reference.transport}:"
    if (
        reference.name in _TRANSPORTS[1:] + _OTHERS
    ):  # a repository called `oci`: without this it would be the transport
        transport = transport or "docker://"
    if reference.digest:
        return f"{transport}{reference.name}{tag}@{reference.digest}"
    return f"{transport}{reference.name}{tag or ':latest'}"


def source(reference: Reference) -> str:
    """Return what skopeo calls this image; where a digest is written it decides, and the tag says nothing."""
    if reference.transport in _PATHS:
        return canonical(reference)
    start = "docker://" if reference.transport == "docker" else f"{reference.transport}:"
    ending = f"@{reference.digest}" if reference.digest else f":{reference.tag or 'latest'}"
    return f"{start}{reference.name}{ending}"


def encode(name: str) -> str:
    """Return `name` as a file name: every byte outside A-Z a-z 0-9 . _ - as %XX."""
    data = name.encode("utf-8", "surrogateescape")
    return "".join(chr(byte) if byte in _PLAIN else f"%{byte:02X}" for byte in data)


def decode(encoded: str) -> str:
    """Return the name that `encode` made `encoded` of; raises ImageError when it never does that."""
    first, *parts = encoded.split("%")
    try:
        data = first.encode("ascii") + b"".join(bytes.fromhex(part[:2]) + part[2:].encode() for part in parts)
        name = data.decode("utf-8", "surrogateescape")
    except ValueError:
        name = ""
    if encode(name) != encoded:
        raise ImageError(f"{encoded!r} is not the file name of an image", hint="remove that file")
    return name


def _at_path(text: str, transport: str, rest: str) -> Reference:
    # containers-transports(5): the path ends at the first colon. Ours, `dir:`, has nothing after it.
    path, tag = (rest, "") if transport == "dir" else rest.partition(":")[::2]
    if not path:
        raise _bad(text, "it has no path", f"write {transport}:PATH")
    if tag and not all(letter in _LETTERS + _DIGITS + "._-+/@:" for letter in tag):
        raise _bad(text, f"{tag!r} picks no image in it")
    reference = Reference(transport, path=os.path.abspath(path), tag=tag)
    return _short_enough(text, reference)


def _named(text: str, transport: str, rest: str) -> Reference:
    before, at, digest = rest.partition("@")
    # A colon after the last slash starts a tag; one before it belongs to the registry's port.
    slash = before.rfind("/") + 1
    last, colon, tag = before[slash:].partition(":")
    name = before[:slash] + last
    if at:
        _check_digest(text, digest)
    if colon and not _is_tag(tag):
        raise _bad(
            text, f"{tag!r} is not a tag", f"a tag has at most {_MAX_TAG} letters, digits, dots, dashes and _"
        )
    _check_name(text, name)
    return _short_enough(text, Reference(transport, name=name, tag=tag, digest=digest))


def _short_enough(text: str, reference: Reference) -> Reference:
    if len(encode(canonical(reference))) > _MAX_ENCODED:
        raise _bad(text, "it is too long to be the name of an image here")
    return reference


def _check_name(text: str, name: str) -> None:
    if not name:
        raise _bad(text, "it has no name")
    if len(name) > _MAX_NAME:
        raise _bad(text, f"the name is longer than {_MAX_NAME} characters")
    if len(name) == 64 and not name.strip(_HEX):
        raise _bad(text, "64 digits are an id, not a name", "write NAME@sha256:DIGITS")
    registry = _registry(name)
    if registry and not _is_registry(registry):
        raise _bad(text, f"{registry!r} is not a registry", "write host or host:port")
    path = name[len(registry) + 1 :] if registry else name
    for part in path.split("/"):
        if part != part.lower():
            raise _bad(text, f"{part!r} has capitals", f"repositories are in small letters: {name.lower()}")
        if not _is_component(part):
            raise _bad(text, f"{part!r} is not a part of a name" if part else "a part of the name is empty")


def _registry(name: str) -> str:
    """Return the first part of a name if that is a registry: with a dot or a port, or localhost."""
    first, slash, _ = name.partition("/")
    is_host = "." in first or ":" in first or first == "localhost"
    return first if slash and is_host else ""


def _is_registry(registry: str) -> bool:
    host, colon, port = registry.rpartition(":")
    if not colon or registry.endswith("]"):
        host, port = registry, "0"
    if not 1 <= len(port) <= 5 or port.strip(_DIGITS) or int(port) > 65535:
        return False
    if host.startswith("["):
        return host.endswith("]") and ":" in host and not host[1:-1].strip(_HEX + "ABCDEF:")
    return all(
        part and not part.strip(_LETTERS + _DIGITS + "-") and part[0] != "-" and part[-1] != "-"
        for part in host.split(".")
    )


def _is_component(part: str) -> bool:
    """Say whether small letters and digits are joined by ".", "_", "__" or any number of "-"."""
    separator = "start"
    for letter in part:
        if letter in _LOWER or letter in _DIGITS:
            separator = ""
        else:
            separator += letter
            if separator not in (".", "_", "__") and separator.strip("-"):
                return False
    return not separator


def _is_tag(tag: str) -> bool:
    return (
        1 <= len(tag) <= _MAX_TAG and tag[0] not in ".-" and all(c in _LETTERS + _DIGITS + "._-" for c in tag)
    )


def _check_digest(text: str, digest: str) -> None:
    algorithm, _, digits = digest.partition(":")
    if algorithm in ("sha384", "sha512"):
        raise _bad(text, f"only sha256 digests are known, not {algorithm}")
    if algorithm != "sha256" or len(digits) != 64 or digits.strip(_HEX):
        raise _bad(text, f"{digest!r} is not a digest", "a digest is sha256: and 64 digits 0-9 a-f")


def _bad(text: str, why: str, hint: str = _EXAMPLES) -> ImageError:
    shown = text if len(text) <= 300 else f"{text[:300]}..."
    return ImageError(f"{shown!r} is not an image reference: {why}", hint=hint)
