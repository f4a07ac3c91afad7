"""What the VMM of this host consists of: the few files that a ring around it has to show it, and nothing else.

Asking takes some hundredths of a second, so it is done only for the tier that needs it, and kept in a file of its own.
"""

import os
import re
import struct
import time

import msgspec

from ringfence.host import programs
from ringfence.host.cache import host_key, keep, kept
from ringfence.host.facts import Host, VmmFacts
from ringfence.host.runtimes import trustworthy

QEMU, FIRECRACKER = "qemu-system-x86_64", "firecracker"
_ASK_S = 5.0
_MOST_BYTES = 1 << 16
_MOST_FILES = 128
_PT_INTERP = 3
_LOADERS = {"x86_64": "/lib64/ld-linux-x86-64.so.2"}
# "libz.so.1 => /lib/x86_64-linux-gnu/libz.so.1 (0x00007f...)", and the loader itself without an arrow.
_LIBRARY = re.compile(r"(?:=> )?(/[^ ]+) \(0x[0-9a-f]+\)$")
# Where Debian and others keep what QEMU loads by itself: the emulator is a module, the first instructions are a file.
_MODULES = "{libraries}/qemu/accel-tcg-x86_64.so"
_FIRMWARE = ("/usr/share/qemu/bios-microvm.bin", "/usr/share/qemu/qboot.rom", "/usr/share/qemu/pvh.bin")


def with_vmm(host: Host, path: str, name: str = "") -> Host:
    """Return `host` with `vmm` filled: the facts kept in file `path`, or else found out and kept there.

    `name` is "firecracker", or another for QEMU. Without that program `host` stays as it is. The file is believed as
    `ringfence.host.cache.kept` says.
    """
    if (FIRECRACKER if name == FIRECRACKER else QEMU) not in host.runtimes:
        return host
    key = host_key()
    facts = kept(path, key, lambda: VmmFacts)
    if facts is None:
        facts = firecracker_facts(host) if name == FIRECRACKER else vmm_facts(host)
        if not facts.reason:
            keep(path, key, facts)
    return msgspec.structs.replace(host, vmm=facts)


def vmm_facts(host: Host) -> VmmFacts:
    """Ask which files QEMU needs; `reason` says why it cannot be used."""
    program = host.runtimes[QEMU].path
    if host.arch not in _LOADERS:
        return VmmFacts(reason=f"no machine is known for {host.arch}")
    libraries = _libraries(host, program)
    if not libraries:
        return VmmFacts(reason="the dynamic loader does not say which libraries QEMU needs")
    home = next(
        (os.path.dirname(path) for path in libraries if os.path.basename(path).startswith("libc.so")), ""
    )
    module = _MODULES.format(libraries=home)
    firmware = [path for path in _FIRMWARE if os.path.exists(path)]
    if not firmware:
        return VmmFacts(reason="QEMU's firmware for microvm machines is not installed")
    # The emulator is built in, or a module; QEMU looks for modules under /usr/lib only.
    modules = [path for path in (module, f"/usr{module}") if os.path.exists(path)]
    return _shown("QEMU", [program, *libraries, *modules[-1:], *firmware])


def firecracker_facts(host: Host) -> VmmFacts:
    """Say which files Firecracker needs: its releases are one static program; `reason` says why it cannot be used."""
    program = host.runtimes[FIRECRACKER].path
    if host.arch not in _LOADERS:
        return VmmFacts(reason=f"no machine is known for {host.arch}")
    try:
        static = _is_static(program)
    except (OSError, ValueError, struct.error) as error:
        return VmmFacts(reason=f"{program} is no program of this machine's: {error}")
    libraries = [] if static else _libraries(host, program)
    if not static and not libraries:
        return VmmFacts(reason="the dynamic loader does not say which libraries Firecracker needs")
    return _shown("Firecracker", [program, *libraries])


def _libraries(host: Host, program: str) -> list[str]:
    """Return the paths of the libraries of a dynamic program and of its loader, none if that does not tell them."""
    said, status = programs.answer(
        programs.start([_LOADERS[host.arch], "--list", program], errors=True),
        time.monotonic() + _ASK_S,
        _MOST_BYTES,
    )
    found = [match[1] for line in said.splitlines() if (match := _LIBRARY.search(line.strip()))]
    return found if status == 0 else []


def _is_static(program: str) -> bool:
    """Say whether a program asks for no loader, elf(5): its program headers have no PT_INTERP. Raises ValueError."""
    with open(program, "rb") as file:
        head = file.read(_MOST_BYTES)
    if head[:6] != b"\x7fELF\x02\x01":
        raise ValueError("not a 64-bit ELF file")
    (offset,) = struct.unpack_from("<Q", head, 32)
    size, count = struct.unpack_from("<HH", head, 54)
    if offset + size * count > len(head):
        raise ValueError("its program headers are not at its beginning")
    return all(
        struct.unpack_from("<I", head, offset + place * size)[0] != _PT_INTERP for place in range(count)
    )


def _shown(name: str, paths: list[str]) -> VmmFacts:
    """Return the facts of a VMM made of the files at `paths`, its program first."""
    files = {path: os.path.realpath(path) for path in dict.fromkeys(paths)}
    if len(files) > _MOST_FILES:
        return VmmFacts(reason=f"{name} needs {len(files)} files")
    foreign = [path for path in files.values() if not trustworthy(path)]
    if foreign:
        return VmmFacts(reason=f"{foreign[0]} can be changed by others than root")
    return VmmFacts(files=files)
