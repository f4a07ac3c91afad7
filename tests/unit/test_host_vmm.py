"""Which files QEMU consists of here: only its own, each one safe, and asked for again when something changes."""

import os
import shutil
from pathlib import Path

import msgspec
import pytest

from ringfence.host import vmm
from ringfence.host.facts import Host, Runtime, VmmFacts

LOADER = "/lib64/ld-linux-x86-64.so.2"


def host(program: str | Path, arch: str = "x86_64") -> Host:
    return Host(euid=os.geteuid(), arch=arch, runtimes={vmm.QEMU: Runtime(path=str(program))})


@pytest.fixture
def firmware(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The firmware of a QEMU that need not be installed for this."""
    found = tmp_path / "bios-microvm.bin"
    found.write_bytes(b"bios")
    found.chmod(0o644)
    monkeypatch.setattr(vmm, "_FIRMWARE", (str(found), str(tmp_path / "absent")))
    return found


needs_loader = pytest.mark.skipif(not os.path.exists(LOADER), reason=f"{LOADER} is not here")


@needs_loader
def test_a_program_is_itself_its_libraries_and_firmware(firmware: Path) -> None:
    """Of any dynamic program: itself first, then the loader and its libraries by the names they are looked for by."""
    facts = vmm.vmm_facts(host("/usr/bin/env"))
    assert facts.reason == ""
    paths = list(facts.files)
    assert paths[0] == "/usr/bin/env"
    assert LOADER in paths
    assert any(os.path.basename(path) == "libc.so.6" for path in paths)
    assert str(firmware) in paths
    assert not any("absent" in path for path in paths)
    for real in facts.files.values():
        assert os.path.isfile(real)
        assert os.path.realpath(real) == real


@needs_loader
@pytest.mark.requires("qemu")
def test_qemu_of_this_machine() -> None:
    """The QEMU that is installed can be used: with the module that emulates, if that is one, and firmware."""
    program = shutil.which(vmm.QEMU)
    assert program is not None
    facts = vmm.vmm_facts(host(program))
    assert facts.reason == ""
    assert any("bios-microvm" in path or "qboot" in path or "pvh" in path for path in facts.files)
    assert len(facts.files) < 128


@needs_loader
@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (None, "does not say which libraries"),
        (b"", "does not say which libraries"),
        (b"#!/bin/sh\necho hello\n", "does not say which libraries"),
    ],
)
def test_what_is_no_dynamic_program(
    content: bytes | None, reason: str, tmp_path: Path, firmware: Path
) -> None:
    """A QEMU that the loader makes nothing of cannot be used, whatever its name."""
    del firmware
    program = tmp_path / "qemu"
    if content is not None:
        program.write_bytes(content)
        program.chmod(0o755)
    assert reason in vmm.vmm_facts(host(program)).reason


def test_a_machine_of_another_kind() -> None:
    """Nothing is asked where no microvm machine is known."""
    assert vmm.vmm_facts(host("/usr/bin/env", arch="aarch64")).reason == "no machine is known for aarch64"


@needs_loader
def test_without_firmware(monkeypatch: pytest.MonkeyPatch) -> None:
    """A QEMU without the first instructions of a machine is told beforehand."""
    monkeypatch.setattr(vmm, "_FIRMWARE", ("/nonexistent/bios.bin",))
    assert "firmware" in vmm.vmm_facts(host("/usr/bin/env")).reason


@needs_loader
@pytest.mark.parametrize("mode", [0o666, 0o664, 0o646])
def test_a_file_that_others_can_change(mode: int, firmware: Path) -> None:
    """What somebody else may write to is not shown to a ring as QEMU's, for it will be executed there."""
    firmware.chmod(mode)
    assert vmm.vmm_facts(host("/usr/bin/env")).reason == f"{firmware} can be changed by others than root"


@needs_loader
def test_a_program_of_too_many_files(firmware: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The ring has room for a bounded number of them."""
    del firmware
    monkeypatch.setattr(vmm, "_MOST_FILES", 1)
    assert vmm.vmm_facts(host("/usr/bin/env")).reason.startswith("QEMU needs ")


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[VmmFacts]:
    """What is found the next times, taken from the front; the key of the host stays the same."""
    facts: list[VmmFacts] = []
    monkeypatch.setattr(vmm, "vmm_facts", lambda _: facts.pop(0))
    monkeypatch.setattr(vmm, "host_key", lambda: "key")
    return facts


GOOD = VmmFacts(files={"/usr/bin/qemu": "/usr/bin/qemu"})


def test_what_was_found_is_kept(
    asked: list[VmmFacts], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Asked once, and again when the host's key is another or somebody else could have written the file."""
    file = tmp_path / "vmm.json"
    asked += [GOOD, VmmFacts(files={"/other": "/other"}), GOOD]
    assert vmm.with_vmm(host("x"), str(file)).vmm == GOOD
    assert vmm.with_vmm(host("x"), str(file)).vmm == GOOD
    monkeypatch.setattr(vmm, "host_key", lambda: "another")
    assert vmm.with_vmm(host("x"), str(file)).vmm == VmmFacts(files={"/other": "/other"})
    file.chmod(0o666)
    assert vmm.with_vmm(host("x"), str(file)).vmm == GOOD
    assert asked == []


def test_a_failure_is_not_kept(asked: list[VmmFacts], tmp_path: Path) -> None:
    """What does not work today is asked again tomorrow: somebody may have installed it."""
    asked += [VmmFacts(reason="no firmware"), GOOD]
    file = str(tmp_path / "vmm.json")
    assert vmm.with_vmm(host("x"), file).vmm == VmmFacts(reason="no firmware")
    assert vmm.with_vmm(host("x"), file).vmm == GOOD


def test_a_host_without_qemu_is_not_asked(tmp_path: Path) -> None:
    """Without QEMU there are no facts, and nothing is kept."""
    bare = msgspec.structs.replace(Host(), euid=os.geteuid())
    assert vmm.with_vmm(bare, str(tmp_path / "kept")) == bare
    assert os.listdir(tmp_path) == []
