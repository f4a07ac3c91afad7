"""The options of a guest kernel: how a fragment is read, and how it is seen that it took effect."""

import re
from pathlib import Path

import pytest

from ringfence.errors import HostError
from ringfence.runtime.microvm.kernels import fragment
from ringfence.runtime.microvm.kernels.build import FRAGMENT


def test_lines_count_for_the_kernels_that_they_are_meant_for() -> None:
    """`before` and `from` choose by version; any other comment is only a comment."""
    text = (
        "CONFIG_A=y  # why\nCONFIG_B=n # before 6.9: gone\nCONFIG_C=y # from 6.9\n\n# CONFIG_D is not set\n"
    )
    assert fragment.parse(text, "f", (6, 1)) == {"CONFIG_A": "y", "CONFIG_B": "n", "CONFIG_D": "n"}
    assert fragment.parse(text, "f", (6, 9)) == {"CONFIG_A": "y", "CONFIG_C": "y", "CONFIG_D": "n"}
    assert fragment.parse(text, "f", (6, 12)) == fragment.parse(text, "f", (7, 0))


def test_a_later_line_wins() -> None:
    """So a user's own options come after ours."""
    assert fragment.parse("CONFIG_A=y\nCONFIG_A=n\n", "f", (6, 1)) == {"CONFIG_A": "n"}


def test_all_kinds_of_values() -> None:
    """Numbers, hexadecimal ones, texts, with the empty one."""
    text = 'CONFIG_A=100\nCONFIG_B=0x1000\nCONFIG_C="a b # c"\nCONFIG_D=""  # nothing\n'
    options = fragment.parse(text, "f", (6, 1))
    assert list(options.values()) == ["100", "0x1000", '"a b # c"', '""']


@pytest.mark.parametrize(
    "line",
    [
        "CONFIG_A",
        "A=y",
        "CONFIG_A=m",
        "CONFIG_A=maybe",
        'CONFIG_A="$(shell touch /tmp/x)"',
        'CONFIG_A="`id`"',
        'CONFIG_A="x\\"',
        "CONFIG_A =y",
        "CONFIG_A=y CONFIG_B=y",
        "include other",
    ],
)
def test_what_is_no_option_is_refused_with_its_line(line: str) -> None:
    """Modules and what make would carry out among them."""
    with pytest.raises(HostError, match=r"^/etc/f:2: .* is no option of a kernel"):
        fragment.parse(f"# first\n{line}\n", "/etc/f", (6, 1))


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    """Not there, and not text."""
    with pytest.raises(HostError, match="No such file"):
        fragment.read(str(tmp_path / "nothing"), (6, 1))
    (tmp_path / "binary").write_bytes(b"\xff\xfe")
    with pytest.raises(HostError, match="it is not UTF-8"):
        fragment.read(str(tmp_path / "binary"), (6, 1))


def test_what_did_not_take_effect_is_found() -> None:
    """On that is off, off that is on, another value; what the kernel does not know is off."""
    config = 'CONFIG_ON=y\n# CONFIG_OFF is not set\nCONFIG_N=1\nCONFIG_T="a"\n'
    right = {"CONFIG_ON": "y", "CONFIG_OFF": "n", "CONFIG_N": "1", "CONFIG_T": '"a"', "CONFIG_GONE": "n"}
    assert fragment.missed(right, config) == []
    wrong = {"CONFIG_ON": "n", "CONFIG_OFF": "y", "CONFIG_N": "2", "CONFIG_T": '""', "CONFIG_GONE": "y"}
    assert fragment.missed(wrong, config) == [f"{name}={value}" for name, value in wrong.items()]


def test_options_are_written_as_a_kernel_reads_them() -> None:
    """And read again they are the same."""
    options = {"CONFIG_A": "y", "CONFIG_B": "n", "CONFIG_C": '"x"'}
    written = fragment.lines(options)
    assert written == 'CONFIG_A=y\n# CONFIG_B is not set\nCONFIG_C="x"\n'
    assert fragment.parse(written, "f", (6, 1)) == options


@pytest.mark.parametrize("version", [(6, 1), (6, 12)])
def test_our_fragment_keeps_its_promises(version: tuple[int, int]) -> None:
    """No modules, no other kernel, no eBPF; lockdown, panic on oops, PVH; no option twice."""
    options = fragment.read(FRAGMENT, version)
    for name in (
        "MODULES",
        "KEXEC",
        "KEXEC_FILE",
        "BPF_SYSCALL",
        "IO_URING",
        "DEBUG_FS",
        "DEVMEM",
        "ACPI",
        "PCI",
    ):
        assert options[f"CONFIG_{name}"] == "n"
    for name in (
        "PVH",
        "PANIC_ON_OOPS",
        "SECURITY_LOCKDOWN_LSM_EARLY",
        "SECCOMP_FILTER",
        "EROFS_FS",
        "PID_NS",
    ):
        assert options[f"CONFIG_{name}"] == "y"
    lines = Path(FRAGMENT).read_text().splitlines()
    names = [line.partition("=")[0] for line in lines if line.startswith("CONFIG_")]
    assert len(names) == len(set(names))


def test_every_hardening_option_says_why() -> None:
    """Each line of that part has a comment of its own."""
    part = Path(FRAGMENT).read_text().partition("# -- hardening --")[2].partition("# -- size --")[0]
    lines = [line for line in part.splitlines() if line.startswith("CONFIG_")]
    assert len(lines) > 50
    assert [line for line in lines if not re.search(r"  # (?:(before|from) \d+\.\d+: )?[\w/]", line)] == []
