"""The disks of a machine as descriptors: images of the store as they are, all else copied into one at the start.

A guest shares no file with the host. What a mount shows is copied when the sandbox starts, by mkfs.erofs, into an
image that has no name any more once it is open.
"""

from __future__ import annotations

import os

from ringfence.errors import HostError, MountError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from ringfence.plan.document import Disk, Plan
    from ringfence.runtime.base import Instance

_TIMEOUT_S = 600


def opened(disks: list[Disk], plan: Plan, instance: Instance) -> list[int]:
    """Return a read-only descriptor of each of `disks`, in order; the caller closes them.

    Raises HostError, MountError; then none is open.
    """
    found: list[int] = []
    try:
        for disk in disks:
            found.append(_image(disk) if disk["kind"] == "image" else _copied(disk, plan, instance))
    except BaseException:
        for descriptor in found:
            os.close(descriptor)
        raise
    return found


def _image(disk: Disk) -> int:
    try:
        return os.open(disk["source"], os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
    except OSError as error:
        raise HostError(
            f"cannot open the disk image {disk['source']}: {error.strerror}",
            hint="run again: it is made anew",
        ) from error


def _copied(disk: Disk, plan: Plan, instance: Instance) -> int:
    """Make an image of what `disk` shows, in a process that sees it as the job is to see it."""
    import subprocess
    import sys

    made = f"{instance.directory}/{disk['device']}.erofs"
    command = ["unshare", "--mount", "--propagation=private", "--kill-child=KILL", "--fork"]
    command += [
        sys.executable,
        "-I",
        "-m",
        "ringfence.runtime.microvm.copying",
        made,
        disk["source"],
    ]
    if disk["target"] != "/":
        command += [str(plan["user"]["uid"]), str(plan["user"]["gid"])]
    try:
        done = subprocess.run(
            command,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            timeout=_TIMEOUT_S,
            check=False,
            cwd="/",
            env={"PATH": "/usr/sbin:/usr/bin:/sbin:/bin", "LC_ALL": "C.UTF-8"},
        )
        if done.returncode != 0:
            words = done.stderr.decode("utf-8", "replace").strip().splitlines() or ["it said nothing"]
            raise MountError(
                f"cannot copy {disk['source']!r} for the microVM: {words[-1][:300]}",
                hint="is mkfs.erofs (erofs-utils) installed, and room in the run directory?",
            )
        return os.open(made, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
    except subprocess.TimeoutExpired as error:
        raise MountError(
            f"copying {disk['source']!r} for the microVM took more than {_TIMEOUT_S} s", hint="mount less"
        ) from error
    except OSError as error:
        raise HostError(f"cannot copy {disk['source']!r}: {error.strerror}", hint="see --debug") from error
    finally:
        try:
            os.unlink(made)
        except FileNotFoundError:
            pass
