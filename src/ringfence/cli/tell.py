"""What verbs say to a person, and print for a program."""

import sys

TYPE_CHECKING = False
if TYPE_CHECKING:
    from ringfence.errors import RingfenceError


def complain(error: "RingfenceError") -> int:
    """Tell an error of one of several things that a verb is about, and return its exit status."""
    print(f"ringfence: {error}", file=sys.stderr)
    return error.exit_status


def say(step: str) -> None:
    """Tell a person what is going on."""
    from ringfence.errors import one_line

    print(f"image: {one_line(step)}", file=sys.stderr, flush=True)


def print_json(value: object) -> None:
    """Print `value`, plain data or msgspec Structs, as JSON for people and programs."""
    import msgspec

    print(msgspec.json.format(msgspec.json.encode(value)).decode())
