"""Pulling from a real registry on loopback: what comes, what comes twice, what goes wrong on the way."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

import registry
from registry import Proxy
from ringfence.errors import ImageError, RingfenceError
from ringfence.image import store
from ringfence.image.pull import ensure, pull
from ringfence.image.record import ImageRecord
from ringfence.image.reference import canonical, parse
from ringfence.image.skopeo import host_policy
from ringfence.policy.load import load, override
from ringfence.policy.model import ImageRules

pytestmark = pytest.mark.requires("root", "skopeo", "umoci", "docker-registry")

COMMAND = [sys.executable, "-m", "ringfence", "image", "pull"]
NOISE_BYTES = 3 << 20  # does not shrink, so that there is something to cut


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """OCI layouts by name: `base`, `app` upon it, `large` and `arm`."""
    home = tmp_path_factory.mktemp("images")
    layout = home / "layout"
    base = registry.layer_of(home / "base.tar", ["/usr/bin/true", "/usr/bin/env", "/etc/passwd"])
    app = registry.layer_of(home / "app.tar", ["/usr/bin/id"], extra={"app/version": b"1"})
    large = registry.layer_of(home / "large.tar", [], extra={"noise": os.urandom(NOISE_BYTES)})
    return {
        "base": registry.layout(layout, "base", [base], "--config.cmd", "/usr/bin/true"),
        "app": registry.layout(layout, "app", [base, app], "--config.cmd", "/usr/bin/id"),
        "large": registry.layout(layout, "large", [base, large]),
        "arm": registry.layout(layout, "arm", [app], "--architecture", "arm64"),
    }


@pytest.fixture(scope="module")
def port(images: dict[str, str], tmp_path_factory: pytest.TempPathFactory) -> Iterator[int]:
    """A registry with all of them, each as an OCI image and (v2s2) in Docker's format."""
    with registry.registry(tmp_path_factory.mktemp("registry")) as found:
        for name, image in images.items():
            registry.push(image, found, f"oci/{name}:1")
        registry.push(images["app"], found, "docker/app:1", "--format", "v2s2")
        registry.push(images["base"], found, "many/app:amd64")
        registry.push(images["arm"], found, "many/app:arm64")
        registry.put_index(found, "many/app", "1", {"linux/arm64": "arm64", "linux/amd64": "amd64"})
        registry.put_index(found, "many/app", "arm", {"linux/arm64": "arm64"})
        yield found


@pytest.fixture(scope="module")
def the_proxy(port: int) -> Iterator[Proxy]:
    proxy = Proxy(port)
    yield proxy
    proxy.close()


@pytest.fixture
def proxy(the_proxy: Proxy) -> Proxy:
    the_proxy.forget()
    return the_proxy


@pytest.fixture
def state(tmp_path: Path) -> str:
    path = tmp_path / "state"
    path.mkdir(mode=0o700)
    return str(path)


def pulled(state: str, text: str, **options: object) -> ImageRecord:
    return pull(state, parse(text), **options)  # type: ignore[arg-type]


def fails(state: str, text: str, *words: str, **options: object) -> str:
    """Pull what cannot be pulled; return the one line, after a look at the store."""
    with pytest.raises(RingfenceError) as caught:
        pulled(state, text, **options)
    line = str(caught.value)
    assert all(word in line for word in words), line
    assert line.isprintable()
    if os.path.isdir(os.path.join(state, "images")):
        assert store.resolve(state, canonical(parse(text))) is None
        assert unfinished(state) == []
    return line


def unfinished(state: str) -> list[str]:
    return [name for name in os.listdir(store.images_dir(state)) if name.startswith(".")]


def whole(state: str, record: ImageRecord) -> None:
    """Every blob is what its name says, and every layer is unpacked."""
    for digest in record.blobs():
        found = registry.run("sha256sum", store.blob_path(state, digest)).split()[0].decode()
        assert f"sha256:{found}" == digest
    for layer in record.layers:
        assert os.path.isdir(os.path.join(store.layer_path(state, layer.diff_id), "fs"))


def rules(**fields: object) -> ImageRules:
    return override(load("untrusted"), {f"image.{key}": value for key, value in fields.items()}).image


