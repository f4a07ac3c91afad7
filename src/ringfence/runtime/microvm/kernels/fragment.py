"""The options that make a guest kernel: read from a fragment, laid over tinyconfig, and checked to have come out.

A line is ``CONFIG_NAME=value``; n means that it must be off. A comment may follow. One that begins with ``before 6.9``
or ``from 6.9`` makes the line count only for such kernels, because options are renamed from time to time.
"""

import re

from ringfence.errors import HostError

_MOST_BYTES = 1 << 20
# Make reads strings from the result and would carry out what stands in $(...).
_VALUE = r'[yn]|-?\d{1,20}|0x[0-9A-Fa-f]{1,16}|"[^"\\$`]{0,1024}"'
_OPTION = re.compile(rf"(CONFIG_[A-Za-z0-9_]+)=({_VALUE})(?:\s+#(?:\s+(before|from)\s+(\d+)\.(\d+)\b)?.*)?")
_OFF = re.compile(r"# (CONFIG_[A-Za-z0-9_]+) is not set")


def parse(text: str, path: str, version: tuple[int, int]) -> dict[str, str]:
    """Return {option: value} of a fragment for a kernel of this `version`, such as (6, 1); a later line wins.

    `path` stands in errors. Raises HostError naming the line that makes no sense.
    """
    options: dict[str, str] = {}
    for number, raw in enumerate(text.splitlines(), 1):
        line = raw.strip()
        off = _OFF.fullmatch(line)
        if off:
            options[off[1]] = "n"
        elif line and not line.startswith("#"):
            found = _OPTION.fullmatch(line)
            if found is None:
                raise HostError(
                    f"{path}:{number}: {line[:80]!r} is no option of a kernel",
                    hint='write CONFIG_NAME=y, =n, =NUMBER or ="TEXT"; modules (=m) cannot be loaded',
                )
            if _counts(found, version):
                options[found[1]] = found[2]
    return options


def _counts(found: re.Match[str], version: tuple[int, int]) -> bool:
    if not found[3]:
        return True
    since = version >= (int(found[4]), int(found[5]))
    return since if found[3] == "from" else not since


def read(path: str, version: tuple[int, int]) -> dict[str, str]:
    """Return the options of the fragment in a file; raises HostError."""
    try:
        with open(path, encoding="utf-8") as file:
            text = file.read(_MOST_BYTES)
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is not UTF-8"
        raise HostError(f"cannot read {path}: {reason}") from error
    return parse(text, path, version)


def lines(options: dict[str, str]) -> str:
    """Return the options as a kernel's ``.config`` writes them."""
    return "".join(
        f"# {name} is not set\n" if value == "n" else f"{name}={value}\n" for name, value in options.items()
    )


def missed(options: dict[str, str], config: str) -> list[str]:
    """Return those of `options` that did not come out as asked in `config`, a kernel's whole ``.config``.

    Each is ``CONFIG_NAME=value``. An option that must be off and that the kernel does not know is off.
    """
    came_out = dict(line.split("=", 1) for line in config.splitlines() if line.startswith("CONFIG_"))
    return [f"{name}={value}" for name, value in options.items() if came_out.get(name, "n") != value]
