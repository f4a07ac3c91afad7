"""What every start pays for: which modules it loads, and that the quick ways give what the slow ones give."""

import json
import math
import subprocess
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ringfence.cli.flags import quick
from ringfence.cli.options import FIELDS, WHAT, split
from ringfence.cli.run import FLAGS, parser
from ringfence.errors import UsageError
from ringfence.plainjson import dumps

HEAVY = {
    "argparse",
    "asyncio",
    "collections",
    "dataclasses",
    "enum",
    "functools",
    "hashlib",
    "inspect",
    "json",
    "logging",
    "msgspec",
    "pathlib",
    "re",
    "shutil",
    "signal",
    "subprocess",
    "tempfile",
    "threading",
    "typing",
    "yaml",
}
ALL = (*FLAGS, *WHAT, *FIELDS)
WORDS = [name for flag in ALL for name in flag.names] + [
    "-it",
    "-h",
    "--",
    "-",
    "--memory=512m",
    "--json=yes",
    "--read-only=false",
    "--env=A=B",
    "-m512m",
    "--nosuch",
    "linux",
    "crun",
    "512m",
    "python3",
    "a=b",
    "",
]


def modules_of(code: str) -> set[str]:
    """Return the modules that a bare interpreter has loaded after `code`."""
    code += "; import sys; print(*sorted(sys.modules))"
    done = subprocess.run([sys.executable, "-S", "-c", code], check=True, capture_output=True, text=True)
    return set(done.stdout.split())


def at_start(code: str) -> set[str]:
    path = f"import sys; sys.path[:0] = {[p for p in sys.path if p]!r}; "
    return modules_of(path + code) - modules_of("pass")


def test_help_loads_nothing_but_the_table_of_verbs():
    """`ringfence --help` costs what the interpreter costs."""
    loaded = at_start("import ringfence.cli; ringfence.cli.main(['--version'])")
    assert {name for name in loaded if name.startswith("ringfence.")} == {
        "ringfence.cli",
        "ringfence.version",
    }
    assert not loaded & HEAVY


def test_run_loads_no_heavy_module_before_the_runtime_starts():
    """What `run` needs until the runtime is at work is a few small modules of ours."""
    loaded = at_start("import ringfence.cli.run")
    assert not loaded & HEAVY, loaded & HEAVY
    assert not {
        name for name in loaded if name.startswith(("ringfence.policy", "ringfence.plan.", "ringfence.proof"))
    }


def test_what_is_loaded_meanwhile_is_light_as_well():
    loaded = at_start("import ringfence.cli.job, ringfence.proof.prove, ringfence.runtime.linux")
    assert not loaded & HEAVY, loaded & HEAVY


PLAIN = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4),
    max_leaves=20,
)


@given(PLAIN)
def test_plain_json_is_json(value):
    """Whatever plain data is written is read back as it was by the standard library."""
    assert json.loads(dumps(value)) == value


@given(st.text(alphabet=st.characters(categories=["Cs", "Cc", "L"])))
def test_plain_json_writes_text_as_json_does(text):
    """Also lone surrogates, which is how Python holds bytes that are no UTF-8."""
    assert dumps(text) == json.dumps(text)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, [math.inf]])
def test_plain_json_refuses_numbers_that_json_does_not_have(value):
    with pytest.raises(ValueError, match="not a JSON number"):
        dumps(value)


@pytest.mark.parametrize("value", [b"bytes", {1}, object(), {"a": b""}])
def test_plain_json_refuses_what_is_not_plain(value):
    with pytest.raises(TypeError):
        dumps(value)


@given(st.lists(st.sampled_from(WORDS), max_size=8))
def test_the_quick_reader_agrees_with_argparse(words):
    """Where the quick reader answers at all, argparse would have said the same."""
    ours, _ = split(words)
    fast = quick(ALL, ours)
    if fast is None:
        return
    slow = vars(parser().parse_args(ours))
    assert vars(fast) == slow


@pytest.mark.parametrize(
    "words",
    [["--nosuch"], ["--memory"], ["--memory", "--cpus"], ["-i", "strong"], ["-h"], ["--tty=yes"], ["-m512m"]],
)
def test_the_quick_reader_leaves_the_unusual_to_argparse(words):
    assert quick(ALL, words) is None


def test_the_quick_reader_takes_the_usual():
    """A control for the agreement test: the common command lines are answered."""
    fast = quick(ALL, ["--memory", "512m", "-e", "A=1", "-e", "B=2", "--rm", "-i", "linux", "sh", "-c", "x"])
    assert fast is not None
    assert (fast.memory, fast.env, fast.rm, fast.isolation) == ("512m", ["A=1", "B=2"], True, "linux")
    assert fast.command == ["sh", "-c", "x"]


def test_a_wrong_option_is_a_usage_error_of_ours():
    with pytest.raises(UsageError, match="--nosuch"):
        parser().parse_args(["--nosuch"])
