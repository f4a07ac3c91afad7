"""A real registry on loopback, a proxy before it that can fail, and images to push, made of this host's files."""

import http.client
import json
import os
import re
import subprocess
import tarfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from hashlib import sha256
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from socket import SHUT_RDWR, create_connection, socket

_CHUNK = 64 << 10


def free_port() -> int:
    with socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])


@contextmanager
def registry(home: Path, *, port: int = 0, more: str = "", certificate: str = "") -> Iterator[int]:
    """Run Debian's docker-registry on a free port of loopback with its files in `home`; yields the port."""
    port = port or free_port()
    home.mkdir(parents=True, exist_ok=True)
    (home / "config.yml").write_text(
        f"version: 0.1\nlog: {{level: error}}\nstorage: {{filesystem: {{rootdirectory: {home}/data}}}}\n"
        f'http: {{addr: "127.0.0.1:{port}", secret: test{certificate}}}\n{more}\n'
    )
    with (home / "log").open("ab") as log:
        process = subprocess.Popen(
            ["docker-registry", "serve", str(home / "config.yml")], stdout=log, stderr=log
        )
    try:
        _wait_for(port, process)
        yield port
    finally:
        process.terminate()
        process.wait()


def _wait_for(port: int, process: "subprocess.Popen[bytes]") -> None:
    end = time.monotonic() + 20
    while process.poll() is None and time.monotonic() < end:
        try:
            create_connection(("127.0.0.1", port), 1).close()
        except OSError:
            time.sleep(0.02)
        else:
            return
    raise RuntimeError("docker-registry did not start")


class Proxy:
    """What stands before the registry: counts, and does to each answer what `fault` says.

    `fault` gets method and path and returns None (let it through), a status (answer that), or a number of bytes
    wrapped in a list (send so many of the body, then cut the connection).
    """

    def __init__(self, upstream: int) -> None:
        self.upstream = upstream
        self.fault: Callable[[str, str], int | list[int] | None] = lambda _method, _path: None
        self.bytes_per_s = 0
        self.closing = threading.Event()
        self.blobs: list[str] = []
        self.blob_bytes = 0
        self.requests = 0
        self.lock = threading.Lock()
        proxy = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_GET(self) -> None:
                proxy.answer(self)

            do_HEAD = do_GET

            def log_message(self, *_: object) -> None:
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.port = self.server.server_address[1]
        self.thread = threading.Thread(target=self.server.serve_forever, args=(0.05,), daemon=True)
        self.thread.start()

    def close(self) -> None:
        self.closing.set()
        self.server.shutdown()
        self.server.server_close()
        self.thread.join()

    def forget(self) -> None:
        self.fault, self.bytes_per_s = (lambda _method, _path: None), 0
        self.blobs, self.blob_bytes, self.requests = [], 0, 0

    def answer(self, request: BaseHTTPRequestHandler) -> None:
        with self.lock:
            self.requests += 1
            if "/blobs/" in request.path:
                self.blobs.append(request.path.rpartition("/")[2])
            fault = self.fault(request.command, request.path)
        if isinstance(fault, int):
            request.send_response(fault)
            request.send_header("Retry-After", "0")
            request.send_header("Content-Length", "0")
            request.end_headers()
            return
        connection = http.client.HTTPConnection("127.0.0.1", self.upstream)
        try:
            headers = {"Host": f"127.0.0.1:{self.port}"}
            for name in ("Accept", "Authorization", "Range"):
                if values := request.headers.get_all(name):
                    headers[name] = ", ".join(values)
            connection.request(request.command, request.path, headers=headers)
            answer = connection.getresponse()
            request.send_response(answer.status)
            for name, value in answer.getheaders():
                if name.title() not in ("Date", "Server", "Connection", "Transfer-Encoding"):
                    request.send_header(name, value)
            request.end_headers()
            self._body(request, answer, fault)
        except OSError:
            request.close_connection = True
        finally:
            connection.close()

    def _body(
        self, request: BaseHTTPRequestHandler, answer: http.client.HTTPResponse, cut: list[int] | None
    ) -> None:
        left = cut[0] if cut else 1 << 62
        while data := answer.read(min(_CHUNK, left) if left else 0):
            request.wfile.write(data)
            left -= len(data)
            if "/blobs/" in request.path:
                with self.lock:
                    self.blob_bytes += len(data)
            if self.bytes_per_s and self.closing.wait(len(data) / self.bytes_per_s):
                return
        if cut:
            request.wfile.flush()
            request.connection.shutdown(SHUT_RDWR)
            request.close_connection = True


