"""What a policy lets in: by digest, by registry, by signature; and skopeo's words turned into ours."""

import json
from pathlib import Path

import pytest

from ringfence.errors import ImageError
from ringfence.image import rules
from ringfence.image.complaints import CutOff, explain
from ringfence.image.reference import parse
from ringfence.image.skopeo import accepts_anything, is_loopback
from ringfence.policy.load import load, override
from ringfence.policy.model import ImageRules

DIGEST = f"sha256:{'a0' * 32}"


def of(**fields: object) -> ImageRules:
    return override(load("untrusted"), {f"image.{key}": value for key, value in fields.items()}).image


def test_presets_let_every_image_in() -> None:
    """Without a rule any reference may come, and so may the host's own files."""
    rules.check(of(), parse("alpine"), shown="alpine")
    rules.check(of(), None, shown="host", local=True)


def test_a_digest_can_be_required() -> None:
    """A tag can be moved by whoever may push, a digest cannot; files of the host have none."""
    rules.check(of(digest_required=True), parse(f"a:1@{DIGEST}"), shown="a")
    for reference in (parse("a"), None):
        with pytest.raises(ImageError, match=r"image.digest_required asks for a digest; write NAME@sha256"):
            rules.check(of(digest_required=True), reference, shown="a")


@pytest.mark.parametrize(
    ("allowed", "text", "local", "words"),
    [
        (["example.com"], "example.com/team/app", False, ""),
        (["example.com/team"], "example.com/team/app:1", False, ""),
        (["example.com/team/app"], "example.com/team/app:1", False, ""),
        (["local"], "base", True, ""),
        (["example.com/team"], "example.com/teamx/app", False, "example.com is not where it may come from"),
        (["example.com"], "example.com:5000/app", False, "example.com:5000 is not where"),
        (["example.com"], "example.com.evil.test/app", False, "is not where it may come from"),
        (["example.com"], "alpine", False, "it names no registry; write REGISTRY/NAME"),
        (["local"], "alpine", False, "it names no registry"),
        (["example.com"], "example.com/app", True, "it is from this host, not from a registry"),
        (["example.com"], "oci:/x", False, "it is from this host, not from a registry; add local"),
        ([], "example.com/app", False, "image.allowed_registries has nothing"),
    ],
)
def test_only_listed_registries(allowed: list[str], text: str, local: bool, words: str) -> None:
    """Whole parts of a name count, a registry must be written out, and this host's own images are `local`."""
    if not words:
        rules.check(of(allowed_registries=allowed), parse(text), shown=text, local=local)
        return
    with pytest.raises(ImageError) as caught:
        rules.check(of(allowed_registries=allowed), parse(text), shown=text, local=local)
    assert words in str(caught.value)


def test_a_passed_check_counts_for_that_policy_alone(tmp_path: Path) -> None:
    """Other keys, another policy.json, name or digest: the image was not checked under those."""
    key, policy = tmp_path / "key", tmp_path / "policy.json"
    key.write_text("one")
    policy.write_text(
        json.dumps({"default": [{"type": "signedBy", "keyType": "GPGKeys", "keyPath": str(key)}]})
    )
    asked, images = of(signatures=str(policy)), str(tmp_path / "images")
    assert rules.files(str(policy)) == (str(policy), str(key))
    assert not rules.passed(images, asked, "a:1", DIGEST)
    rules.remember(images, asked, "a:1", DIGEST, registry=False)
    assert not rules.came_from_registry(images, "a:1", DIGEST)
    rules.remember(images, of(), "a:1", DIGEST, registry=True)
    assert rules.came_from_registry(images, "a:1", DIGEST)
    assert not rules.came_from_registry(images, "a:2", DIGEST)
    assert rules.passed(images, asked, "a:1", DIGEST)
    assert not rules.passed(images, asked, "a:2", DIGEST)
    assert not rules.passed(images, asked, "a:1", DIGEST.replace("a", "b"))
    key.write_text("two")
    assert not rules.passed(images, asked, "a:1", DIGEST)
    key.unlink()
    with pytest.raises(ImageError, match=r"cannot read .*key: No such file"):
        rules.passed(images, asked, "a:1", DIGEST)


