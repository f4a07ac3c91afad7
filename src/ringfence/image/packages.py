"""Which Debian packages an image holds, read from dpkg's own list in its layers."""

import os

from ringfence.linux.libc import RESOLVE_BENEATH, RESOLVE_NO_MAGICLINKS, RESOLVE_NO_SYMLINKS, openat2

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Sequence

_STATUS = "var/lib/dpkg/status"
_MAX_BYTES = 32 << 20


def debian_packages(layers: "Sequence[str]") -> dict[str, str]:
    """Return {package: version} of what is installed after the highest of the directories `layers` that says so.

    {} for an image that is no Debian, and for a list that cannot be read: it is the image's own word.
    """
    for layer in reversed(layers):
        text = _status(layer)
        if text is not None:
            return dict(found for stanza in text.split("\n\n") if (found := _installed(stanza)))
    return {}


def _status(layer: str) -> str | None:
    try:
        root = os.open(layer, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    except OSError:
        return None
    try:
        rules = RESOLVE_BENEATH | RESOLVE_NO_SYMLINKS | RESOLVE_NO_MAGICLINKS
        descriptor = openat2(root, _STATUS, os.O_RDONLY | os.O_NONBLOCK, rules)
    except OSError:
        return None
    finally:
        os.close(root)
    with open(descriptor, "rb") as file:
        return file.read(_MAX_BYTES).decode("utf-8", "replace")


def _installed(stanza: str) -> tuple[str, str] | None:
    fields = dict(line.split(": ", 1) for line in stanza.splitlines() if ": " in line and line[0] != " ")
    if fields.get("Status", "").split(" ")[-1] != "installed":
        return None
    return fields.get("Package", ""), fields.get("Version", "")