def run(*command: object, **environment: str) -> bytes:
    """Run a program that must succeed; return what it printed."""
    done = subprocess.run(
        [str(word) for word in command], capture_output=True, env={**os.environ, **environment}, check=False
    )
    assert done.returncode == 0, (command, done.stderr.decode())
    return done.stdout


def layer_of(path: Path, sources: list[str], *, extra: dict[str, bytes] | None = None) -> Path:
    """Write a tar of files of this host, and of `extra` ones."""
    with tarfile.open(path, "w") as tar:
        for source in sources:
            tar.add(os.path.realpath(source), source.lstrip("/"))
        for name, data in (extra or {}).items():
            file = path.with_suffix(".extra")
            file.write_bytes(data)
            tar.add(file, name)
            file.unlink()
    return path


def layout(home: Path, tag: str, layers: list[Path], *config: str) -> str:
    """Make an image of layers with umoci, in the OCI layout `home`; return what skopeo calls it."""
    image = f"{home}:{tag}"
    if not (home / "oci-layout").exists():
        run("umoci", "init", "--layout", home)
    run("umoci", "new", "--image", image)
    if config:
        run("umoci", "config", "--image", image, *config)
    for layer in layers:
        run("umoci", "raw", "add-layer", "--image", image, layer)
    return f"oci:{image}"


def push(source: str, port: int, name: str, *flags: str) -> str:
    """Push to the registry; return the reference."""
    reference = f"127.0.0.1:{port}/{name}"
    run(
        "skopeo",
        "copy",
        "-q",
        "--insecure-policy",
        "--dest-tls-verify=false",
        *flags,
        source,
        f"docker://{reference}",
    )
    return reference


def manifest_of(port: int, name: str, tag: str) -> tuple[str, str, bytes]:
    """Return digest, media type and bytes of what the registry has under a tag."""
    connection = http.client.HTTPConnection("127.0.0.1", port)
    kinds = (
        "application/vnd.oci.image.index.v1+json, application/vnd.oci.image.manifest.v1+json, "
        "application/vnd.docker.distribution.manifest.v2+json"
    )
    connection.request("GET", f"/v2/{name}/manifests/{tag}", headers={"Accept": kinds})
    answer = connection.getresponse()
    data = answer.read()
    connection.close()
    assert answer.status == 200, data
    return f"sha256:{sha256(data).hexdigest()}", answer.headers["Content-Type"], data


def put_index(port: int, name: str, tag: str, entries: dict[str, str]) -> str:
    """Put an index of {platform: tag of its image} into the registry; return its digest."""
    manifests = []
    for platform, of in entries.items():
        digest, media_type, data = manifest_of(port, name, of)
        system, architecture = platform.split("/")
        manifests.append(
            {
                "mediaType": media_type,
                "digest": digest,
                "size": len(data),
                "platform": {"os": system, "architecture": architecture},
            }
        )
    kind = "application/vnd.oci.image.index.v1+json"
    body = json.dumps({"schemaVersion": 2, "mediaType": kind, "manifests": manifests}).encode()
    connection = http.client.HTTPConnection("127.0.0.1", port)
    connection.request("PUT", f"/v2/{name}/manifests/{tag}", body, {"Content-Type": kind})
    answer = connection.getresponse()
    assert answer.status == 201, answer.read()
    connection.close()
    return f"sha256:{sha256(body).hexdigest()}"


def blob_path(path: str) -> bool:
    """Say whether a request is for a blob."""
    return re.search(r"/blobs/sha256:", path) is not None