# -- what comes ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "tag"), [("oci/app", "1"), ("docker/app", "1"), ("many/app", "1")])
def test_an_image_keeps_the_digest_of_its_registry(port: int, state: str, name: str, tag: str) -> None:
    """OCI or Docker's format, alone or out of an index: the manifest here is the registry's, byte for byte."""
    record = pulled(state, f"127.0.0.1:{port}/{name}:{tag}")
    wanted = registry.manifest_of(port, name, "amd64" if name == "many/app" else tag)
    assert (record.digest, record.manifest_media_type) == wanted[:2]
    assert Path(store.blob_path(state, record.digest)).read_bytes() == wanted[2]
    assert record.config.cmd
    assert str(record.platform) == "linux/amd64"
    whole(state, record)
    assert unfinished(state) == []


def test_the_platform_picks_from_an_index(port: int, state: str) -> None:
    """--platform is what is fetched, and an index without it says what it has."""
    record = pulled(state, f"127.0.0.1:{port}/many/app:1", platform="linux/arm64")
    assert record.digest == registry.manifest_of(port, "many/app", "arm64")[0]
    fails(state, f"127.0.0.1:{port}/many/app:arm", "not there for linux/amd64", "linux/arm64; --platform")
    line = fails(state, f"127.0.0.1:{port}/oci/arm:1", "is for linux/arm64, not for linux/amd64")
    assert "--platform" in line


def test_a_digest_is_a_name(port: int, state: str) -> None:
    """Of a manifest and of an index; a tag beside it says nothing; another digest is not there."""
    digest = registry.manifest_of(port, "oci/app", "1")[0]
    index = registry.manifest_of(port, "many/app", "1")[0]
    assert pulled(state, f"127.0.0.1:{port}/oci/app:none@{digest}").digest == digest
    assert pulled(state, f"127.0.0.1:{port}/many/app@{index}").digest != index
    fails(state, f"127.0.0.1:{port}/oci/app@{digest[:-4]}0000", "there is no such image")


def test_what_is_here_is_not_fetched_again(state: str, proxy: Proxy) -> None:
    """A second pull asks for the manifest alone; an image on the same base fetches its own layers alone."""
    base = pulled(state, f"127.0.0.1:{proxy.port}/oci/base:1")
    assert set(proxy.blobs) == base.blobs() - {base.digest}
    proxy.forget()
    assert pulled(state, f"127.0.0.1:{proxy.port}/oci/base:1") == base
    assert proxy.blobs == []
    app = pulled(state, f"127.0.0.1:{proxy.port}/oci/app:1")
    assert set(proxy.blobs) == app.blobs() - base.blobs() - {app.digest}
    proxy.forget()
    again = pulled(state, f"127.0.0.1:{proxy.port}/docker/app:1")
    assert not {layer.digest for layer in again.layers} & set(proxy.blobs)


def test_a_tag_that_moved_is_followed(images: dict[str, str], port: int, state: str) -> None:
    """`always` asks the registry, `missing` is content with what is here, `never` asks nobody."""
    reference = parse(registry.push(images["base"], port, "moving/app:1"))
    with pytest.raises(ImageError, match=r"moving/app:1' is not here; .*--pull missing fetches it"):
        ensure(state, reference, how="never")
    name = ensure(state, reference)
    first = store.resolve(state, name)
    registry.push(images["app"], port, "moving/app:1")
    for how in ("missing", "never"):
        assert ensure(state, reference, how=how) == name
        assert store.resolve(state, name) == first
    ensure(state, reference, how="always")
    assert store.resolve(state, name) == registry.manifest_of(port, "moving/app", "1")[0] != first


def test_a_damaged_blob_is_fetched_again(state: str, proxy: Proxy) -> None:
    """Bits that rotted in the store are noticed and replaced, never unpacked."""
    text = f"127.0.0.1:{proxy.port}/oci/app:1"
    record = pulled(state, text)
    blob = store.blob_path(state, record.layers[0].digest)
    Path(blob).write_bytes(b"\0" * record.layers[0].size_bytes)
    shutil.rmtree(store.layer_path(state, record.layers[0].diff_id))
    proxy.forget()
    os.truncate(blob, 10)
    whole(state, pulled(state, text))
    assert {layer.digest for layer in record.layers} & set(proxy.blobs) == {record.layers[0].digest}


