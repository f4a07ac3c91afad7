"""Where `base` comes from: the Debian lines of the host's own apt sources, for the suite that is wanted.

So a host with a mirror, a proxy or no Internet at all builds from what it can reach, and no address is
written here.
"""

import glob
import os
import re

from ringfence.errors import ImageError

SUITES = ("bookworm", "trixie")
KEYRING = "/usr/share/keyrings/debian-archive-keyring.gpg"
_MAX_BYTES = 1 << 20
_POCKETS = ("", "-updates", "-security")
_PLAIN = re.compile(r"[\w.+~:/@%=,&?\[\]-]+")


def host_suite(os_release: str) -> str:
    """Return the Debian suite of the host from the text of its os-release, the newest one elsewhere."""
    fields = dict(line.split("=", 1) for line in os_release.splitlines() if "=" in line)
    suite = fields.get("VERSION_CODENAME", "").strip('"')
    return suite if fields.get("ID", "").strip('"') == "debian" and suite in SUITES else SUITES[-1]


def sources(suite: str, *, etc: str = "/etc") -> str:
    """Return the lines of a sources.list for `suite` after the host's own, "" if it has no Debian sources.

    Only sources signed by Debian's archive keys count; other vendors' stay out of the image. Raises
    ImageError for an unknown suite and for apt files that cannot be read.
    """
    if suite not in SUITES:
        raise ImageError(f"no suite {suite!r}", hint=f"take one of: auto, {', '.join(SUITES)}")
    host = host_suite(_read(os.path.join(etc, "os-release")))
    lines: list[str] = []
    for address, found, components in _entries(os.path.join(etc, "apt")):
        name, pocket = _split(found)
        if (
            name in (host, suite)
            and pocket in _POCKETS
            and all(map(_PLAIN.fullmatch, (address, *components)))
        ):
            line = f"deb [signed-by={KEYRING}] {address} {suite}{pocket} {' '.join(components)}"
            lines += [line] if line not in lines else []
    return "".join(f"{line}\n" for line in lines)


def _split(suite: str) -> tuple[str, str]:
    name, dash, pocket = suite.partition("-")
    return name, dash + pocket


def _entries(apt: str) -> "list[tuple[str, str, list[str]]]":
    """Return address, suite and components of each binary source signed by Debian, in apt's order."""
    entries: list[tuple[str, str, list[str]]] = []
    for path in (
        os.path.join(apt, "sources.list"),
        *sorted(glob.glob(os.path.join(apt, "sources.list.d", "*"))),
    ):
        if path.endswith(".list"):
            entries += _one_line_style(_read(path))
        elif path.endswith(".sources"):
            entries += _deb822_style(_read(path))
    return entries


def _one_line_style(text: str) -> "list[tuple[str, str, list[str]]]":
    entries = []
    for line in text.splitlines():
        match = re.fullmatch(r"deb\s+(?:\[(?P<options>[^]]*)\]\s+)?(?P<rest>[^#]+)(?:#.*)?", line.strip())
        if match is None:
            continue
        signed = re.search(r"signed-by=(\S+)", match["options"] or "")
        address, *rest = match["rest"].split()
        if len(rest) >= 2 and _debian_signed(signed[1] if signed else ""):
            entries.append((address, rest[0], rest[1:]))
    return entries


def _deb822_style(text: str) -> "list[tuple[str, str, list[str]]]":
    entries = []
    without_comments = re.sub(r"(?m)^#.*\n?", "", text)
    for stanza in re.split(r"\n\s*\n", without_comments):
        folded = re.sub(r"\n[ \t]+", " ", stanza)
        pairs = (line.split(":", 1) for line in folded.splitlines() if ":" in line)
        fields = {name.strip().lower(): value.split() for name, value in pairs}
        usable = "deb" in fields.get("types", []) and fields.get("enabled", ["yes"]) != ["no"]
        if usable and _debian_signed(" ".join(fields.get("signed-by", []))):
            for address in fields.get("uris", []):
                entries += [
                    (address, suite, fields.get("components", [])) for suite in fields.get("suites", [])
                ]
    return [entry for entry in entries if entry[2]]


def _debian_signed(signed_by: str) -> bool:
    """Say whether a source is under Debian's keys; one without the option is, or fails later."""
    return not signed_by or os.path.basename(signed_by).startswith("debian-archive")


def _read(path: str) -> str:
    try:
        with open(path, "rb") as file:
            return file.read(_MAX_BYTES).decode("utf-8", "replace")
    except FileNotFoundError:
        return ""
    except OSError as error:
        raise ImageError(
            f"cannot read {path}: {error.strerror}", hint="make it readable, or run as root"
        ) from error
