"""A kernel that a user has built elsewhere: looked at, and copied into the store."""

import os
import re

from ringfence.errors import HostError
from ringfence.runtime.microvm.kernels import elf, store

TYPE_CHECKING = False
if TYPE_CHECKING:
    from ringfence.runtime.microvm.kernels.store import Kernel

_CMDLINE = re.compile(r"[\x20-\x7e]{0,256}")
_CHUNK_BYTES = 1 << 20


def bring(state: str, path: str, *, cmdline: str = "") -> "tuple[Kernel, tuple[str, ...]]":
    """Copy the vmlinux at `path` into the store; return it, and the drivers that it seems to lack.

    `cmdline` is what it needs on its command line besides what every guest gets. Raises HostError when a VMM could
    not start it.
    """
    if not _CMDLINE.fullmatch(cmdline):
        raise HostError("a kernel's command line is at most 256 printable characters")
    elf.inspect(path)  # before a copy is made of what may be anything
    with store.making(state, room_bytes=elf.MOST_KERNEL_BYTES) as (work, _):
        try:
            kernel = os.path.join(work, "kernel")
            os.mkdir(kernel, 0o700)
            vmlinux = os.path.join(kernel, "vmlinux")
            _copy(path, vmlinux)
            facts = elf.inspect(vmlinux)  # what was copied, whoever changes the other one
        except OSError as error:
            raise store.cannot("copy", path, error) from error
        record = store.Record(
            kind=store.OWN,
            release=facts.release,
            source=os.path.abspath(path),
            sha256=store.file_digest(vmlinux),
            size_bytes=os.path.getsize(vmlinux),
            acpi=facts.acpi,
            cmdline=cmdline,
        )
        return store.publish(state, kernel, record), facts.lacks


def _copy(path: str, target: str) -> None:
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    with open(descriptor, "rb") as source, open(target, "xb") as copy:
        left = elf.MOST_KERNEL_BYTES + 1  # one more than is good, for the check to see
        while left and (piece := source.read(min(left, _CHUNK_BYTES))):
            copy.write(piece)
            left -= len(piece)
