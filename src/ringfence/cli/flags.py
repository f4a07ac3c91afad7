"""Options as a table, read in two ways: by argparse, which defines the behaviour, and by a quick reader for `run`.

argparse costs 11 ms of every start. The quick reader takes a command line that is plainly right and gives up on
everything else (an unknown option, a missing value, --help), which argparse then explains. A test holds the two
against each other.
"""

TYPE_CHECKING = False
if TYPE_CHECKING:
    import argparse
    from collections.abc import Sequence
    from typing import Literal

    Kind = Literal["switch", "value", "list"]


class Flag:
    """One option: `names` as users write them; a switch is True or False, a value a text, a list repeats."""

    __slots__ = ("choices", "default", "dest", "help", "kind", "metavar", "names")

    def __init__(
        self,
        *names: str,
        kind: "Kind" = "value",
        help: str,
        metavar: str | None = None,
        choices: "tuple[str, ...] | None" = None,
        default: str | None = None,
    ) -> None:
        """Hold the facts; `default` is that of a value."""
        self.names = names
        self.dest = next(name for name in names if name.startswith("--"))[2:].replace("-", "_")
        self.kind = kind
        self.help = help
        self.metavar = metavar
        self.choices = choices
        self.default = default


class Parsed:
    """What argparse.Namespace is, without argparse."""


def quick(flags: "Sequence[Flag]", words: "Sequence[str]") -> "argparse.Namespace | None":
    """Return what argparse would make of `words`, or None for anything out of the ordinary."""
    by_name = {name: flag for flag in flags for name in flag.names}
    found: dict[str, object] = {flag.dest: _start(flag) for flag in flags}
    found["command"] = []
    place = 0
    while place < len(words):
        word = words[place]
        place += 1
        if not word.startswith("-"):
            found["command"] = list(words[place - 1 :])
            break
        name, given, value = word.partition("=") if word.startswith("--") else (word, "", "")
        flag = by_name.get(name)
        if flag is None:
            return None
        if flag.kind == "switch":
            if given:
                return None
            found[flag.dest] = True
            continue
        if not given:
            if place == len(words) or words[place].startswith("-"):
                return None
            value = words[place]
            place += 1
        if flag.choices and value not in flag.choices:
            return None
        have = found[flag.dest]
        if isinstance(have, list):
            have.append(value)
        else:
            found[flag.dest] = value
    parsed = Parsed()
    parsed.__dict__.update(found)
    return parsed  # type: ignore[return-value]


def add_flags(parser: "argparse.ArgumentParser | argparse._ArgumentGroup", flags: "Sequence[Flag]") -> None:
    """Teach argparse the same options."""
    for flag in flags:
        if flag.kind == "switch":
            parser.add_argument(*flag.names, action="store_true", help=flag.help)
        elif flag.kind == "list":
            parser.add_argument(
                *flag.names, action="append", default=[], metavar=flag.metavar, help=flag.help
            )
        else:
            parser.add_argument(
                *flag.names,
                default=flag.default,
                choices=flag.choices,
                metavar=flag.metavar,
                help=flag.help,
            )


def _start(flag: Flag) -> object:
    if flag.kind == "list":
        return []
    return False if flag.kind == "switch" else flag.default
