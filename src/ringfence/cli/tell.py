"""What the verbs of ``ringfence image`` say to a person, and print for a program."""

import sys


def say(step: str) -> None:
    """Tell a person what is going on."""
    from ringfence.errors import one_line

    print(f"image: {one_line(step)}", file=sys.stderr, flush=True)


def print_json(value: object) -> None:
    """Print `value`, plain data or msgspec Structs, as JSON for people and programs."""
    import msgspec

    print(msgspec.json.format(msgspec.json.encode(value)).decode())
