"""Reading the two kinds of ELF file that matter here: a kernel that a VMM can enter, and a kernel's modules."""

import mmap
import os
import re
import stat
import struct

from ringfence.errors import HostError

MOST_KERNEL_BYTES = 256 << 20
MOST_MODULE_BYTES = 64 << 20
_EM_X86_64, _EM_386, _EM_ARM, _EM_AARCH64, _EM_RISCV = 62, 3, 40, 183, 243
_CPUS = {_EM_386: "32-bit x86", _EM_ARM: "32-bit ARM", _EM_AARCH64: "64-bit ARM", _EM_RISCV: "RISC-V"}
_ET_REL, _ET_EXEC = 1, 2
_PT_NOTE = 4
_MOST_NOTES_BYTES = 1 << 16
# Source: include/xen/interface/elfnote.h, the entry that QEMU and Firecracker start a kernel at.
_XEN_ELFNOTE_PHYS32_ENTRY = 18
_BANNER = re.compile(rb"Linux version ([\x21-\x7e]{1,64}) \(")
# What the driver calls itself that finds devices on the kernel's command line.
_DEVICES_BY_CMDLINE = b"virtio-mmio-cmdline"
# Each driver's or file system's own name, as it registers it: a kernel without these cannot start a job.
_DRIVERS = (b"virtio-mmio", b"virtio_console", b"virtio_blk", b"erofs", b"overlay")
_HOW = "take the file vmlinux of a kernel's build, or unpack a bzImage with scripts/extract-vmlinux of its sources"


class Facts:
    """What a kernel's file tells: `release`, how it finds devices, and which drivers it seems to lack."""

    __slots__ = ("acpi", "lacks", "release")

    def __init__(self, release: str, *, acpi: bool, lacks: tuple[str, ...]) -> None:
        """Hold the facts."""
        self.release = release
        self.acpi = acpi
        self.lacks = lacks


def inspect(path: str) -> Facts:
    """Return what the kernel at `path` is; raises HostError unless it is an x86-64 vmlinux with a PVH entry."""
    try:
        # A FIFO or device must not make us wait.
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
        try:
            _check_file(path, os.fstat(descriptor))
            with mmap.mmap(descriptor, 0, prot=mmap.PROT_READ) as data:
                return _facts(path, data)
        finally:
            os.close(descriptor)
    except OSError as error:
        raise HostError(f"cannot read {path}: {error.strerror}", hint=_HOW) from error


def _check_file(path: str, found: os.stat_result) -> None:
    if not stat.S_ISREG(found.st_mode):
        raise HostError(f"{path} is not a regular file", hint=_HOW)
    if found.st_size > MOST_KERNEL_BYTES:
        raise HostError(
            f"{path} has {found.st_size / 1e6:.0f} MB, more than {MOST_KERNEL_BYTES >> 20} MiB",
            hint="strip it of its debugging symbols: strip --strip-debug",
        )
    if found.st_size == 0:
        raise HostError(f"{path} is empty", hint=_HOW)


def _facts(path: str, data: mmap.mmap) -> Facts:
    _check_header(path, data)
    if not any(kind == _XEN_ELFNOTE_PHYS32_ENTRY and name == b"Xen" for name, kind in _notes(data)):
        raise HostError(
            f"{path} has no PVH entry, by which a VMM starts a kernel", hint="build it with CONFIG_PVH=y"
        )
    banner = _BANNER.search(data)
    if banner is None:
        raise HostError(f"{path} is not a Linux kernel: it has no version", hint=_HOW)
    lacks = tuple(name.decode() for name in _DRIVERS if data.find(b"\0" + name + b"\0") < 0)
    return Facts(banner[1].decode(), acpi=data.find(_DEVICES_BY_CMDLINE) < 0, lacks=lacks)


def _check_header(path: str, data: mmap.mmap) -> None:
    if data[:4] != b"\x7fELF" or len(data) < 64:
        if data[0x202:0x206] == b"HdrS":
            raise HostError(f"{path} is a bzImage; a vmlinux is needed", hint=_HOW)
        raise HostError(f"{path} is not an ELF file", hint=_HOW)
    (machine,) = struct.unpack_from("<H", data, 18)
    if data[4] != 2 or data[5] != 1 or machine != _EM_X86_64:
        cpu = _CPUS.get(machine, f"another CPU (ELF machine {machine})")
        raise HostError(f"{path} is for {cpu}, not for 64-bit x86", hint=_HOW)
    if struct.unpack_from("<H", data, 16)[0] != _ET_EXEC:
        raise HostError(f"{path} is not a kernel: no executable ELF file at a fixed address", hint=_HOW)


def _notes(data: mmap.mmap) -> "list[tuple[bytes, int]]":
    """Return (name, type) of every note of the program headers; what does not fit into the file is passed over."""
    (offset,) = struct.unpack_from("<Q", data, 32)
    size, count = struct.unpack_from("<HH", data, 54)
    notes: list[tuple[bytes, int]] = []
    for header in range(offset, offset + size * count, size or 1):
        if size < 56 or header + 56 > len(data):
            break
        kind, _flags, start, _virtual, _physical, length = struct.unpack_from("<IIQQQQ", data, header)
        if kind == _PT_NOTE and length <= _MOST_NOTES_BYTES and start + length <= len(data):
            notes += _split(data[start : start + length])
    return notes


def _split(segment: bytes) -> "list[tuple[bytes, int]]":
    notes = []
    at = 0
    while at + 12 <= len(segment):
        name_size, content_size, kind = struct.unpack_from("<III", segment, at)
        notes.append((segment[at + 12 : at + 12 + name_size].rstrip(b"\0"), kind))
        at += 12 + _padded(name_size) + _padded(content_size)
    return notes


def _padded(size: int) -> int:
    return (size + 3) & ~3


def module_needs(module: bytes) -> tuple[str, ...]:
    """Return the names of the modules that a module's file says it needs; raises ValueError for what is no module."""
    for word in _section(module, b".modinfo").split(b"\0"):
        key, _, value = word.partition(b"=")
        if key == b"depends":
            return tuple(value.decode("ascii").split(",")) if value else ()
    raise ValueError("it does not say what it needs")


def _section(data: bytes, wanted: bytes) -> bytes:
    """Return the content of a section of a 64-bit relocatable ELF file; raises ValueError."""
    try:
        if data[:6] != b"\x7fELF\x02\x01" or struct.unpack_from("<HH", data, 16) != (_ET_REL, _EM_X86_64):
            raise ValueError("it is no module for 64-bit x86")
        (table,) = struct.unpack_from("<Q", data, 40)
        size, count, names_at = struct.unpack_from("<HHH", data, 58)
        headers = [struct.unpack_from("<II8x8xQQ", data, table + size * n) for n in range(count)]
        names = headers[names_at][2]
        for name, _kind, start, length in headers:
            end = data.index(b"\0", names + name)
            if data[names + name : end] == wanted:
                return data[start : start + length]
    except (struct.error, IndexError, OverflowError) as error:
        raise ValueError("its section table is broken") from error
    raise ValueError(f"it has no section {wanted.decode()}")
