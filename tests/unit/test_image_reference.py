"""References: what users write, the one name of each in the store, and what is no reference."""

import os
import string

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ringfence.errors import ImageError
from ringfence.image.reference import canonical, decode, encode, parse, source

DIGEST = f"sha256:{'a0' * 32}"

NAMES = [
    ("alpine", "alpine:latest", "", "docker://alpine:latest"),
    ("docker://alpine:latest", "alpine:latest", "", "docker://alpine:latest"),
    ("team/app:1.2", "team/app:1.2", "", "docker://team/app:1.2"),
    (
        "registry.example.com/team/app:1.2",
        "registry.example.com/team/app:1.2",
        "registry.example.com",
        "docker://registry.example.com/team/app:1.2",
    ),
    ("localhost/a", "localhost/a:latest", "localhost", "docker://localhost/a:latest"),
    ("host:5000/a", "host:5000/a:latest", "host:5000", "docker://host:5000/a:latest"),
    ("host:5000", "host:5000", "", "docker://host:5000"),
    ("[::1]:5000/a:b", "[::1]:5000/a:b", "[::1]:5000", "docker://[::1]:5000/a:b"),
    (f"a@{DIGEST}", f"a@{DIGEST}", "", f"docker://a@{DIGEST}"),
    (f"a:1@{DIGEST}", f"a:1@{DIGEST}", "", f"docker://a@{DIGEST}"),
    ("a__b--c/d.e_f:G-_.1", "a__b--c/d.e_f:G-_.1", "", "docker://a__b--c/d.e_f:G-_.1"),
    ("docker:dind", "docker:dind", "", "docker://docker:dind"),
    ("docker://oci:1", "docker://oci:1", "", "docker://oci:1"),
    ("oci:/x/y", "oci:/x/y", "", "oci:/x/y"),
    ("oci:/x/../y:tag", "oci:/y:tag", "", "oci:/y:tag"),
    ("oci-archive:/a b.tar:1.2", "oci-archive:/a b.tar:1.2", "", "oci-archive:/a b.tar:1.2"),
    ("docker-archive:/x.tar:a/b:1", "docker-archive:/x.tar:a/b:1", "", "docker-archive:/x.tar:a/b:1"),
    ("dir:/root:fs", "dir:/root:fs", "", "dir:/root:fs"),
    ("containers-storage:app", "containers-storage:app:latest", "", "containers-storage:app:latest"),
    (
        "containers-storage:localhost/a:1",
        "containers-storage:localhost/a:1",
        "",
        "containers-storage:localhost/a:1",
    ),
]

WRONG = [
    ("", "it has no name"),
    ("docker://", "it has no name"),
    (":1", "it has no name"),
    ("Alpine", "'Alpine' has capitals; repositories are in small letters: alpine"),
    ("a b", "'a b' is not a part of a name"),
    ("a\nb", "cannot be printed"),
    ("a\x1b[31m", "cannot be printed"),
    ("a\udc80", "cannot be printed"),
    ("-a", "is not a part of a name"),
    ("a-", "is not a part of a name"),
    ("a..b", "is not a part of a name"),
    ("a___b", "is not a part of a name"),
    ("a._b", "is not a part of a name"),
    ("a/../b", "'..' is not a part of a name"),
    ("../b", "'..' is not a registry"),
    ("/a", "a part of the name is empty"),
    ("a//b", "a part of the name is empty"),
    ("a/", "a part of the name is empty"),
    ("é", "is not a part of a name"),
    ("a:", "'' is not a tag"),
    ("a:.b", "'.b' is not a tag"),
    ("a:-b", "'-b' is not a tag"),
    (f"a:{'b' * 129}", "is not a tag"),
    ("a:b:c", "'b:c' is not a tag"),
    ("a@", "'' is not a digest"),
    (f"a@{DIGEST[:-1]}", "is not a digest"),
    (f"a@{DIGEST.upper()}", "is not a digest"),
    (f"a@{DIGEST}@{DIGEST}", "is not a digest"),
    ("a@sha512:00", "only sha256 digests are known, not sha512"),
    ("a" * 64, "64 digits are an id, not a name"),
    ("a" * 300, "the name is longer than 255"),
    ("/".join(["ab"] * 80), "it is too long to be the name of an image here"),
    ("host:99999/a", "'host:99999' is not a registry"),
    ("host:/a", "'host:' is not a registry"),
    ("-h.com/a", "'-h.com' is not a registry"),
    ("h..com/a", "'h..com' is not a registry"),
    ("[::g]/a", "is not a registry"),
    ("user:password@host/a", "is not a digest"),
    ("https://example.com/a", "the transport https:// is not known; known: docker, oci"),
    ("docker-daemon:a", "the transport docker-daemon: cannot be read"),
    ("oci:", "it has no path; write oci:PATH"),
    ("dir:", "it has no path"),
    ("oci:/x:a b", "'a b' picks no image in it"),
    ("oci:/x\n:a", "cannot be printed"),
    ("containers-storage:[overlay@/x]a", "is not a digest"),
    ("--all", "is not a part of a name"),
]