@pytest.mark.parametrize("transport", ["oci", "oci-archive", "docker-archive"])
def test_other_tools_files(images: dict[str, str], state: str, tmp_path: Path, transport: str) -> None:
    """OCI layouts and the archives of docker and podman, by path; the layers are those of the layout."""
    source = images["app"]
    if transport != "oci":
        source = f"{transport}:{tmp_path}/image.tar:app:1"
        registry.run("skopeo", "copy", "-q", "--insecure-policy", images["app"], source)
    record = pulled(state, source)
    assert record.config.cmd == ("/usr/bin/id",)
    assert len(record.layers) == 2
    whole(state, record)
    assert store.resolve(state, source) == record.digest
    fails(state, f"{transport}:{tmp_path}/none", "no image can be read there", "check the path")


def test_what_podman_has(
    images: dict[str, str], state: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An image in the storage of podman and buildah is taken from there, without a registry."""
    conf = tmp_path / "storage.conf"
    conf.write_text(
        f'[storage]\ndriver = "vfs"\ngraphroot = "{tmp_path}/graph"\nrunroot = "{tmp_path}/run"\n'
    )
    monkeypatch.setenv("CONTAINERS_STORAGE_CONF", str(conf))
    registry.run(
        "skopeo", "copy", "-q", "--insecure-policy", images["app"], "containers-storage:localhost/app:1"
    )
    record = pulled(state, "containers-storage:localhost/app:1")
    assert record.config.cmd == ("/usr/bin/id",)
    whole(state, record)
    fails(state, "containers-storage:localhost/app:2", "there is no such image in this storage")


def test_an_ordinary_user_pulls(port: int) -> None:
    """Into a store of his own, without a login session."""
    state = tempfile.mkdtemp(prefix="ringfence-pull-")  # not pytest's, which only root can pass through
    os.chown(state, 65534, 65534)
    environment = {key: value for key, value in os.environ.items() if key != "XDG_RUNTIME_DIR"}
    try:
        user = ("setpriv", "--reuid=65534", "--regid=65534", "--clear-groups")
        done = subprocess.run(
            [*user, *COMMAND, f"127.0.0.1:{port}/oci/app:1"],
            env={**environment, "HOME": state, "RINGFENCE_STATE_DIR": state},
            capture_output=True,
            check=False,
        )
        assert done.returncode == 0, done.stderr
        digest = done.stdout.decode().strip()
        assert digest == registry.manifest_of(port, "oci/app", "1")[0]
        whole(state, store.read_record(state, digest))
    finally:
        shutil.rmtree(state)


# -- registries.conf, logins, TLS ------------------------------------------------------------------------------------


@pytest.mark.requires("htpasswd")
def test_logins_of_other_tools(
    images: dict[str, str], state: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without a login one line says so; with one in docker's or podman's file it works."""
    secret = registry.run("htpasswd", "-Bbn", "user", "password").decode().strip()
    (tmp_path / "htpasswd").write_text(f"{secret}\n")
    more = f"auth: {{htpasswd: {{realm: test, path: {tmp_path}/htpasswd}}}}"
    monkeypatch.setenv("HOME", str(tmp_path))
    with registry.registry(tmp_path / "registry", more=more) as port:
        registry.push(images["base"], port, "app:1", "--dest-creds=user:password")
        fails(state, f"127.0.0.1:{port}/app:1", "refuses it to this user", "skopeo login")
        docker = tmp_path / ".docker" / "config.json"
        docker.parent.mkdir()
        for password, good in (("wrong", False), ("password", True)):
            auth = registry.run(
                "python3", "-c", f"import base64; print(base64.b64encode(b'user:{password}').decode())"
            )
            docker.write_text(json.dumps({"auths": {f"127.0.0.1:{port}": {"auth": auth.decode().strip()}}}))
            if good:
                assert pulled(state, f"127.0.0.1:{port}/app:1").layers
            else:
                line = fails(state, f"127.0.0.1:{port}/app:1", "refuses it to this user")
                assert "wrong" not in line
        podman = tmp_path / "auth.json"
        docker.rename(podman)
        monkeypatch.setenv("REGISTRY_AUTH_FILE", str(podman))
        assert pulled(state, f"127.0.0.1:{port}/app:1", name="again:1").layers


@pytest.mark.requires("openssl")
def test_tls_is_verified_except_on_loopback(
    images: dict[str, str], state: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """0.0.0.0 leads here too, but is not written as loopback: its certificate must be vouched for."""
    key, certificate = tmp_path / "key.pem", tmp_path / "cert.pem"
    self_signed = (
        "openssl",
        "req",
        "-x509",
        "-newkey",
        "ec",
        "-pkeyopt",
        "ec_paramgen_curve:P-256",
        "-nodes",
    )
    names = ("-subj", "/CN=test", "-addext", "subjectAltName=IP:0.0.0.0,IP:127.0.0.1")
    registry.run(*self_signed, *names, "-days", "2", "-keyout", key, "-out", certificate)
    monkeypatch.setenv("HOME", str(tmp_path))
    tls = f", tls: {{certificate: {certificate}, key: {key}}}"
    with registry.registry(tmp_path / "registry", certificate=tls) as port:
        registry.push(images["base"], port, "app:1")
        assert pulled(state, f"127.0.0.1:{port}/app:1").layers
        fails(state, f"0.0.0.0:{port}/app:1", "the TLS connection", "certs.d")
        trusted = tmp_path / ".config" / "containers" / "certs.d" / f"0.0.0.0:{port}"
        trusted.mkdir(parents=True)
        shutil.copy(certificate, trusted / "ca.crt")
        assert pulled(state, f"0.0.0.0:{port}/app:1").layers


def test_registries_conf_is_honoured(
    port: int, state: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Plain HTTP beyond loopback and another place for a name: only what that file says."""
    text = f"0.0.0.0:{port}/oci/base:1"
    fails(state, text, "its registry speaks plain HTTP", "insecure = true", "registries.conf")
    conf = tmp_path / ".config" / "containers" / "registries.conf"
    conf.parent.mkdir(parents=True)
    conf.write_text(
        f'[[registry]]\nlocation = "0.0.0.0:{port}"\ninsecure = true\n'
        f'[[registry]]\nprefix = "images.test/team"\nlocation = "127.0.0.1:{port}/oci"\ninsecure = true\n'
    )
    monkeypatch.setenv("HOME", str(tmp_path))
    digest = registry.manifest_of(port, "oci/base", "1")[0]
    assert pulled(state, text).digest == digest
    assert pulled(state, "images.test/team/base:1").digest == digest


# -- rules of the policy ---------------------------------------------------------------------------------------------


def test_rules_come_before_the_registry(state: str, proxy: Proxy) -> None:
    """What the policy does not allow is not even asked for."""
    text = f"127.0.0.1:{proxy.port}/oci/base:1"
    fails(state, text, "image.digest_required", rules_of=rules(digest_required=True))
    fails(state, text, "where it may come from", rules_of=rules(allowed_registries=["example.com"]))
    assert proxy.requests == 0
    assert pulled(state, text, rules_of=rules(allowed_registries=[f"127.0.0.1:{proxy.port}/oci"])).layers


def test_what_is_here_is_checked_too(port: int, state: str) -> None:
    """An image fetched freely does not run under rules that it breaks."""
    reference = parse(f"127.0.0.1:{port}/oci/base:1")
    ensure(state, reference)
    with pytest.raises(ImageError, match="where it may come from"):
        ensure(state, reference, rules_of=rules(allowed_registries=["example.com"]))


@pytest.mark.requires("gpg")
def test_signatures_are_checked_by_policy_json(
    images: dict[str, str], port: int, state: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An unsigned image is not let in, a signed one is, and one fetched without the check does not count."""
    gnupg = tmp_path / "g"
    gnupg.mkdir(mode=0o700)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("GNUPGHOME", str(gnupg))
    try:
        registry.run(
            *["gpg", "--batch", "--passphrase=", "--quick-gen-key", "signer@test", "ed25519", "sign", "never"]
        )
        (tmp_path / "key.gpg").write_bytes(registry.run("gpg", "--export", "signer@test"))
        lookaside = tmp_path / ".config" / "containers" / "registries.d"
        lookaside.mkdir(parents=True)
        (lookaside / "test.yaml").write_text(
            f"default-docker:\n  sigstore: file://{tmp_path}/signatures\n"
            f"  sigstore-staging: file://{tmp_path}/signatures\n"
        )
        text = f"127.0.0.1:{port}/signed/app:1"
        unsigned = f"127.0.0.1:{port}/oci/app:1"
        registry.push(images["app"], port, "signed/app:1", "--format", "v2s2", "--sign-by", "signer@test")
    finally:
        subprocess.run(["gpgconf", "--kill", "all"], check=False)
    signed_by = {"type": "signedBy", "keyType": "GPGKeys", "keyPath": str(tmp_path / "key.gpg")}
    policy = tmp_path / "policy.json"
    policy.write_text(json.dumps({"default": [signed_by]}))
    asked = rules(signatures=str(policy))

    fails(state, unsigned, "the policy for signatures does not let it in", rules_of=asked)
    ensure(state, parse(unsigned))
    with pytest.raises(ImageError, match="was not fetched under"):
        ensure(state, parse(unsigned), how="never", rules_of=asked)
    pulled(state, images["app"], name="mine:1")
    with pytest.raises(ImageError, match="'mine:1' was not fetched under"):
        ensure(state, parse("mine:1"), rules_of=asked)
    with pytest.raises(ImageError, match="does not let it in"):
        ensure(state, parse(unsigned), rules_of=asked)

    name = ensure(state, parse(text), rules_of=asked)
    whole(state, store.read_record(state, str(store.resolve(state, name))))
    assert ensure(state, parse(text), how="never", rules_of=asked) == name
    policy.write_text(json.dumps({"default": [signed_by, {"type": "reject"}]}))
    with pytest.raises(ImageError, match="was not fetched under"):
        ensure(state, parse(text), how="never", rules_of=asked)


def test_the_policy_json_of_the_host_holds(
    port: int, state: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What the user's other tools refuse, Ringfence refuses, without a word in its own policy."""
    monkeypatch.setenv("HOME", str(tmp_path))
    own = tmp_path / ".config" / "containers" / "policy.json"
    own.parent.mkdir(parents=True)
    own.write_text('{"default": [{"type": "reject"}]}')
    assert host_policy() == str(own)
    fails(state, f"127.0.0.1:{port}/oci/base:1", "the policy for signatures does not let it in")


# -- what goes wrong -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("status", "words"),
    [
        (401, "refuses it to this user"),
        (403, "refuses it to this user"),
        (404, "there is no such image"),
        (429, "too many requests"),
        (500, "its registry failed"),
        (503, "its registry failed"),
    ],
)
def test_answers_that_are_no_image(state: str, proxy: Proxy, status: int, words: str) -> None:
    """Each is one line; for a moment's failure three tries are made."""
    proxy.fault = lambda _method, path: status if "/manifests/" in path else None
    said: list[str] = []
    fails(state, f"127.0.0.1:{proxy.port}/oci/base:1", words, say=said.append)
    assert len([line for line in said if "trying again" in line]) == (2 if status >= 500 else 0)


@pytest.mark.parametrize("text", ["no-such-host.invalid/a:1", "127.0.0.1:1/a:1"])
def test_nobody_there(state: str, text: str) -> None:
    """A host that is not known, or where nothing listens."""
    fails(state, text, "registry", "check")


def test_an_unknown_tag(port: int, state: str) -> None:
    """Neither tag nor repository: the same line."""
    fails(state, f"127.0.0.1:{port}/oci/base:none", "there is no such image", "check name and tag")
    fails(state, f"127.0.0.1:{port}/none:1", "there is no such image")


def test_a_cut_connection_is_tried_again(state: str, proxy: Proxy) -> None:
    """Cut twice in the middle of a layer: the third try brings it, and nothing that had come comes again."""
    cuts = []

    def fault(_method: str, path: str) -> list[int] | None:
        if registry.blob_path(path) and large in path and len(cuts) < 2:
            cuts.append(path)
            return [NOISE_BYTES // 3]
        return None

    manifest = json.loads(registry.manifest_of(proxy.upstream, "oci/large", "1")[2])
    large = max(manifest["layers"], key=lambda layer: layer["size"])["digest"]
    proxy.fault = fault
    said: list[str] = []
    record = pulled(state, f"127.0.0.1:{proxy.port}/oci/large:1", say=said.append)
    whole(state, record)
    assert len([line for line in said if "the connection was cut" in line]) == len(cuts) == 2
    assert proxy.blobs.count(record.layers[0].digest) == 1


def test_a_connection_that_is_always_cut(state: str, proxy: Proxy) -> None:
    """Three tries, then one line; the name does not exist."""
    proxy.fault = lambda _method, path: [1000] if registry.blob_path(path) else None
    fails(state, f"127.0.0.1:{proxy.port}/oci/large:1", "the connection was cut", "try again")


def test_a_full_disk_and_a_read_only_store(images: dict[str, str], port: int, tmp_path: Path) -> None:
    """One line before anything is fetched where the size is known, else when it happens; then nothing is left."""
    small = tmp_path / "small"
    small.mkdir()
    registry.run("mount", "-t", "tmpfs", "-o", "size=1m,mode=700", "none", small)
    try:
        state = str(small)
        fails(state, f"127.0.0.1:{port}/oci/large:1", "the image needs 3 MiB", "ringfence image prune")
        fails(state, images["large"], "the disk is full", "ringfence image prune")
        registry.run("mount", "-o", "remount,ro", small)
        with pytest.raises(ImageError, match="Read-only file system; set RINGFENCE_STATE_DIR"):
            pulled(state, f"127.0.0.1:{port}/oci/base:1")
    finally:
        registry.run("umount", small)


def test_a_bad_manifest(images: dict[str, str], port: int, state: str) -> None:
    """Media types that are no image of a file system are refused before a layer is fetched."""
    import http.client

    registry.push(images["base"], port, "bad/app:1")
    _, kind, data = registry.manifest_of(port, "bad/app", "1")
    document = json.loads(data)
    document["layers"][0]["mediaType"] = "application/vnd.example.squashfs"
    connection = http.client.HTTPConnection("127.0.0.1", port)
    connection.request("PUT", "/v2/bad/app/manifests/2", json.dumps(document), {"Content-Type": kind})
    assert connection.getresponse().status == 201
    connection.close()
    fails(state, f"127.0.0.1:{port}/bad/app:2", "the media type 'application/vnd.example.squashfs'")


def test_silence_is_not_waited_for(state: str, proxy: Proxy, monkeypatch: pytest.MonkeyPatch) -> None:
    """A connection that stays open and brings nothing is given up; the time is shortened here."""
    monkeypatch.setattr("ringfence.image.skopeo.SILENCE_S", 0.5)
    proxy.bytes_per_s = 1000
    fails(state, f"127.0.0.1:{proxy.port}/oci/large:1", "cannot be reached", "nothing came for")


def test_names_of_this_host_are_not_for_registries(images: dict[str, str], port: int, state: str) -> None:
    """Who takes the name of a local image in a registry does not get it run in its place."""
    for name in ("base", "host:latest"):
        fails(state, name, "is made on this host, not pulled")
    pulled(state, images["base"], name="mine:1")
    with pytest.raises(ImageError, match="'mine:1' is here for linux/amd64, not for linux/arm64"):
        ensure(state, parse("mine:1"), platform="linux/arm64")
    with pytest.raises(ImageError, match="from this host, not from a registry; add local"):
        ensure(state, parse("mine:1"), rules_of=rules(allowed_registries=["example.com"]))
    assert ensure(state, parse("mine:1"), rules_of=rules(allowed_registries=["local"])) == "mine:1"


# -- many at once, and killed ----------------------------------------------------------------------------------------


def start(state: str, text: str) -> "subprocess.Popen[bytes]":
    return subprocess.Popen(
        [*COMMAND, text],
        env={**os.environ, "RINGFENCE_STATE_DIR": state},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )


def test_several_at_once_do_the_work_once(state: str, proxy: Proxy) -> None:
    """Three processes want one image: each blob is fetched once, and all three have it."""
    proxy.bytes_per_s = 4 << 20
    processes = [start(state, f"127.0.0.1:{proxy.port}/oci/large:1") for _ in range(3)]
    outputs = [process.communicate(timeout=60) for process in processes]
    assert [process.returncode for process in processes] == [0, 0, 0], outputs
    assert len({out for out, _ in outputs}) == 1
    assert sorted(proxy.blobs) == sorted(set(proxy.blobs))
    assert b"waiting for another pull" in b"".join(said for _, said in outputs)


def test_a_killed_pull_leaves_a_store_that_works(state: str, proxy: Proxy) -> None:
    """kill -9 at several moments: no image, no skopeo, nothing to trip over; the next pull brings it whole."""
    text = f"127.0.0.1:{proxy.port}/oci/large:1"
    proxy.bytes_per_s = 2 << 20
    for wanted_bytes in (0, NOISE_BYTES // 4, NOISE_BYTES // 2):
        proxy.blob_bytes = 0
        process = start(state, text)
        end = time.monotonic() + 30
        while time.monotonic() < end and proxy.blob_bytes <= wanted_bytes and process.poll() is None:
            time.sleep(0.01)
        process.send_signal(signal.SIGKILL)
        process.communicate()
        assert store.resolve(state, text) is None
    while skopeos(state):
        assert time.monotonic() < end
        time.sleep(0.01)
    proxy.forget()
    whole(state, pulled(state, text))
    assert unfinished(state) == []


def skopeos(state: str) -> list[str]:
    """Return the processes that work in `state`."""
    found = []
    for process in filter(str.isdigit, os.listdir("/proc")):
        try:
            if state.encode() in Path(f"/proc/{process}/cmdline").read_bytes():
                found.append(process)
        except OSError:
            continue
    return found


def test_a_polite_kill_cleans_up(state: str, proxy: Proxy) -> None:
    """SIGTERM: status 130, and the unfinished part is gone at once."""
    proxy.bytes_per_s = 1 << 20
    process = start(state, f"127.0.0.1:{proxy.port}/oci/large:1")
    while proxy.blob_bytes < 1000:
        time.sleep(0.01)
        assert process.poll() is None
    process.terminate()
    _, said = process.communicate(timeout=20)
    assert process.returncode == 130
    assert b"interrupted" in said
    assert unfinished(state) == []


def test_a_bar_on_a_terminal(state: str, proxy: Proxy) -> None:
    """Bytes come with a bar there, which is wiped at the end."""
    proxy.bytes_per_s = 4 << 20
    ours, theirs = os.openpty()
    try:
        process = subprocess.Popen(
            [*COMMAND, f"127.0.0.1:{proxy.port}/oci/large:1"],
            env={**os.environ, "RINGFENCE_STATE_DIR": state, "TERM": "xterm"},
            stdout=subprocess.DEVNULL,
            stderr=theirs,
        )
        os.close(theirs)
        seen = b""
        try:
            while data := os.read(ours, 4096):
                seen += data
        except OSError:  # EIO: the other end is closed
            pass
        assert process.wait() == 0
    finally:
        os.close(ours)
    assert re.search(rb"\r\[#+ +\] [0-9.]+ of 3\.[0-9] MB", seen)
    assert seen.rstrip().endswith(b"MB")
    assert seen.rpartition(b"\r\x1b[K")[2].startswith(b"image: ")


# -- the command -----------------------------------------------------------------------------------------------------


def command(state: str, *arguments: str) -> tuple[int, str, str]:
    done = subprocess.run(
        [*COMMAND, *arguments],
        env={**os.environ, "RINGFENCE_STATE_DIR": state},
        capture_output=True,
        text=True,
        check=False,
    )
    return done.returncode, done.stdout, done.stderr


def test_the_command(port: int, state: str, tmp_path: Path) -> None:
    """The digest alone on standard output, what goes on beside it; --json is the record; --quiet is quiet."""
    text, digest = f"127.0.0.1:{port}/oci/app:1", registry.manifest_of(port, "oci/app", "1")[0]
    status, out, said = command(state, text)
    assert (status, out) == (0, f"{digest}\n")
    assert said.splitlines()[-1].startswith(f"image: {text}: linux/amd64, 2 layers, ")
    assert "\x1b" not in said
    assert command(state, "--quiet", text) == (0, f"{digest}\n", "")
    status, out, _ = command(state, "--json", text)
    assert (status, json.loads(out)["digest"]) == (0, digest)
    policy = tmp_path / "policy.yaml"
    policy.write_text("image: {digest_required: true}\n")
    status, out, said = command(state, "-q", "--policy", str(policy), text)
    assert (status, out) == (125, "")
    assert said.count("\n") == 1
    assert "image.digest_required" in said
    for bad in ("Alpine", "dir:/", "--platform=windows/amd64 alpine"):
        status, out, said = command(state, "-q", *bad.split())
        assert (status, out, said.count("\n")) == (125, "", 1), said
