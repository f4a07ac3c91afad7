"""Debian's own kernel for clouds as a guest kernel: ready within a minute, larger and slower than a built one."""

import os
import platform
import re

from ringfence.errors import HostError
from ringfence.runtime.microvm.kernels import bzimage, debian, elf, modules, store

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

    from ringfence.runtime.microvm.kernels.store import Kernel

_META, _PREFIX = "linux-image-cloud-amd64", "linux-image-"
_SUFFIX = "-cloud-amd64"
_MOST_IMAGE_BYTES = 128 << 20


def fetch(state: str, *, say: "Callable[[str], None]") -> "tuple[Kernel, bool]":
    """Return the kernel made of Debian's package, and whether it was made now.

    The newest cloud kernel that is installed here is taken, else the one that apt knows; it is not installed. `say` is
    told each step. Raises HostError.
    """
    check_machine()
    release, package, version = _installed()
    if not release:
        package, version = debian.candidate(_META, _PREFIX)
        release = package.removeprefix(_PREFIX)
    source = f"{package} {version}"
    with store.making(state, lambda: say("waiting for another kernel command")) as (work, lock):
        found = store.by_source(state, store.FETCHED, source)
        if found is not None:
            return found, False
        root = "/"
        if not _installed()[0]:
            say(f"fetching {package} {version}")
            root = debian.fetch(package, version, work, lock)
        say("unpacking it, with the modules that a guest needs")
        try:
            return _make(state, work, root, release, source), True
        except OSError as error:
            raise store.cannot("read or write", error.filename or work, error) from error


def check_machine() -> None:
    """Raise HostError on a CPU that no guest kernel is made for."""
    if platform.machine() != "x86_64":
        raise HostError(f"guest kernels are made for x86_64 only, and this is {platform.machine()}")


def _installed() -> tuple[str, str, str]:
    """Return release, package and version of the newest installed cloud kernel, three times "" if there is none."""
    found = [name.removeprefix("vmlinuz-") for name in _names("/boot") if name.startswith("vmlinuz-")]
    for release in sorted((name for name in found if name.endswith(_SUFFIX)), key=_numbers, reverse=True):
        version = debian.installed_version(_PREFIX + release)
        if version and os.path.isdir(f"/lib/modules/{release}/kernel"):
            return release, _PREFIX + release, version
    return "", "", ""


def _names(directory: str) -> list[str]:
    try:
        return os.listdir(directory)
    except OSError:
        return []


def _numbers(release: str) -> list[int]:
    return [int(digits) for digits in re.findall(r"\d+", release)]


def _make(state: str, work: str, root: str, release: str, source: str) -> "Kernel":
    kernel = os.path.join(work, "kernel")
    os.mkdir(kernel, 0o700)
    packed = os.path.join(root, "boot", f"vmlinuz-{release}")
    with open(packed, "rb") as file:
        image = file.read(_MOST_IMAGE_BYTES)
    vmlinux = os.path.join(kernel, "vmlinux")
    with open(vmlinux, "wb") as file:
        file.write(bzimage.unpack(image, packed))
    facts = elf.inspect(vmlinux)
    needed, extras = modules.collect(
        os.path.join(root, "lib/modules", release), os.path.join(kernel, "modules")
    )
    record = store.Record(
        kind=store.FETCHED,
        release=facts.release,
        source=source,
        sha256=store.file_digest(vmlinux),
        size_bytes=os.path.getsize(vmlinux),
        acpi=facts.acpi,
        modules=needed,
        extras=extras,
    )
    return store.publish(state, kernel, record)
