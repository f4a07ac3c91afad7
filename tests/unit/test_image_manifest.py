"""The readers of what describes an image: what they take, and that everything else is one clear error."""

import hashlib
import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ringfence.errors import ImageError
from ringfence.image.manifest import (
    MAX_BYTES,
    Manifest,
    find_manifest,
    parse_platform,
    read_configuration,
)
from ringfence.image.record import Platform

AMD64 = Platform("linux", "amd64")
OCI = "application/vnd.oci.image."
DOCKER = "application/vnd.docker."
LAYER = f"{OCI}layer.v1.tar+gzip"
A, B, C = (f"sha256:{letter * 64}" for letter in "abc")


class Blobs(dict[str, bytes]):
    """Documents by digest."""

    def put(self, document: object) -> str:
        data = document if isinstance(document, bytes) else json.dumps(document).encode()
        digest = f"sha256:{hashlib.sha256(data).hexdigest()}"
        self[digest] = data
        return digest

    def find(self, digest: str, platform: Platform = AMD64) -> Manifest:
        return find_manifest(self.__getitem__, digest, platform)


@pytest.fixture
def blobs() -> Blobs:
    return Blobs()


def descriptor(digest: str = A, media_type: str = LAYER, size: int = 7, **more: object) -> dict[str, object]:
    return {"mediaType": media_type, "digest": digest, "size": size, **more}


def manifest(**more: object) -> dict[str, object]:
    base = {
        "schemaVersion": 2,
        "mediaType": f"{OCI}manifest.v1+json",
        "config": descriptor(B, f"{OCI}config.v1+json"),
        "layers": [descriptor(A), descriptor(C)],
    }
    return {name: value for name, value in (base | more).items() if value is not None}


def index(*entries: dict[str, object], **more: object) -> dict[str, object]:
    return {"schemaVersion": 2, "manifests": list(entries), **more}


def entry(digest: str, architecture: str, variant: str = "", os: str = "linux") -> dict[str, object]:
    platform = {"os": os, "architecture": architecture} | ({"variant": variant} if variant else {})
    return descriptor(digest, f"{OCI}manifest.v1+json", platform=platform)


def test_a_manifest_of_oci_and_one_of_docker_are_read(blobs: Blobs) -> None:
    """Configuration and layers come out in order; a manifest need not name its own type."""
    for document in (
        manifest(),
        manifest(mediaType=None),
        manifest(
            mediaType=f"{DOCKER}distribution.manifest.v2+json",
            config=descriptor(B, f"{DOCKER}container.image.v1+json"),
            layers=[
                descriptor(A, f"{DOCKER}image.rootfs.diff.tar.gzip"),
                descriptor(C, f"{OCI}layer.v1.tar+zstd"),
            ],
        ),
    ):
        digest = blobs.put(document)
        found = blobs.find(digest)
        assert (found.digest, found.config.digest) == (digest, B)
        assert [layer.digest for layer in found.layers] == [A, C]


@pytest.mark.parametrize(
    ("wanted", "chosen"),
    [
        (AMD64, "amd"),
        (Platform("linux", "arm64"), "arm64"),
        (Platform("linux", "arm", "v7"), "v7"),
        (Platform("linux", "arm"), "v6"),
        (Platform("linux", "arm", "v5"), ""),
        (Platform("linux", "s390x"), ""),
    ],
)
def test_an_index_gives_the_manifest_of_the_platform(blobs: Blobs, wanted: Platform, chosen: str) -> None:
    """The variant must fit where one is wanted; what is not there is an error that names what is."""
    names = {
        name: blobs.put(manifest(annotations={"is": name}))
        for name in ("amd", "arm64", "v6", "v7", "windows")
    }
    digest = blobs.put(
        index(
            entry(names["windows"], "amd64", os="windows"),
            entry(names["amd"], "amd64"),
            entry(names["arm64"], "arm64", "v8"),
            entry(names["v6"], "arm", "v6"),
            entry(names["v7"], "arm", "v7"),
        )
    )
    if chosen:
        assert blobs.find(digest, wanted).digest == names[chosen]
    else:
        with pytest.raises(ImageError, match=r"not there for linux/.*arm64/v8.*--platform"):
            blobs.find(digest, wanted)


