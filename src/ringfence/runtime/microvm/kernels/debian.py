"""Debian packages that are read and not installed: what apt knows of one, fetched and unpacked by any user."""

import os
import time

from ringfence.errors import HostError
from ringfence.host.programs import answer, start
from ringfence.runtime.microvm.kernels.commands import CommandFailed, need, run

_MOST_BYTES = 1 << 20
_QUESTION_S = 20.0
_DOWNLOAD_S = 900.0
_UNPACK_S = 300.0
_LISTS_HINT = "run apt-get update as root, and check the network and the sources in /etc/apt"


def ask(*argv: str) -> str:
    """Return what a program says, "" when it fails."""
    said, status = answer(start(argv), time.monotonic() + _QUESTION_S, _MOST_BYTES)
    return said.strip() if status == 0 else ""


def installed_version(package: str) -> str:
    """Return the version of an installed package, "" when it is not installed."""
    status, _, version = ask("dpkg-query", "-W", "-f", "${db:Status-Status} ${Version}", package).partition(
        " "
    )
    return version if status == "installed" else ""


def candidate(meta: str, prefix: str) -> tuple[str, str]:
    """Return name and version of the package that the metapackage `meta` stands for, whose name begins with `prefix`.

    Raises HostError when apt does not know it.
    """
    need("apt-get", "apt-cache", "dpkg-deb", package="apt")
    fields: dict[str, str] = {}
    for line in ask("apt-cache", "show", "--no-all-versions", meta).splitlines():
        key, _, value = line.partition(": ")
        fields.setdefault(key, value)
    for needed in fields.get("Depends", "").split(","):
        name = needed.split("|")[0].split("(")[0].strip()
        if name.startswith(prefix):
            return name, _version(name)
    raise HostError(f"apt does not know the package {meta}", hint=_LISTS_HINT)


def _version(package: str) -> str:
    for line in ask("apt-cache", "policy", package).splitlines():
        key, _, value = line.strip().partition(": ")
        if key == "Candidate" and value != "(none)":
            return value
    raise HostError(f"apt cannot fetch the package {package}", hint=_LISTS_HINT)


def fetch(package: str, version: str, work: str, lock: int) -> str:
    """Fetch a package, which apt checks against the archive's signature, and return the tree unpacked of it in `work`.

    Raises HostError.
    """
    home, tree = os.path.join(work, "package"), os.path.join(work, "unpacked")
    os.mkdir(home)
    # Root's apt would fetch as another user, who cannot write here. APT may say more than needed: quiet.
    argv = ["apt-get", "-qq", "-o", "APT::Sandbox::User=root", "download", f"{package}={version}"]
    try:
        run(argv, cwd=home, timeout_s=_DOWNLOAD_S, lock=lock)
        [archive] = os.listdir(home)
        run(["dpkg-deb", "-x", archive, tree], cwd=home, timeout_s=_UNPACK_S, lock=lock)
    except CommandFailed as error:
        raise HostError(error.message, hint=_LISTS_HINT) from error
    except ValueError as error:
        raise HostError(f"apt-get did not fetch {package} {version}", hint=_LISTS_HINT) from error
    os.unlink(os.path.join(home, archive))
    return tree
