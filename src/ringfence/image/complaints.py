"""From skopeo's own words to one line that says what failed and what to do about it."""

import re

from ringfence.errors import ImageError

_MOST = 300


class CutOff(ImageError):
    """The other side went away, or failed for a moment: another try may do better."""


# What skopeo (or the registry, through it) says, in small letters; what that means; what to do. The first match counts,
# so what names a cause comes before what follows from it.
_KNOWN: tuple[tuple[tuple[str, ...], str, str, type[ImageError]], ...] = (
    (
        ("no space left on device", "disk quota exceeded"),
        "the disk is full",
        "free some space, or run: ringfence image prune",
        ImageError,
    ),
    (
        ("read-only file system",),
        "the store cannot be written",
        "set RINGFENCE_STATE_DIR to a place that can be",
        ImageError,
    ),
    (
        ("permission denied",),
        "this user may not read or write what is needed",
        "run as the owner of the store, and of the image if it is a file",
        ImageError,
    ),
    (
        ("is rejected by policy", "source image rejected", "signature"),
        "the policy for signatures does not let it in",
        "look at image.signatures of the policy, or at this host's policy.json",
        ImageError,
    ),
    (
        ("no image found in manifest list", "no image found in image index"),
        "it is not there for this platform",
        "--platform picks another",
        ImageError,
    ),
    (
        ("toomanyrequests", "too many requests", "statuscode: 429", "status 429"),
        "the registry has had too many requests from here",
        "wait a while, or log in: skopeo login REGISTRY",
        ImageError,
    ),
    (
        ("no such host", "name resolution", "server misbehaving"),
        "its registry's host is not known",
        "check the name, and this host's DNS",
        ImageError,
    ),
    (
        ("http response to https client",),
        "its registry speaks plain HTTP",
        "if you trust the network to it: insecure = true for it in registries.conf",
        ImageError,
    ),
    (
        ("x509:", "tls:", "certificate"),
        "the TLS connection to its registry cannot be trusted",
        "put the CA of the registry into /etc/containers/certs.d/REGISTRY/ca.crt",
        ImageError,
    ),
    (
        ("invalid username/password", "unauthorized", "authentication required", "access to the resource"),
        "the registry refuses it to this user",
        "check the name; log in with: skopeo login REGISTRY",
        ImageError,
    ),
    (
        ("denied", "forbidden", "statuscode: 403", "status 403", "statuscode: 401", "status 401"),
        "the registry refuses it to this user",
        "check the name; log in with: skopeo login REGISTRY",
        ImageError,
    ),
    (
        ("manifest unknown", "name unknown", "repository name not known"),
        "there is no such image",
        "check name and tag",
        ImageError,
    ),
    (
        ("blob unknown", "fetching blob: not found", "error fetching blob"),
        "its registry lacks a part of it",
        "have the image pushed again",
        ImageError,
    ),
    (
        ("statuscode: 404", "status 404", "not found"),
        "there is no such image",
        "check name and tag",
        ImageError,
    ),
    (
        ("digest did not match", "does not match provided manifest digest", "digest mismatch"),
        "what came is not what its digest says",
        "try again; if it stays so, have the image pushed again",
        CutOff,
    ),
    (
        ("connection refused",),
        "nothing answers at its registry's address",
        "check that the registry runs, and its port",
        ImageError,
    ),
    (
        (
            "internal server error",
            "bad gateway",
            "service unavailable",
            "gateway timeout",
            "statuscode: 5",
            "status 5",
            "status: 5",
        ),
        "its registry failed",
        "try again later, or ask whoever runs it",
        CutOff,
    ),
    (
        (
            "unexpected eof",
            "connection reset",
            "broken pipe",
            "stream error",
            "closed network connection",
            ": eof",
        ),
        "the connection was cut",
        "try again: what has come stays",
        CutOff,
    ),
    (
        ("timeout", "deadline exceeded", "network is unreachable", "no route to host"),
        "its registry cannot be reached",
        "check the network, and the proxy if there is one",
        CutOff,
    ),
    (
        ("does not resolve to an image", "identifier is not an image"),
        "there is no such image in this storage",
        "podman images lists them",
        ImageError,
    ),
    (
        ("no such file or directory", "invalid tar header", "no descriptor found", "file not found"),
        "no image can be read there",
        "check the path, and the tag after it",
        ImageError,
    ),
)


def explain(source: str, said: str) -> ImageError:
    """Return the error for what skopeo `said` on standard error about `source`, a CutOff if a retry may help."""
    reason = _reason(said)
    low = reason.lower().replace("status code ", "status ")
    for words, meaning, hint, kind in _KNOWN:
        if any(word in low for word in words):
            return kind(f"cannot get {source}: {meaning} ({reason})", hint=hint)
    return ImageError(f"cannot get {source}: {reason}", hint="these are skopeo's own words")


def _reason(said: str) -> str:
    """Return what skopeo says at the end, without its time stamps and without secrets in addresses."""
    lines = [line for line in said.splitlines() if line.strip()]
    fatal = [line for line in lines if "level=fatal" in line or "level=error" in line]
    text = (fatal or lines or ["it does not say why"])[-1]
    found = re.search(r'msg="((?:[^"\\]|\\.)*)"', text)
    text = (
        re.sub(r"\\(.)", lambda escaped: " " if escaped[1] in "nt" else escaped[1], found[1])
        if found
        else text
    )
    # Registries send people to storage with a signature in the query, which lets anybody in for a while.
    text = re.sub(r"\?[^\s\"]*", "?...", text)
    text = re.sub(r"//[^/@\s]*@", "//", text)
    text = re.sub(r'^(?:Error parsing image name|initializing source) "?\S+?"?: ', "", text)
    return text if len(text) <= _MOST else f"...{text[-_MOST:]}"
