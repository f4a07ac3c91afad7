"""The one place that runs skopeo, which speaks to registries and reads other tools' images.

It honours what users of podman and docker have set up: login files, registries.conf, certificates. Ringfence adds
nothing to that but plain HTTP for registries on this host's loopback.
"""

import hashlib
import os
import selectors
import shutil
import subprocess
import time
from collections import deque

import msgspec

from ringfence.errors import ImageError
from ringfence.image.complaints import explain

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import IO

SILENCE_S = 60.0  # nothing said and no byte come for so long: the other side is gone
_TICK_S = 0.2
_MOST_OUTPUT = 4 << 20  # a manifest is at most so large
_KEPT_LINES = 20
_ACCEPT_ANYTHING = b'{"default": [{"type": "insecureAcceptAnything"}]}\n'
_SYSTEM_POLICIES = ("/etc/containers/policy.json", "/usr/share/containers/policy.json")


class Skopeo:
    """How skopeo is run for one piece of work.

    `place` is a directory of this work's own, for temporary files; `platform` ("linux/arm64/v8") picks from an
    index; `signatures` is a policy.json that takes the place of the host's, "" is the host's own;
    `plain` says that the registry may speak HTTP, or HTTPS with a certificate that nobody vouches for.
    """

    def __init__(self, place: str, *, platform: str, signatures: str = "", plain: bool = False) -> None:
        """Choose the policy for signatures. Raises ImageError when skopeo is not installed."""
        if shutil.which("skopeo") is None:
            raise ImageError("skopeo is not installed", hint="apt-get install skopeo")
        self.place = place
        self.policy = signatures or host_policy() or _generated(place)
        self._plain = plain
        system, architecture, variant = (*platform.split("/"), "")[:3]
        self._flags = ["--policy", self.policy, "--tmpdir", place]
        self._flags += ["--override-os", system, "--override-arch", architecture]
        self._flags += ["--override-variant", variant] if variant else []

    def manifest(self, source: str) -> bytes:
        """Return the manifest or index that `source` names, as its registry has it. Raises ImageError."""
        return self._run(source, ["inspect", "--raw", *self._verify("--tls-verify"), source])

    def configuration(self, source: str) -> bytes:
        """Return the configuration of the image `source`, as its registry has it. Raises ImageError."""
        return self._run(source, ["inspect", "--raw", "--config", *self._verify("--tls-verify"), source])

    def copy(self, source: str, blobs: str, watch: "Callable[[], int]") -> str:
        """Bring the image `source` into the directory `blobs` (it gets ``sha256/``); return its manifest's digest.

        Blobs that are there already are not fetched again; each new one is hashed, and put there by a rename.
        `watch` is called several times a second; while the number that it returns changes, the work goes on.
        Raises ImageError.
        """
        digest_file = os.path.join(self.place, "digest")
        # An OCI layout holds no signatures: they have been checked when it is written.
        flags = ["--dest-shared-blob-dir", blobs, "--digestfile", digest_file, "--remove-signatures"]
        flags += self._verify("--src-tls-verify")
        # These say gzip of layers that they keep as plain tar; skopeo makes it true, unless told to keep them so.
        if not source.startswith(("docker-archive:", "containers-storage:")):
            flags.append("--dest-oci-accept-uncompressed-layers")
        self._run(source, ["copy", *flags, source, f"oci:{self.place}/layout:image"], watch)
        with open(digest_file, encoding="ascii") as file:
            return file.read(100).strip()

    def _verify(self, flag: str) -> list[str]:
        return [f"{flag}=false"] if self._plain else []

    def _run(self, source: str, arguments: list[str], watch: "Callable[[], int]" = int) -> bytes:
        # It goes when we go, however that is: nobody would look at what it brings.
        command = ["setpriv", "--pdeathsig=KILL", "skopeo", *self._flags, *arguments]
        process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            env=_environment(self.place),
        )
        try:
            output, last = _listen(process, source, watch)
            if process.wait() != 0:
                raise explain(source, "\n".join(last) or f"skopeo ended with status {process.returncode}")
            return output
        finally:
            if process.poll() is None:
                process.kill()
                process.wait()
            for stream in (process.stdout, process.stderr):
                if stream is not None:
                    stream.close()


