"""What the QEMU of this host consists of: the few files that a ring around it has to show it, and nothing else.

Asking takes some hundredths of a second, so it is done only for the tier that needs it, and kept in a file of its own.
"""

import os
import re
import time

import msgspec

from ringfence.host import programs
from ringfence.host.cache import host_key, keep, kept
from ringfence.host.facts import Host, VmmFacts
from ringfence.host.runtimes import trustworthy

QEMU = "qemu-system-x86_64"
_ASK_S = 5.0
_MOST_BYTES = 1 << 16
_MOST_FILES = 128
_LOADERS = {"x86_64": "/lib64/ld-linux-x86-64.so.2"}
# "libz.so.1 => /lib/x86_64-linux-gnu/libz.so.1 (0x00007f...)", and the loader itself without an arrow.
_LIBRARY = re.compile(r"(?:=> )?(/[^ ]+) \(0x[0-9a-f]+\)$")
# Where Debian and others keep what QEMU loads by itself: the emulator is a module, the first instructions are a file.
_MODULES = "{libraries}/qemu/accel-tcg-x86_64.so"
_FIRMWARE = ("/usr/share/qemu/bios-microvm.bin", "/usr/share/qemu/qboot.rom", "/usr/share/qemu/pvh.bin")


def with_vmm(host: Host, path: str) -> Host:
    """Return `host` with `vmm` filled: the facts kept in file `path`, or else found out and kept there.

    Without QEMU `host` stays as it is. The file is believed as `ringfence.host.cache.kept` says.
    """
    if QEMU not in host.runtimes:
        return host
    key = host_key()
    facts = kept(path, key, lambda: VmmFacts)
    if facts is None:
        facts = vmm_facts(host)
        if not facts.reason:
            keep(path, key, facts)
    return msgspec.structs.replace(host, vmm=facts)


def vmm_facts(host: Host) -> VmmFacts:
    """Ask which files QEMU needs; `reason` says why it cannot be used."""
    program = host.runtimes[QEMU].path
    loader = _LOADERS.get(host.arch)
    if loader is None:
        return VmmFacts(reason=f"no machine is known for {host.arch}")
    said, status = programs.answer(
        programs.start([loader, "--list", program], errors=True), time.monotonic() + _ASK_S, _MOST_BYTES
    )
    libraries = [match[1] for line in said.splitlines() if (match := _LIBRARY.search(line.strip()))]
    if status != 0 or not libraries:
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
    looked_for = dict.fromkeys([program, *libraries, *modules[-1:], *firmware])
    files = {path: os.path.realpath(path) for path in looked_for}
    if len(files) > _MOST_FILES:
        return VmmFacts(reason=f"QEMU needs {len(files)} files")
    foreign = [path for path in files.values() if not trustworthy(path)]
    if foreign:
        return VmmFacts(reason=f"{foreign[0]} can be changed by others than root")
    return VmmFacts(files=files)
