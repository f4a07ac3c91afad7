"""Untrusted YAML: the scalar rules of 1.2, places, and bounds on everything."""

import json
import os
import tempfile
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ringfence.errors import PolicyError
from ringfence.policy import document
from ringfence.policy.document import Node, parse


def plain(node: Node) -> object:
    """Return a node without places."""
    if isinstance(node.value, list):
        return [plain(item) for item in node.value]
    if isinstance(node.value, dict):
        return {key: plain(item) for key, item in node.value.items()}
    return node.value


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("22:22", "22:22"),
        ("1000:1000", "1000:1000"),
        ("on", "on"),
        ("no", "no"),
        ("y", "y"),
        ("true", True),
        ("False", False),
        ("null", None),
        ("~", None),
        ("017", 17),
        ("0o17", 15),
        ("0x1F", 31),
        ("1_000", "1_000"),
        ("1e3", 1000.0),
        ("1.5", 1.5),
        ("2001-01-01", "2001-01-01"),
        ("'7'", "7"),
        ("=", "="),
    ],
)
def test_scalars_follow_yaml_1_2(text: str, value: object) -> None:
    """What YAML 1.1 turns into booleans, sexagesimals and dates is plain text."""
    found = plain(parse(f"a: {text}".encode(), "f"))
    assert found == {"a": value}
    assert isinstance(found, dict)
    assert type(found["a"]) is type(value)


def test_places_are_lines_and_columns_from_one() -> None:
    """Every node knows where it starts, also behind a byte order mark and umlauts."""
    root = parse("\ufeffä: 1\nb: [x, {c: y}]\n".encode(), "f.yaml")
    assert isinstance(root.value, dict)
    assert str(root.keys["ä"]) == "f.yaml:1:1"
    items = root.value["b"].value
    assert isinstance(items, list)
    assert str(items[0].place) == "f.yaml:2:5"
    assert str(items[1].keys["c"]) == "f.yaml:2:9"


def test_anchors_and_aliases() -> None:
    """An alias stands for its anchor's value."""
    assert plain(parse(b"a: &x [1, 2]\nb: *x\n", "f")) == {"a": [1, 2], "b": [1, 2]}


BOMB = "a0: &a0 [x,x,x,x,x,x,x,x,x]\n" + "".join(
    f"a{i}: &a{i} [{','.join([f'*a{i - 1}'] * 9)}]\n" for i in range(1, 9)
)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (BOMB, "more than 10000 values once aliases are expanded"),
        ("a: &x [*x]", "f:1:8: alias .x has no earlier complete &x"),
        ("a: *y", "f:1:4: alias .y"),
        ("a: " + "[" * 900, "nested deeper than 16"),
        ("a: " + "[" * 300_000, "maximum nesting depth"),
        ("a: 1\nb: 2\na: 3", "f:3:1: key 'a' is written twice, first at line 1"),
        ("{" + "".join(f"k{i}: 1, " for i in range(9_000)) + "}", "more than 10000 values"),
        ("a: !!python/object/apply:os.system [id]", "f:1:4: YAML tags are not used"),
        ("a: !x 1", "f:1:4: YAML tags"),
        ("a: 1\n\tb: 2", "f:2:1: not YAML: .*spaces, not tabs"),
        ("a: {b: 1", "f:2:1: not YAML|f:1:9: not YAML"),
        ("a: 1\n---\nb: 1", "f:2:1: a second document"),
        ("[a]: 1", "f:1:1: a key must be plain text"),
        ("- a", "f:1:1: a policy is a mapping"),
        ("", "f: empty"),
        ("# only words\n", "f: empty"),
        ("a: \x1b[31m", "f:1:4: control character"),
        ("a: 'b\\n'\nc: \"d\\n\"", "f:2:4: control character"),
        ("a: |\n  two\n  lines\n", "f:1:4: control character"),
        ('a: "\u202e"', "f:1:4: control character"),
        ("a: " + "x" * 5000, "f:1:4: text longer than 4096"),
        ("a: \0", "f: binary data"),
        ("a: " + "x" * (1 << 20), "f: larger than 1 MiB"),
    ],
    ids=lambda value: value[:20] if isinstance(value, str) else None,
)
def test_bad_documents(text: str, words: str) -> None:
    """Each is one clear line, with its place where there is one."""
    with pytest.raises(PolicyError, match=words) as error:
        parse(text.encode(), "f")
    assert "\n" not in str(error.value)


def test_not_utf8_names_the_line() -> None:
    """Other encodings are refused with the line where they begin."""
    with pytest.raises(PolicyError, match="f:2: not UTF-8"):
        parse(b"a: 1\nb: \xff", "f")


JSON = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**63), 2**63)
    | st.text("abcdeXY z:-#'\"\\[]{}&*!|>%@`?,é/.", max_size=9),
    lambda inner: (
        st.lists(inner, max_size=4) | st.dictionaries(st.text("abc:# ", min_size=1), inner, max_size=4)
    ),
    max_leaves=12,
)


@settings(deadline=None)
@given(st.dictionaries(st.text("abc:# ", min_size=1), JSON, min_size=1, max_size=4))
def test_json_is_read_as_json(value: dict[str, object]) -> None:
    """The same reader serves JSON files: what json writes is what is read."""
    assert plain(parse(json.dumps(value).encode(), "f")) == value


@settings(deadline=None)
@given(st.binary(max_size=200) | st.text("ab:[]{}-&*!|>'\"\n \t#%?,", max_size=80).map(str.encode))
def test_random_bytes_raise_only_policy_errors(data: bytes) -> None:
    """No input makes the reader fail in any other way."""
    try:
        assert isinstance(parse(data, "f").value, dict)
    except PolicyError as error:
        assert str(error).startswith("f")


def test_a_fifo_and_devices_do_not_hang(tmp_path: Path) -> None:
    """Only regular files are policies; nothing else is even opened."""
    fifo = str(tmp_path / "fifo.yaml")
    os.mkfifo(fifo)
    for path in (fifo, "/dev/zero", str(tmp_path)):
        with pytest.raises(PolicyError, match="not a regular file"):
            document.read_file(path)


def test_a_large_file_is_not_read() -> None:
    """A 50 MB file is one line, decided from its size."""
    with tempfile.NamedTemporaryFile() as file:
        file.truncate(50_000_000)
        with pytest.raises(PolicyError, match="larger than 1 MiB"):
            document.read_file(file.name)


@pytest.mark.parametrize(("path", "words"), [("no/such.yaml", "No such file"), ("a\0b/", "null byte")])
def test_unreadable_paths(path: str, words: str) -> None:
    """The system's own words are kept."""
    with pytest.raises(PolicyError, match=words):
        document.read_file(path)
