"""Files of kernels and modules: which are taken, what is read from them, and that a broken one is refused in a line."""

import bz2
import gzip
import lzma
import os
import shutil
import struct
import subprocess
import time
from pathlib import Path

import pytest
import zstandard
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from ringfence.errors import HostError
from ringfence.runtime.microvm.kernels import bzimage, elf, modules

BANNER = b"\0Linux version 6.1.2-test (me@here) (gcc) #1\n\0"
DRIVERS = b"\0virtio-mmio\0virtio_console\0virtio_blk\0erofs\0overlay\0"


def note(name: bytes = b"Xen\0", kind: int = 18, content: bytes = b"\0\0\0\1\0\0\0\0") -> bytes:
    return (
        struct.pack("<III", len(name), len(content), kind) + name.ljust((len(name) + 3) & ~3, b"\0") + content
    )


def vmlinux(
    *, machine: int = 62, kind: int = 2, bits: int = 2, notes: bytes = note(), rest: bytes = BANNER + DRIVERS
) -> bytes:
    """A file with just what a kernel is known by: an ELF header, one segment of notes, its version."""
    ident = b"\x7fELF" + bytes([bits, 1, 1]) + bytes(9)
    header = struct.pack("<HHIQQQIHHHHHH", kind, machine, 1, 0x1000000, 64, 0, 0, 64, 56, 1, 0, 0, 0)
    segment = struct.pack("<IIQQQQQQ", 4, 4, 120, 0, 0, len(notes), len(notes), 4)
    return ident + header + segment + notes + rest


def module(name: str, *needs: str) -> bytes:
    """A relocatable object with a `.modinfo` as modpost writes it."""
    info = f"license=GPL\0depends={','.join(needs)}\0name={name}\0vermagic=6.1\0".encode()
    names = b"\0.modinfo\0.shstrtab\0"
    header = b"\x7fELF\x02\x01\x01" + bytes(9)
    table = 64 + len(info) + len(names)
    header += struct.pack("<HHIQQQIHHHHHH", 1, 62, 1, 0, 0, table, 0, 64, 0, 0, 64, 3, 2)
    sections = bytes(64)
    sections += struct.pack("<IIQQQQIIQQ", 1, 1, 2, 0, 64, len(info), 0, 0, 1, 0)
    sections += struct.pack("<IIQQQQIIQQ", 10, 3, 0, 0, 64 + len(info), len(names), 0, 0, 1, 0)
    return header + info + names + sections


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "vmlinux"


def test_a_kernel_tells_its_release_and_how_it_finds_devices(file: Path) -> None:
    """Release, devices by ACPI or by the command line, and no driver missing."""
    file.write_bytes(vmlinux())
    facts = elf.inspect(str(file))
    assert (facts.release, facts.acpi, facts.lacks) == ("6.1.2-test", True, ())
    file.write_bytes(vmlinux(rest=BANNER + DRIVERS + b"virtio-mmio-cmdline\0"))
    assert not elf.inspect(str(file)).acpi


def test_missing_drivers_are_named(file: Path) -> None:
    """A kernel without erofs is said to lack it, and only that."""
    file.write_bytes(vmlinux(rest=BANNER + DRIVERS.replace(b"erofs", b"ext4x")))
    assert elf.inspect(str(file)).lacks == ("erofs",)


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b"", "is empty"),
        (b"#!/bin/sh\n", "is not an ELF file"),
        (bytes(0x202) + b"HdrS" + bytes(600), "is a bzImage; a vmlinux is needed"),
        (vmlinux(machine=183), "is for 64-bit ARM, not for 64-bit x86"),
        (vmlinux(machine=3, bits=1), "is for 32-bit x86"),
        (vmlinux(machine=999), "ELF machine 999"),
        (vmlinux(kind=3), "is not a kernel"),
        (vmlinux(notes=b""), "has no PVH entry"),
        (vmlinux(notes=note(kind=17)), "has no PVH entry"),
        (vmlinux(notes=note(name=b"GNU\0")), "has no PVH entry"),
        (vmlinux(rest=DRIVERS), "is not a Linux kernel"),
        (vmlinux()[:70], "has no PVH entry"),
        (vmlinux()[:50], "is not an ELF file"),
    ],
)
def test_what_a_vmm_could_not_start_is_refused(file: Path, content: bytes, says: str) -> None:
    """Each is named with its path and what is wrong, and comes with what to do."""
    file.write_bytes(content)
    with pytest.raises(HostError, match=says) as caught:
        elf.inspect(str(file))
    assert str(file) in str(caught.value)
    assert caught.value.hint