@pytest.mark.parametrize(("text", "name", "registry", "asked"), NAMES)
def test_what_users_write(text: str, name: str, registry: str, asked: str) -> None:
    """Each way to write an image has one name in the store, and skopeo is asked for the same one."""
    reference = parse(text)
    assert (canonical(reference), reference.registry, source(reference)) == (name, registry, asked)
    assert canonical(parse(name)) == name
    assert decode(encode(name)) == name


@pytest.mark.parametrize(("text", "words"), WRONG)
def test_what_is_no_reference(text: str, words: str) -> None:
    """One line that says why not, and nothing of it can reach a terminal or another program as it is."""
    with pytest.raises(ImageError) as caught:
        parse(text)
    assert words in str(caught.value)
    assert str(caught.value).isprintable()
    assert len(str(caught.value)) < 800


def test_relative_paths_start_here() -> None:
    """The name of an image in a file is the same from wherever it is asked for."""
    assert canonical(parse("oci:here:1")) == f"oci:{os.getcwd()}/here:1"


PART = st.from_regex(r"[a-z0-9]{1,4}((\.|_|__|-{1,3})[a-z0-9]{1,3}){0,2}", fullmatch=True)
HOST = st.from_regex(r"([a-z0-9]{1,5}\.[a-z]{2,3}|localhost)(:[1-9][0-9]{0,3})?", fullmatch=True)
TAG = st.from_regex(r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,9}", fullmatch=True)


@given(st.none() | HOST, st.lists(PART, min_size=1, max_size=3), st.none() | TAG, st.booleans())
def test_what_the_grammar_makes_is_read_as_it_was_made(
    host: str | None, parts: list[str], tag: str | None, pinned: bool
) -> None:
    """The parts of a reference come out as they went in, and its name is a fixed point."""
    path = "/".join(parts)
    if host is None and len(parts) > 1 and ("." in parts[0] or parts[0] == "localhost"):
        host, path = parts[0], "/".join(parts[1:])
    text = (f"{host}/" if host else "") + path + (f":{tag}" if tag else "") + (f"@{DIGEST}" if pinned else "")
    try:
        reference = parse(text)
    except ImageError as error:
        assert "is not a registry" in str(error)  # "a__b.c/d": a part of a name, but no host
        return
    assert reference.registry == (host or "")
    assert reference.name == (f"{host}/" if host else "") + path
    assert (reference.tag, reference.digest) == (tag or "", DIGEST if pinned else "")
    assert canonical(parse(canonical(reference))) == canonical(reference)


@given(st.text(max_size=40) | st.text(string.ascii_letters + string.digits + "./:@-_[]%", max_size=40))
def test_any_text_is_a_reference_or_one_error(text: str) -> None:
    """No text makes anything else; what is accepted has a safe file name, and never begins as an option does."""
    try:
        name = canonical(parse(text))
    except ImageError as error:
        assert str(error).isprintable()
        return
    encoded = encode(name)
    assert decode(encoded) == name
    assert "/" not in encoded
    assert encoded[0] not in ".-"
    assert len(encoded) <= 255
    assert canonical(parse(name)) == name


@given(st.binary(max_size=40).map(os.fsdecode))
def test_file_names_lose_nothing(name: str) -> None:
    """Two names never share a file, whatever is in them."""
    assert decode(encode(name)) == name


@pytest.mark.parametrize("encoded", ["a/b", "a%2", "a%zz", "a%2f", "%41", "a b", "é", "a%", "% 1"])
def test_other_file_names_are_not_ours(encoded: str) -> None:
    """Only what `encode` makes is read back, so that no two files have one name."""
    with pytest.raises(ImageError, match="is not the file name of an image"):
        decode(encoded)
