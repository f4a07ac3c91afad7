"""What of a bootstrapped Debian goes into an image: a tar stream in, a tar stream out that is the same every time."""

import tarfile
from io import BytesIO

import msgspec

from ringfence.errors import ImageError
from ringfence.image.skeleton import MOUNT_POINTS, account_files, name_files

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import IO


class Recipe(msgspec.Struct, frozen=True, kw_only=True):
    """What stays of a Debian, by paths in it; `cut_down`: root owns all, nobody else can change or gain anything.

    `variant` and `packages` are what mmdebstrap is asked for, `command` and `env` what the image says of a start.
    """

    variant: str
    packages: tuple[str, ...]
    cut_down: bool
    left_out: tuple[str, ...]
    emptied: tuple[str, ...]
    own: dict[str, bytes]
    command: tuple[str, ...]
    env: tuple[str, ...]


_PATH = "PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
# The build host's own, which may even hold credentials, and what every start makes anew.
_HOSTS_OWN = ("etc/apt/auth.conf", "etc/apt/auth.conf.d", "etc/apt/sources.list", "etc/apt/sources.list.d")
_BACKUPS = (
    "etc/.pwd.lock",
    "etc/group-",
    "etc/gshadow-",
    "etc/passwd-",
    "etc/shadow-",
    "etc/subgid-",
    "etc/subuid-",
)
_CACHES = (
    "var/cache/apt",
    "var/cache/debconf",
    "var/cache/ldconfig",
    "var/lib/apt/lists",
    "var/log",
    "var/tmp",
)

# usr-is-merged keeps out usrmerge, and with it 50 MB of Perl.
BASE = Recipe(
    variant="essential",
    packages=("python3", "usr-is-merged"),
    cut_down=True,
    left_out=(
        *("etc/apt", "etc/gshadow", "etc/shadow", *_BACKUPS),
        *("usr/share/bash-completion", "usr/share/doc", "usr/share/info", "usr/share/lintian"),
        *("usr/share/locale", "usr/share/man", "var/lib/apt"),
    ),
    emptied=(*MOUNT_POINTS, "boot", "root", "var/cache", "var/log", "var/tmp"),
    own=account_files() | name_files() | {"etc/machine-id": b""},
    command=("python3",),
    env=(_PATH, "LANG=C.UTF-8"),
)
DEBIAN = Recipe(
    variant="minbase",
    packages=("usr-is-merged",),
    cut_down=False,
    left_out=(*_HOSTS_OWN, *_BACKUPS),
    emptied=("dev", "proc", "run", "sys", "tmp", *_CACHES),
    own={"etc/hostname": b"", "etc/machine-id": b"", "etc/resolv.conf": b""},
    command=("bash",),
    env=(_PATH,),
)


def rewrite(stream: "IO[bytes]", out: "IO[bytes]", recipe: Recipe, *, started_s: int) -> int:
    """Copy the tar `stream` to `out` as `recipe` says; return the count of entries.

    Files keep the times that packages gave them, so that Python's compiled modules stay valid; whatever was made
    since `started_s` is of 1970, in order that two bootstraps of the same packages are the same. No devices.
    Raises ImageError for a stream that is no such archive, OSError when the disk is full.
    """
    seen: set[str] = set()
    try:
        with (
            tarfile.open(fileobj=stream, mode="r|", bufsize=1 << 20) as archive,
            tarfile.open(fileobj=out, mode="w|", format=tarfile.PAX_FORMAT, bufsize=1 << 20) as made,
        ):
            for member in archive:
                archive.members.clear()  # type: ignore[attr-defined] # tarfile keeps them all
                path = "/".join(part for part in member.name.split("/") if part not in ("", "."))
                if _stays(path, member, recipe):
                    _check(member, path, seen)
                    seen.add(path)
                    content = archive.extractfile(member) if member.isreg() else None
                    made.addfile(_cleaned(member, path, recipe, started_s), content)
                    made.getmembers().clear()
            for path in (path for path in recipe.emptied if path not in seen):
                made.addfile(_own(path, tarfile.DIRTYPE, 0o755, 0))
            for path, data in recipe.own.items():
                made.addfile(_own(path, tarfile.REGTYPE, 0o644, len(data)), BytesIO(data))
    except tarfile.TarError as error:
        raise ImageError(f"the bootstrapped archive is broken: {error}") from error
    return len(seen) + len(recipe.own)


def _stays(path: str, member: tarfile.TarInfo, recipe: Recipe) -> bool:
    if path in recipe.own or member.ischr() or member.isblk():
        return False
    gone = any(path == name or path.startswith(f"{name}/") for name in recipe.left_out)
    return not gone and not any(path.startswith(f"{name}/") for name in recipe.emptied)


def _check(member: tarfile.TarInfo, path: str, seen: set[str]) -> None:
    if not (member.isreg() or member.isdir() or member.issym() or member.islnk() or member.isfifo()):
        raise ImageError(f"{path!r} of the bootstrapped archive is of an unknown type {member.type!r}")
    target = member.linkname.removeprefix("./")
    if member.islnk() and target not in seen:
        raise ImageError(f"{path!r} of the bootstrapped archive is a link to {target!r}, which is not in it")


def _cleaned(member: tarfile.TarInfo, path: str, recipe: Recipe, started_s: int) -> tarfile.TarInfo:
    info = tarfile.TarInfo(path or ".")
    info.type, info.size = member.type, member.size
    info.linkname = member.linkname.removeprefix("./") if member.islnk() else member.linkname
    info.mtime = int(member.mtime) if member.mtime < started_s else 0
    if recipe.cut_down:
        info.mode = 0o777 if member.issym() else member.mode & 0o755
    else:
        info.mode, info.uid, info.gid = member.mode, member.uid, member.gid
        info.pax_headers = {
            name: value
            for name, value in member.pax_headers.items()
            if name.startswith("SCHILY.xattr.security.cap")
        }
    return info


def _own(path: str, kind: bytes, mode: int, size: int) -> tarfile.TarInfo:
    info = tarfile.TarInfo(path)
    info.type, info.mode, info.size = kind, mode, size
    return info