def test_what_is_no_file_of_a_fair_size_is_refused(file: Path) -> None:
    """A directory, a FIFO that nobody writes to, a device, nothing at all, and a file that is far too large."""
    with pytest.raises(HostError, match="No such file"):
        elf.inspect(str(file))
    with pytest.raises(HostError, match="is not a regular file"):
        elf.inspect(str(file.parent))
    with pytest.raises(HostError, match="is not a regular file"):
        elf.inspect("/dev/zero")
    os.mkfifo(file)
    with pytest.raises(HostError, match="is not a regular file"):
        elf.inspect(str(file))
    file.unlink()
    with file.open("wb") as sparse:
        sparse.truncate((256 << 20) + 1)
    with pytest.raises(HostError, match="more than 256 MiB"):
        elf.inspect(str(file))


@settings(max_examples=300, suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(st.data())
def test_a_broken_header_is_an_error_and_nothing_else(file: Path, data: st.DataObject) -> None:
    """Whatever bytes of the headers are changed, the file is taken or refused, and that at once."""
    content = bytearray(vmlinux())
    for at in data.draw(st.lists(st.integers(4, 140), min_size=1, max_size=12)):
        content[at] = data.draw(st.integers(0, 255))
    file.write_bytes(content)
    started = time.monotonic()
    try:
        assert elf.inspect(str(file)).release
    except HostError as error:
        assert str(file) in str(error)
    assert time.monotonic() - started < 2


def bzimage_of(packed: bytes, size: int, *, append: bool = True, version: int = 0x20F) -> bytes:
    """An image with two sectors of setup, and `packed` a little behind them."""
    payload = packed + (struct.pack("<I", size) if append else b"")
    head = bytearray(3 * 512)
    head[0x1F1] = 2
    head[0x1FE:0x200] = b"\x55\xaa"
    head[0x202:0x206] = b"HdrS"
    struct.pack_into("<H", head, 0x206, version)
    struct.pack_into("<II", head, 0x248, 40, len(payload))
    return bytes(head) + bytes(40) + payload + b"behind it"


KERNEL = vmlinux() * 50


@pytest.mark.parametrize(
    ("packed", "append"),
    [
        (gzip.compress(KERNEL), False),
        (lzma.compress(KERNEL), True),
        (lzma.compress(KERNEL, lzma.FORMAT_ALONE), True),
        (bz2.compress(KERNEL), True),
        (zstandard.compress(KERNEL), True),
    ],
    ids=["gzip", "xz", "lzma", "bzip2", "zstd"],
)
def test_a_kernel_comes_out_of_a_bzimage(packed: bytes, append: bool) -> None:
    """Byte by byte what was put in, however it is compressed."""
    assert bzimage.unpack(bzimage_of(packed, len(KERNEL), append=append), "vmlinuz") == KERNEL


@pytest.mark.requires("lz4")
def test_a_kernel_compressed_with_lz4_comes_out_too() -> None:
    """Debian's are; the old form of lz4 is the one that kernels use."""
    packed = subprocess.run(["lz4", "-l", "-c"], input=KERNEL, capture_output=True, check=True).stdout
    assert bzimage.unpack(bzimage_of(packed, len(KERNEL)), "vmlinuz") == KERNEL


def test_without_lz4_it_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    """The program that is missing, and the package to install."""
    monkeypatch.setattr(shutil, "which", lambda name: None)
    with pytest.raises(HostError, match=r"lz4 is not installed.*apt-get install lz4"):
        bzimage.unpack(bzimage_of(b"\x02\x21\x4c\x18" + bytes(20), 100), "vmlinuz")


@pytest.mark.parametrize(
    ("image", "says"),
    [
        (b"", "is not a bzImage"),
        (KERNEL, "is not a bzImage"),
        (bzimage_of(gzip.compress(KERNEL), 0, version=0x200), "of any recent kernel"),
        (bzimage_of(lzma.compress(KERNEL), len(KERNEL))[:-100], "not a whole one"),
        (bzimage_of(lzma.compress(KERNEL), len(KERNEL) + 1), "is damaged"),
        (bzimage_of(lzma.compress(KERNEL), len(KERNEL) - 1), "is damaged"),
        (bzimage_of(lzma.compress(KERNEL)[:-40], len(KERNEL)), "is damaged|cannot be unpacked"),
        (bzimage_of(lzma.compress(KERNEL), 1 << 30), "says that it holds"),
        (bzimage_of(b"\x28\xb5\x2f\xfd" + b"\xff" * 50, 100), "cannot be unpacked as zstd"),
        (bzimage_of(b"\x89LZO" + bytes(50), 100), "in a way that is not known"),
    ],
)
def test_a_broken_bzimage_is_refused(image: bytes, says: str) -> None:
    """Too short, too old, cut off, a size that is a lie, rubbish inside, an unknown compression."""
    with pytest.raises(HostError, match=says):
        bzimage.unpack(image, "vmlinuz")


def test_what_comes_out_is_bounded() -> None:
    """Sixteen times more than the image says it holds: no more than that is ever made."""
    bomb = lzma.compress(bytes(len(KERNEL) * 16))
    with pytest.raises(HostError, match=f"{len(KERNEL) + 1} bytes came out of it, not {len(KERNEL)}"):
        bzimage.unpack(bzimage_of(bomb, len(KERNEL)), "vmlinuz")


def tree(tmp_path: Path, files: dict[str, bytes], builtin: str = "") -> str:
    """Write ``lib/modules/X``: {path below kernel/: content}."""
    (tmp_path / "kernel").mkdir()
    for path, content in files.items():
        place = tmp_path / "kernel" / path
        place.parent.mkdir(parents=True, exist_ok=True)
        place.write_bytes(content)
    (tmp_path / "modules.builtin").write_text(builtin)
    return str(tmp_path)


def test_modules_come_after_what_they_need(tmp_path: Path) -> None:
    """Once each, whatever their files are called and however they are compressed; what is built in is left out."""
    directory = tree(
        tmp_path,
        {
            "a/virtio_blk.ko": module("virtio_blk", "virtio", "virtio_ring"),
            "a/virtio-rng.ko.xz": lzma.compress(module("virtio_rng", "virtio")),
            "b/virtio.ko.gz": gzip.compress(module("virtio", "virtio_ring")),
            "b/virtio_ring.ko.zst": zstandard.compress(module("virtio_ring")),
            "c/erofs.ko": module("erofs", "libcrc32c"),
        },
        "kernel/fs/overlayfs/overlay.ko\nkernel/lib/libcrc32c.ko\n",
    )
    found = modules.Tree(directory)
    assert found.order(["virtio_blk", "erofs", "overlay", "virtio_rng"]) == [
        "virtio_ring",
        "virtio",
        "virtio_blk",
        "erofs",
        "virtio_rng",
    ]
    assert found.content("virtio_rng") == module("virtio_rng", "virtio")


def test_what_a_guest_needs_is_copied_uncompressed(tmp_path: Path) -> None:
    """The needed ones, those that are good to have, and extras for one purpose each; none twice."""
    files = {f"{name}.ko.xz": lzma.compress(module(name)) for name in modules.NEEDED}
    files["virtio-rng.ko"] = module("virtio_rng")
    files["vmw_vsock_virtio_transport.ko"] = module("vmw_vsock_virtio_transport", "vsock", "virtio_blk")
    files["vsock.ko"] = module("vsock")
    target = tmp_path / "copied"
    (tmp_path / "tree").mkdir()
    main, extras = modules.collect(tree(tmp_path / "tree", files), str(target))
    assert main == tuple(f"{name}.ko" for name in (*modules.NEEDED, "virtio_rng"))
    assert extras == {"vsock": ("vsock.ko", "vmw_vsock_virtio_transport.ko")}
    assert {path.name for path in target.iterdir()} == {*main, *extras["vsock"]}
    assert (target / "erofs.ko").read_bytes() == module("erofs")


@pytest.mark.parametrize(
    ("files", "says"),
    [
        ({"other.ko": module("other")}, "has no erofs"),
        ({"erofs.ko": module("erofs", "nosuch")}, "has no nosuch"),
        ({"erofs.ko": module("erofs", "b"), "b.ko": module("b", "erofs")}, "needs itself"),
        ({"erofs.ko": b"rubbish"}, "erofs.ko: it is no module"),
        ({"erofs.ko": vmlinux()}, "erofs.ko: it is no module"),
        ({"erofs.ko": module("erofs")[:-150]}, "erofs.ko: its section table is broken"),
        ({"erofs.ko.xz": b"rubbish"}, "cannot be unpacked"),
        ({"erofs.ko.zst": b"rubbish"}, "cannot be unpacked"),
    ],
)
def test_broken_modules_are_refused(tmp_path: Path, files: dict[str, bytes], says: str) -> None:
    """A driver that is not there, a circle, and files that are no modules."""
    directory = tree(tmp_path, files)
    with pytest.raises(HostError, match=says):
        modules.Tree(directory).order(["erofs"])


def test_optional_drivers_may_be_missing(tmp_path: Path) -> None:
    """No vsock in a kernel is no error until somebody needs it; a directory without modules is one."""
    assert modules.Tree(tree(tmp_path, {})).order(["vsock"], optional=True) == []
    with pytest.raises(HostError, match="there are no modules"):
        modules.Tree(str(tmp_path / "nothing"))


@settings(max_examples=200, deadline=None)
@given(st.data())
def test_a_broken_module_is_a_value_error_and_nothing_else(data: st.DataObject) -> None:
    """Whatever bytes of its headers are changed."""
    content = bytearray(module("erofs", "libcrc32c"))
    at = st.one_of(st.integers(0, 63), st.integers(len(content) - 192, len(content) - 1))
    for place in data.draw(st.lists(at, min_size=1, max_size=8)):
        content[place] = data.draw(st.integers(0, 255))
    try:
        elf.module_needs(bytes(content))
    except ValueError:
        pass