def test_every_file_of_a_policy_json_counts(tmp_path: Path) -> None:
    """Certificates and keys of a transparency log decide as much as a key does."""
    names = ("keyPath", "caPath", "rekorPublicKeyPath", "caRootsPath", "a", "b")
    for name in names:
        (tmp_path / name).write_text(name)
    at = {name: str(tmp_path / name) for name in names}
    document = {
        "default": [{"type": "reject"}],
        "transports": {
            "docker": {
                "x": [
                    {"type": "signedBy", "keyPath": at["keyPath"]},
                    {
                        "type": "sigstoreSigned",
                        "fulcio": {"caPath": at["caPath"], "oidcIssuer": "/no/path"},
                        "rekorPublicKeyPath": at["rekorPublicKeyPath"],
                        "pki": {"caRootsPath": at["caRootsPath"]},
                        "keyPaths": [at["a"]],
                        "rekorPublicKeyPaths": [at["b"]],
                    },
                ]
            }
        },
    }
    policy = tmp_path / "policy.json"
    policy.write_text(json.dumps(document))
    assert rules.files(str(policy)) == (str(policy), *sorted(at.values()))
    asked, images = of(signatures=str(policy)), str(tmp_path / "images")
    for name in names:
        rules.remember(images, asked, "a:1", DIGEST, registry=False)
        assert rules.passed(images, asked, "a:1", DIGEST)
        (tmp_path / name).write_text("another")
        assert not rules.passed(images, asked, "a:1", DIGEST)


@pytest.mark.parametrize("text", ["", "{", "[" * 10_000])
def test_a_broken_policy_json_lets_nothing_pass(tmp_path: Path, text: str) -> None:
    """What cannot be read is no permission."""
    policy = tmp_path / "policy.json"
    policy.write_text(text)
    assert not accepts_anything(str(policy))
    with pytest.raises(ImageError, match=r"is no policy\.json"):
        rules.passed(str(tmp_path), of(signatures=str(policy)), "a:1", DIGEST)


@pytest.mark.parametrize(
    ("document", "free"),
    [
        ({"default": [{"type": "insecureAcceptAnything"}]}, True),
        (
            {
                "default": [{"type": "insecureAcceptAnything"}],
                "transports": {"docker-daemon": {"": [{"type": "insecureAcceptAnything"}]}},
            },
            True,
        ),
        ({"default": [{"type": "reject"}]}, False),
        (
            {
                "default": [{"type": "insecureAcceptAnything"}],
                "transports": {"docker": {"a.test": [{"type": "signedBy"}]}},
            },
            False,
        ),
        ({}, False),
    ],
)
def test_whether_signatures_are_asked_for(tmp_path: Path, document: object, free: bool) -> None:
    """Anything but an explicit "accept anything" throughout is a policy to be kept to the letter."""
    policy = tmp_path / "policy.json"
    policy.write_text(json.dumps(document))
    assert accepts_anything(str(policy)) == free
    assert not accepts_anything(str(tmp_path / "none"))


def test_plain_http_is_for_loopback_alone() -> None:
    """Only addresses of this host's loopback, as written: a name could lead anywhere."""
    for registry in ("localhost", "localhost:5000", "127.0.0.1", "127.1.2.3:80", "[::1]", "[::1]:5000"):
        assert is_loopback(registry), registry
    for registry in (
        "",
        "example.com",
        "127.0.0.1.evil.test",
        "127.evil.test:80",
        "0.0.0.0",
        "[::]:1",
        "128.0.0.1",
    ):
        assert not is_loopback(registry), registry


def test_no_secret_of_an_address_is_shown() -> None:
    """Signed addresses of a registry's storage and passwords stay out of errors, and so do control characters."""
    said = 'level=fatal msg="reading blob: Get \\"https://u:p@host/x?X-Sig=secret&y=1\\": unexpected EOF \x1b[31m"'
    error = explain("docker://a", said)
    assert isinstance(error, CutOff)
    assert "secret" not in str(error)
    assert "u:p" not in str(error)
    assert str(error).isprintable()


@pytest.mark.parametrize(
    ("said", "meaning", "again"),
    [
        ("write /x/oci-put-blob1: no space left on device", "the disk is full", False),
        ("received unexpected HTTP status: 503 Service Unavailable", "its registry failed", True),
        ("read tcp 127.0.0.1:1->127.0.0.1:2: read: connection reset by peer", "the connection was cut", True),
        ("dial tcp: lookup a.test: no such host", "host is not known", False),
        ("net/http: TLS handshake timeout", "cannot be reached", True),
        ("x509: certificate signed by unknown authority", "cannot be trusted", False),
        ("something never heard of", "something never heard of; these are skopeo's own words", False),
        (
            'level=fatal msg="1 error:\\n\\t* open /a: permission denied\\n"',
            "1 error:  * open /a: permission",
            False,
        ),
        ("", "it does not say why", False),
        ("y" * 5000, "...yyy", False),
    ],
)
def test_what_skopeo_says_is_explained(said: str, meaning: str, again: bool) -> None:
    """Causes are named in our words, with what to do; another try is made only where it may help."""
    error = explain("docker://a.test/b:1", said)
    assert meaning in str(error)
    assert str(error).startswith("cannot get docker://a.test/b:1: ")
    assert len(str(error)) < 700
    assert isinstance(error, CutOff) == again
