"""Write the seed corpus of fuzz_frame into the directory given: one stream of frames a file."""

import os
import struct
import sys


def frame(kind: int, flags: int, payload: bytes) -> bytes:
    """Return one frame of agent/PROTOCOL.md."""
    return struct.pack("<IBBH", len(payload), kind, flags, 0) + payload


def start(flags: int, argv: list[bytes], env: list[bytes], cwd: bytes = b"/") -> bytes:
    """Return a START frame."""
    limit = 1000 if flags & 2 else 0
    head = struct.pack("<IIQHHII", 1000, 0, limit, 80, 24, len(argv), len(env))
    return frame(1, flags, head + b"".join(s + b"\0" for s in (cwd, *argv, *env)))


SEEDS = {
    "plain": start(0, [b"true"], []),
    "held": start(4, [b"sh", b"-c", b"exit 3"], [b"PATH=/bin", b"A="], b"/work") + frame(2, 0, b""),
    "tty": start(1, [b"sh"], [b"TERM=dumb"]) + frame(4, 0, struct.pack("<HH", 132, 43)),
    "detached": start(2, [b"sleep", b"9"], []) + frame(3, 0, struct.pack("<I", 15)),
    "empty-strings": start(7, [b"", b""], [b""]),
    "relayed": start(9, [b"sh"], [b"TERM=dumb"]) + frame(4, 0, struct.pack("<HH", 132, 43)),
    "relayed-held": start(13, [b"sh"], []) + frame(6, 0, b"") + frame(2, 0, b""),
    "shutdown": frame(5, 0, b""),
}


def main(directory: str) -> None:
    """Write all seeds."""
    os.makedirs(directory, exist_ok=True)
    for name, data in SEEDS.items():
        with open(os.path.join(directory, name), "wb") as file:
            file.write(data)


main(sys.argv[1])