def test_an_index_of_an_index_is_followed_and_no_deeper(blobs: Blobs) -> None:
    """Two levels are read; a third, or one that never ends, is an error."""
    digest = blobs.put(manifest())
    for depth in range(4):
        if depth < 3:
            assert blobs.find(digest).layers
        else:
            with pytest.raises(ImageError, match="levels deep"):
                blobs.find(digest)
        digest = blobs.put(index(entry(digest, "amd64")))


def test_an_index_that_contains_itself_is_refused(blobs: Blobs) -> None:
    """A cycle, which no honest digest can make, ends."""
    blobs[A] = json.dumps(index(entry(B, "amd64"))).encode()
    blobs[B] = json.dumps(index(entry(A, "amd64"))).encode()
    with pytest.raises(ImageError, match="contains itself"):
        blobs.find(A)


@pytest.mark.parametrize(
    ("document", "words"),
    [
        (b"", "no manifest that we can read"),
        (b"\xff\xfe", "no manifest that we can read"),
        (b"[" * 100_000, "no manifest that we can read"),
        (b" " * (MAX_BYTES + 1), "larger than 4 MiB"),
        ({"schemaVersion": 1, "fsLayers": []}, "schema version 1"),
        ({"schemaVersion": 2}, "neither an index nor a manifest"),
        (manifest(manifests=[]), "both an index and a manifest"),
        (manifest(mediaType=f"{OCI}index.v1+json"), "media type"),
        (index(mediaType=f"{OCI}manifest.v1+json"), "media type"),
        (manifest(config=None), "has no config"),
        (manifest(layers=None), "has no layers"),
        (manifest(layers=[descriptor(media_type="text/plain")]), "'text/plain'"),
        (manifest(layers=[descriptor(media_type=f"{OCI}layer.nondistributable.v1.tar")]), "media type"),
        (manifest(layers=[descriptor("md5:1234")]), "only sha256"),
        (manifest(layers=[descriptor("sha256:../../../etc/passwd")]), "only sha256"),
        (manifest(layers=[descriptor(A.upper())]), "only sha256"),
        (manifest(layers=[descriptor(size=-1)]), "-1 bytes"),
        (manifest(layers=[descriptor(size=1 << 60)]), "bytes"),
        (manifest(layers=[descriptor()] * 501), "501 layers"),
        (manifest(layers=[{"digest": A}]), "no manifest that we can read"),
        (manifest(layers={"a": 1}), "no manifest that we can read"),
        (manifest(config=descriptor(B, "application/vnd.wasm.config.v1+json")), "wasm"),
    ],
)
def test_what_is_no_manifest_is_one_clear_error(blobs: Blobs, document: object, words: str) -> None:
    """Broken, ambiguous, unknown and oversized documents are refused with the reason."""
    with pytest.raises(ImageError, match=words):
        blobs.find(blobs.put(document))


def configuration(**more: object) -> dict[str, object]:
    return {
        "architecture": "amd64",
        "os": "linux",
        "rootfs": {"type": "layers", "diff_ids": [A, C]},
    } | more