def _environment(place: str) -> dict[str, str]:
    """Return the user's own environment, by which skopeo finds logins, proxies and certificates."""
    found = {**os.environ, "LC_ALL": "C.UTF-8"}
    if os.geteuid() != 0:
        # Without one it looks for logins in a directory of root's, and fails when it may not.
        found.setdefault("XDG_RUNTIME_DIR", place)
    return found


def _listen(
    process: "subprocess.Popen[bytes]", source: str, watch: "Callable[[], int]"
) -> tuple[bytes, "deque[str]"]:
    """Return all of standard output and the end of standard error; raises ImageError for silence or a flood."""
    output, last = bytearray(), _Tail()
    heard, seen = time.monotonic(), watch()
    with selectors.DefaultSelector() as selector:
        for stream, take in ((process.stdout, output.extend), (process.stderr, last.feed)):
            selector.register(_stream(stream), selectors.EVENT_READ, take)
        while selector.get_map():
            for key, _ in selector.select(_TICK_S):
                data = os.read(key.fd, 1 << 16)
                key.data(data)
                heard = time.monotonic()
                if not data:
                    selector.unregister(key.fileobj)
            if len(output) > _MOST_OUTPUT:
                raise ImageError(f"what describes {source} is larger than {_MOST_OUTPUT >> 20} MiB")
            if (now := watch()) != seen:
                heard, seen = time.monotonic(), now
            if time.monotonic() - heard > SILENCE_S:
                raise explain(source, f"i/o timeout: nothing came for {SILENCE_S:.0f} seconds")
    return bytes(output), last.lines()


def _stream(stream: "IO[bytes] | None") -> "IO[bytes]":
    assert stream is not None  # noqa: S101 - for the type checker: both are pipes
    return stream


class _Tail:
    """The last lines of a stream, of bounded length."""

    def __init__(self) -> None:
        self._kept = b""

    def feed(self, data: bytes) -> None:
        self._kept = (self._kept + data)[-(16 << 10) :]

    def lines(self) -> "deque[str]":
        return deque(self._kept.decode("utf-8", "replace").splitlines(), maxlen=_KEPT_LINES)


def host_policy() -> str:
    """Return the policy.json for signatures that this user's tools go by, "" if there is none."""
    home = os.environ.get("HOME")
    own = [os.path.join(home, ".config/containers/policy.json")] if home else []
    return next((path for path in (*own, *_SYSTEM_POLICIES) if os.path.lexists(path)), "")


def accepts_anything(policy: str) -> bool:
    """Say whether the policy.json at `policy` asks for no signature of any image; False when it is unreadable."""
    try:
        with open(policy, "rb") as file:
            found = msgspec.json.decode(file.read(_MOST_OUTPUT))
    except (OSError, ValueError, RecursionError):
        return False
    types = set(_types(found))
    return types == {"insecureAcceptAnything"}


def _types(value: object) -> list[object]:
    """Return what stands under the key "type" anywhere in `value`."""
    if isinstance(value, dict):
        inner = [found for child in value.values() for found in _types(child)]
        return [*inner, value["type"]] if isinstance(value.get("type"), str) else inner
    return [found for child in value for found in _types(child)] if isinstance(value, list) else []


def _generated(place: str) -> str:
    """Write the policy of hosts that have none: what their other tools would ask the user to write down."""
    path = os.path.join(place, "policy.json")
    with open(path, "wb") as file:
        file.write(_ACCEPT_ANYTHING)
    return path


def is_loopback(registry: str) -> bool:
    """Say whether `registry` is written as an address of this host's loopback."""
    host = registry if registry.endswith("]") else registry.rpartition(":")[0] or registry
    parts = host.split(".")
    is_address = len(parts) == 4 and all(part.isascii() and part.isdigit() for part in parts)
    return host in ("localhost", "[::1]") or (is_address and parts[0] == "127")


def sha256(data: bytes) -> str:
    """Return the digest of `data` as "sha256:..."."""
    return f"sha256:{hashlib.sha256(data).hexdigest()}"
