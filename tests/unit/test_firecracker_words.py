"""What Firecracker's words and statuses say, and which files it consists of here."""

import os
import shutil
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ringfence.host import vmm
from ringfence.host.facts import Host, Runtime
from ringfence.runtime.microvm.firecracker import explain
from ringfence.runtime.spawn import agent_path

LOADER = "/lib64/ld-linux-x86-64.so.2"
LOG = """\
2026-01-31T12:00:00.000000001 [anonymous-instance:main] Running Firecracker v1.7.0
2026-01-31T12:00:00.000000002 [anonymous-instance:main:ERROR] RunWithoutApiError error: Failed to open the disk
Error: RunWithoutApi(BuildMicroVMFromJson)
2026-01-31T12:00:00.000000003 [anonymous-instance:main:ERROR] Firecracker exiting with error. exit_code=152
the VMM exited with status 152
"""


def test_the_log_in_fewer_words() -> None:
    """Time and place of a line go, what says nothing goes, and the status has its meaning."""
    assert explain(LOG).splitlines() == [
        "RunWithoutApiError error: Failed to open the disk",
        "Error: RunWithoutApi(BuildMicroVMFromJson)",
        "Firecracker exited with status 152: this version does not take the machine's document",
    ]


@pytest.mark.parametrize(
    ("status", "words"),
    [
        ("148", "status 148: it made a system call that its own seccomp filter refuses"),
        ("153", "status 153: this version does not know an option"),
        ("150", "status 150: SIGSEGV"),
        ("77", "status 77"),
        ("²", "status ²"),
        ("9" * 5000, "status 99"),
    ],
)
def test_statuses(status: str, words: str) -> None:
    """Firecracker's own statuses are explained; what is none, or a guest's invention, stays as it is."""
    assert explain(f"the VMM exited with status {status}").startswith(f"Firecracker exited with {words}")


def test_the_guests_own_words_stay() -> None:
    """A panic on the serial console, and what the bridge says, are passed on."""
    said = "[    0.1] Kernel panic - not syncing: no init\nthe VMM was killed by signal 9\n"
    assert explain(said) == said.strip()


@given(st.text(max_size=300))
def test_any_words(text: str) -> None:
    """No text is too odd, and none grows."""
    assert len(explain(text)) <= len(text) + 1 + 80 * text.count("status")


def host(program: str | Path, arch: str = "x86_64") -> Host:
    return Host(euid=os.geteuid(), arch=arch, runtimes={vmm.FIRECRACKER: Runtime(path=str(program))})


needs_loader = pytest.mark.skipif(not os.path.exists(LOADER), reason=f"{LOADER} is not here")


def test_a_static_program_is_all_there_is() -> None:
    """As of a release: nothing but the program itself is shown to the ring."""
    program = agent_path()
    facts = vmm.firecracker_facts(host(program))
    assert facts.reason == ""
    assert facts.files == {program: os.path.realpath(program)}


@needs_loader
def test_a_dynamic_program_brings_its_libraries() -> None:
    """As a distribution may build it."""
    facts = vmm.firecracker_facts(host("/usr/bin/env"))
    assert facts.reason == ""
    assert next(iter(facts.files)) == "/usr/bin/env"
    assert LOADER in facts.files


@pytest.mark.parametrize(
    "content", [None, b"", b"\x7fELF", b"#!/bin/sh\n", b"\x7fELF\x02\x01" + b"\xff" * 60], ids=range(5)
)
def test_what_is_no_program(content: bytes | None, tmp_path: Path) -> None:
    """A file that is no program of this machine's cannot be used, whatever its name."""
    program = tmp_path / "firecracker"
    if content is not None:
        program.write_bytes(content)
    assert "is no program of this machine's" in vmm.firecracker_facts(host(program)).reason


def test_another_machine() -> None:
    """Nothing is asked where no microvm machine is known."""
    assert vmm.firecracker_facts(host("/usr/bin/env", "aarch64")).reason == "no machine is known for aarch64"


def test_one_that_others_can_change(tmp_path: Path) -> None:
    """What somebody else may write to is not executed."""
    program = tmp_path / "firecracker"
    shutil.copy(agent_path(), program)
    program.chmod(0o777)
    assert vmm.firecracker_facts(host(program)).reason == f"{program} can be changed by others than root"


def test_what_was_found_is_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Asked once for each VMM; a host that has only the other one has no facts."""
    monkeypatch.setattr(vmm, "host_key", lambda: "key")
    kept = str(tmp_path / "kept")
    first = vmm.with_vmm(host(agent_path()), kept, vmm.FIRECRACKER).vmm
    assert first is not None
    monkeypatch.setattr(vmm, "firecracker_facts", lambda _: pytest.fail("asked again"))
    assert vmm.with_vmm(host(agent_path()), kept, vmm.FIRECRACKER).vmm == first
    assert vmm.with_vmm(host(agent_path()), kept).vmm is None
