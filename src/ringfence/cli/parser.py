"""argparse with our kind of error: one line, a code, and what to do next."""

import argparse

from ringfence.errors import UsageError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import NoReturn

_UNKNOWN = "unrecognized arguments: "


class Parser(argparse.ArgumentParser):
    """A parser that raises UsageError where argparse prints its usage and exits."""

    def error(self, message: str) -> "NoReturn":
        """Raise UsageError with argparse's own words, and the nearest known option for an unknown one."""
        raise UsageError(message, hint=f"{self._nearest(message)}see '{self.prog} --help'")

    def _nearest(self, message: str) -> str:
        import difflib

        word = message.removeprefix(_UNKNOWN).partition(" ")[0].partition("=")[0]
        if word == message:
            return ""
        known = [name for name in self._option_string_actions if name.startswith("--")]
        close = difflib.get_close_matches(word, known, 1, 0.7)
        return f"did you mean {close[0]}? " if close else ""
