"""The store of kernels: names, the default one, looking one up, removing, and what a killed command leaves."""

import os
import re
import stat
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from test_kernel_files import BANNER, DRIVERS, module, vmlinux

from ringfence.errors import HostError
from ringfence.runtime.microvm import kernel as looking
from ringfence.runtime.microvm.kernels import own, store


@pytest.fixture
def state(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    monkeypatch.setenv("RINGFENCE_STATE_DIR", str(tmp_path))  # never root's, for a user
    yield str(tmp_path)
    left = [name for name in os.listdir(tmp_path / "kernels") if name.startswith(".")]
    assert left == []


def make(state: str, kind: str = store.FETCHED, release: str = "6.1.2-test", **more: object) -> store.Kernel:
    """Publish a kernel whose file differs by kind and release."""
    content = vmlinux(rest=BANNER + DRIVERS + f"{kind}{release}".encode())
    with store.making(state) as (work, _):
        place = Path(work, "kernel")
        place.mkdir()
        (place / "vmlinux").write_bytes(content)
        (place / "modules").mkdir()
        (place / "modules/a.ko").write_bytes(module("a"))
        facts = {"kind": kind, "release": release, "source": f"{kind} 1", "size_bytes": len(content), **more}
        record = store.Record(sha256=store.file_digest(str(place / "vmlinux")), **facts)  # type: ignore[arg-type]
        return store.publish(state, str(place), record)


def test_a_kernel_is_found_with_its_modules_in_order(state: str) -> None:
    """Paths, digest, how to boot it; everybody may read the files and nobody change them."""
    made = make(state, modules=("a.ko",), extras={"vsock": ("a.ko",)}, acpi=True, cmdline="x=1")
    found = looking.find_kernel(state)
    assert (found.name, found.digest) == (made.name, made.digest)
    assert (found.kind, found.release, found.acpi) == ("fetched", "6.1.2-test", True)
    assert re.fullmatch(r"x=1( tsc_early_khz=\d{6,7})?", found.cmdline)
    assert found.modules == (f"{found.directory}/modules/a.ko",) == found.vsock_modules
    assert Path(found.path).read_bytes().startswith(b"\x7fELF")
    assert Path(found.directory, "modules.list").read_text() == "a.ko\n"
    for path in (found.path, found.modules[0], f"{found.directory}/kernel.json"):
        assert stat.S_IMODE(os.stat(path).st_mode) == 0o444
    for path in (found.directory, f"{found.directory}/modules", f"{state}/kernels"):
        assert stat.S_IMODE(os.stat(path).st_mode) == 0o755


def test_a_name_ends_with_a_digest_of_all_that_a_guest_depends_on(state: str) -> None:
    """The same kernel started otherwise, or with other modules, is another one; made again it is the same."""
    first = make(state)
    assert first.name == f"fetched-6.1.2-test-{first.digest.removeprefix('sha256:')[:12]}"
    assert make(state).name == first.name
    assert len({first.name, make(state, cmdline="x").name, make(state, modules=("a.ko",)).name}) == 3


def test_names_are_made_of_harmless_characters(state: str) -> None:
    """A release is the word of a file that may be anybody's."""
    made = make(state, release="../../x y\n")
    assert "/" not in made.name
    assert made.name.startswith("fetched-..-..-x-y--")


def test_the_default_is_the_first_and_then_a_built_one(state: str) -> None:
    """Fetched later changes nothing, built takes its place, and one's own is only chosen by its owner."""
    with pytest.raises(HostError, match="ringfence kernel fetch"):
        looking.find_kernel(state)
    fetched = make(state)
    assert looking.kernel_name(state) == fetched.name
    make(state, release="6.1.3")
    assert looking.kernel_name(state) == fetched.name
    built = make(state, store.BUILT)
    assert looking.kernel_name(state) == built.name
    mine = make(state, store.OWN)
    assert looking.kernel_name(state) == built.name
    store.set_default(state, mine.name)
    assert looking.kernel_name(state) == mine.name
    newer = make(state, store.BUILT, "6.1.4")
    assert looking.kernel_name(state) == mine.name
    # With the default the best of the others takes its place.
    assert store.remove(state, fetched.name) == ""
    assert store.remove(state, mine.name) in (built.name, newer.name)
    for name in looking.names(state):
        last = store.remove(state, name)
    assert last == ""
    with pytest.raises(HostError, match="is here"):
        looking.find_kernel(state)


def test_a_kernel_is_named_by_the_beginning_of_its_name(state: str) -> None:
    """One that fits is taken, several are refused, and so is a path."""
    fetched, built = make(state), make(state, store.BUILT)
    make(state, store.BUILT, "6.1.4")
    assert looking.find_kernel(state, "fetched").name == fetched.name
    assert looking.find_kernel(state, built.name).name == built.name
    with pytest.raises(HostError, match="'built' is the beginning of 2 kernels"):
        looking.find_kernel(state, "built")
    for name in ("nosuch", "../kernels", "default", ".", "lock"):
        with pytest.raises(HostError, match="no kernel"):
            looking.find_kernel(state, name)


def test_a_default_that_leads_elsewhere_is_none(state: str) -> None:
    """A link to a path is not followed, and one to a kernel that is gone is as good as none."""
    made = make(state)
    link = Path(state, "kernels/default")
    for target in (f"../kernels/{made.name}", "/", "gone", ".new-x"):
        link.unlink()
        link.symlink_to(target)
        with pytest.raises(HostError, match="ringfence kernel use NAME"):
            looking.find_kernel(state)


def test_a_broken_record_is_named(state: str) -> None:
    """With the command that removes the kernel."""
    made = make(state)
    record = Path(made.directory, "kernel.json")
    for text in ("{", '{"kind": "built"}', record.read_text().replace('"kind"', '"kid"')):
        record.unlink()
        record.write_text(text)
        with pytest.raises(HostError, match=f"ringfence kernel rm {made.name}"):
            looking.find_kernel(state)
    assert store.remove(state, made.name) == ""


def test_rests_of_killed_commands_go_with_the_next_one(state: str) -> None:
    """Directories and links under construction, and nothing else."""
    made = make(state)
    rest = Path(state, "kernels/.new-1-abc")
    (rest / "tree/deep").mkdir(parents=True)
    Path(state, "kernels/.new-2-abc").symlink_to("/etc")
    make(state, release="6.1.3")
    assert not rest.exists()
    assert Path("/etc/passwd").exists()
    assert looking.find_kernel(state).name == made.name


def test_room_is_looked_for_before_anything_is_made(state: str) -> None:
    """What is needed and what there is are said."""
    making = store.making(state, room_bytes=9 * 10**15)
    with pytest.raises(HostError, match=r"9000000.0 GB are needed in .*, and there are"), making:
        raise AssertionError("there is no such disk")


def test_looking_a_name_up_loads_next_to_nothing(state: str) -> None:
    """It stands on the way of every run, for the key of the plan."""
    made = make(state)
    code = f"import ringfence.runtime.microvm.kernel as k, sys; print(k.kernel_name({state!r})); print(*sys.modules)"
    said = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert said.splitlines()[0] == made.name
    assert not {"msgspec", "json", "re", "hashlib", "shutil"} & set(said.splitlines()[1].split())


def test_a_kernel_of_ones_own_is_copied(state: str, tmp_path: Path) -> None:
    """What is kept is the copy, with what it says of itself; a broken one leaves nothing."""
    mine = tmp_path / "vmlinux"
    mine.write_bytes(vmlinux(rest=BANNER + DRIVERS.replace(b"erofs", b"minix")))
    made, lacks = own.bring(state, str(mine), cmdline="lpj=1")
    assert (made.kind, made.release, made.acpi) == ("own", "6.1.2-test", True)
    assert made.cmdline.split()[0] == "lpj=1"
    assert lacks == ("erofs",)
    mine.write_bytes(b"changed")
    assert Path(made.path).read_bytes().startswith(b"\x7fELF")
    with pytest.raises(HostError, match="is not an ELF file"):
        own.bring(state, str(mine))
    with pytest.raises(HostError, match="printable"):
        own.bring(state, made.path, cmdline="a\nb")
    assert looking.names(state) == [made.name]