def test_a_configuration_is_read_with_all_that_a_run_may_want(blobs: Blobs) -> None:
    """Every field comes out; Docker's nulls are nothing, and text instead of a list is a shell command."""
    found = blobs.find(blobs.put(manifest()))
    run = {
        "Entrypoint": ["/entry"],
        "Cmd": "echo $HOME",
        "Env": ["A=1", "B="],
        "WorkingDir": "/srv",
        "User": "www-data:www-data",
        "StopSignal": "SIGQUIT",
        "Volumes": {"/data": {}, "/cache": {}},
        "ExposedPorts": {"80/tcp": {}, "53/udp": {}},
        "Labels": {"a": "b"},
        "Domainname": "",
        "OnBuild": None,
    }
    history = [{"created_by": "RUN x", "created": "2024-01-01T00:00:00Z"}, {"empty_layer": True}]
    read = read_configuration(json.dumps(configuration(config=run, history=history)).encode(), found)
    assert read.platform == AMD64
    assert read.diff_ids == (A, C)
    assert read.run.entrypoint == ("/entry",)
    assert read.run.cmd == ("/bin/sh", "-c", "echo $HOME")
    assert read.run.env == ("A=1", "B=")
    assert (read.run.cwd, read.run.user, read.run.stop_signal) == ("/srv", "www-data:www-data", "SIGQUIT")
    assert read.run.volumes == ("/cache", "/data")
    assert read.run.exposed_ports == ("53/udp", "80/tcp")
    assert read.run.labels == {"a": "b"}
    assert [step.empty_layer for step in read.history] == [False, True]
    empty = dict.fromkeys(run)
    read = read_configuration(json.dumps(configuration(config=empty, history=None)).encode(), found)
    assert (read.run.entrypoint, read.run.env, read.run.volumes, read.history) == ((), (), (), ())


@pytest.mark.parametrize(
    ("document", "words"),
    [
        (b"{}", "cannot read"),
        (b"null", "cannot read"),
        (b" " * (MAX_BYTES + 1), "larger than 4 MiB"),
        (configuration(os="windows"), "for windows"),
        (configuration(rootfs={"type": "layers", "diff_ids": [A]}), "2 layers, but 1 diff_ids"),
        (configuration(rootfs={"type": "layers", "diff_ids": [A, "sha256:.."]}), "no list of layers"),
        (configuration(rootfs={"type": "parts", "diff_ids": [A, C]}), "no list of layers"),
        (configuration(config={"Env": "A=1"}), "cannot read"),
        (configuration(config={"Env": ["A=1\0B=2"]}), "NUL"),
        (configuration(config={"Cmd": [1]}), "cannot read"),
    ],
)
def test_a_wrong_configuration_is_one_clear_error(blobs: Blobs, document: object, words: str) -> None:
    """Another system, missing or impossible layers and wrong types are refused with the reason."""
    found = blobs.find(blobs.put(manifest()))
    data = document if isinstance(document, bytes) else json.dumps(document).encode()
    with pytest.raises(ImageError, match=words):
        read_configuration(data, found)


@given(
    st.recursive(
        st.none() | st.booleans() | st.integers() | st.text() | st.sampled_from([A, LAYER]),
        lambda inner: (
            st.lists(inner, max_size=3)
            | st.dictionaries(
                st.sampled_from(
                    ["schemaVersion", "mediaType", "config", "layers", "manifests", "digest", "size"]
                ),
                inner,
                max_size=7,
            )
        ),
        max_leaves=12,
    )
)
def test_any_document_is_a_manifest_or_an_image_error(document: object) -> None:
    """No document makes anything but a manifest with sound digests, or one error."""
    blobs = Blobs()
    digest = blobs.put(document)
    try:
        found = find_manifest(lambda name: blobs.get(name, b""), digest, AMD64)
    except ImageError:
        return
    assert all(len(layer.digest) == 71 for layer in found.layers)


@pytest.mark.parametrize(
    ("text", "platform"),
    [
        ("linux/arm64", Platform("linux", "arm64")),
        ("arm64", Platform("linux", "arm64")),
        ("linux/arm/v7", Platform("linux", "arm", "v7")),
    ],
)
def test_platforms_are_read_as_docker_writes_them(text: str, platform: Platform) -> None:
    """OS, architecture and variant; the OS may be left out."""
    assert parse_platform(text) == platform
    assert parse_platform(str(platform)) == platform


@pytest.mark.parametrize(
    "text", ["", "/", "linux/", "windows/amd64", "a/b/c/d", "linux/AMD 64", "linux/../x"]
)
def test_a_wrong_platform_is_an_error(text: str) -> None:
    """Nothing else is a platform."""
    with pytest.raises(ImageError):
        parse_platform(text)
