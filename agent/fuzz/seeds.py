"""Write the seed corpora of the fuzzers below the directory given: one directory a fuzzer, one input a file."""

import os
import struct
import sys

MACHINE = 0xFF  # in a step of the harnesses; 0xFFFF on the link
HELLO, SETUP_DONE, SETUP_FAILED, OPEN, CLOSE, CONTROL = 1, 3, 4, 8, 9, 10
DATA, END, CREDIT, STOP, POWEROFF = 16, 17, 18, 19, 48
READY, PREPARED, FAILED, EXITED, REPORTED = 65, 66, 67, 68, 69


def frame(kind: int, flags: int, payload: bytes) -> bytes:
    """Return one frame of agent/PROTOCOL.md."""
    return struct.pack("<IBBH", len(payload), kind, flags, 0) + payload


def start(flags: int, argv: list[bytes], env: list[bytes], cwd: bytes = b"/") -> bytes:
    """Return a START frame."""
    limit = 1000 if flags & 2 else 0
    head = struct.pack("<IIQHHII", 1000, 0, limit, 80, 24, len(argv), len(env))
    return frame(1, flags, head + b"".join(s + b"\0" for s in (cwd, *argv, *env)))


FRAMES = {
    "plain": start(0, [b"true"], []),
    "held": start(4, [b"sh", b"-c", b"exit 3"], [b"PATH=/bin", b"A="], b"/work") + frame(2, 0, b""),
    "tty": start(1, [b"sh"], [b"TERM=dumb"]) + frame(4, 0, struct.pack("<HH", 132, 43)),
    "detached": start(2, [b"sleep", b"9"], []) + frame(3, 0, struct.pack("<I", 15)),
    "empty-strings": start(7, [b"", b""], [b""]),
    "relayed": start(9, [b"sh"], [b"TERM=dumb"]) + frame(4, 0, struct.pack("<HH", 132, 43)),
    "relayed-held": start(13, [b"sh"], []) + frame(6, 0, b"") + frame(2, 0, b""),
    "shutdown": frame(5, 0, b""),
}


def step(what: int, kind: int, payload: bytes = b"", channel: int = MACHINE, stream: int = 0) -> bytes:
    """Return the step in which somebody says a whole frame of the link, or an agent one of its own."""
    return bytes([what, kind, stream, channel, len(payload)]) + payload


# fuzz_bridge.c: the guest says a frame; the host takes a step.


def guest(kind: int, payload: bytes = b"", channel: int = MACHINE, stream: int = 0, times: int = 1) -> bytes:
    """Return the step in which the guest says a frame, up to eight times."""
    return step(0x80 + times - 1, kind, payload, channel, stream)


def told(kind: int, payload: bytes, channel: int = 0) -> bytes:
    """Return the step in which the guest passes an agent's frame on."""
    return guest(CONTROL, frame(kind, 0, payload), channel)


def host(what: int, which: int = 0, more: int = 0) -> bytes:
    """Return a step of the host's; see host_step."""
    return bytes([0xC0 + which, what + 10 * more])


CONNECT, START, GO, REPORT, SIGNAL, LEAVE, SHUT, READ, WRITE = range(9)
BOOT = guest(HELLO, struct.pack("<II", 1, 0) + b"6.1\x005\0") + guest(SETUP_DONE)
UP = BOOT + told(READY, struct.pack("<II", 1, 1))
HELD = UP + host(START, more=1) + told(PREPARED, bytes(8))
RUNNING = UP + host(START) + told(PREPARED, bytes(8))
OUTPUT = guest(DATA, b"x" * 200, 0, 1, 8) + guest(DATA, b"y" * 100, 0, 2)
OVER = guest(END, b"", 0, 1) + guest(END, b"", 0, 2) + guest(STOP, b"", 0) + told(EXITED, bytes(12))
EXEC = host(CONNECT, 1) + told(READY, bytes(8), 1) + host(START, 1)
BRIDGE = {
    "boot": BOOT,
    "fails": guest(HELLO, struct.pack("<II", 1, 0) + b"6.1\x005\0") + guest(SETUP_FAILED, b"\1\0\0\0no\0"),
    "plain": RUNNING + OUTPUT + host(READ, more=1) + host(WRITE) + guest(CREDIT, b"\0\x20\0\0", 0) + OVER,
    "held": HELD + host(REPORT) + told(REPORTED, b"status\0x\0") + host(GO) + OUTPUT + OVER + host(LEAVE),
    "reader-goes": RUNNING + OUTPUT + host(SHUT, more=1) + OUTPUT + guest(END, b"", 0, 1),
    "terminal": UP
    + host(START, more=2)
    + told(PREPARED, bytes(8))
    + guest(DATA, b"$ ", 0, 1)
    + host(WRITE)
    + host(SHUT),
    "detached": UP
    + host(START, more=3)
    + host(LEAVE)
    + told(PREPARED, bytes(8))
    + OUTPUT[:210]
    + guest(END, b"", 0, 1),
    "exec": RUNNING
    + EXEC
    + told(PREPARED, bytes(8), 1)
    + guest(DATA, b"z", 1, 1)
    + host(LEAVE, 1)
    + guest(CLOSE, b"", 1),
    "fails-to-start": UP + host(START) + told(FAILED, bytes(8)) + guest(CLOSE, b"", 0),
    "gone": RUNNING + OUTPUT + OVER + b"\xbe" + host(READ, more=1),
    "crashed": RUNNING + OUTPUT + b"\xbe",
    "shutdown": RUNNING + host(SIGNAL, more=1) + told(EXITED, bytes(12)) + guest(CLOSE, b"", 0),
}

# fuzz_back.c: the bridge says a frame, or an agent; the agent, the job or the bridge take a step.


def bridge(kind: int, payload: bytes = b"", channel: int = 0, stream: int = 0, times: int = 1) -> bytes:
    """Return the step in which the bridge says a frame, up to eight times."""
    return step(0x40 + times - 1, kind, payload, channel, stream)


def agent(kind: int, payload: bytes, which: int = 0) -> bytes:
    """Return the step in which the agent says a frame."""
    return step(0x80 + 8 * which, kind, payload, 0)


def act(what: int, which: int = 0) -> bytes:
    """Return a step of another kind; see step."""
    return bytes([0xC0 + 8 * which + what])


def begun(flags: int, channel: int = 0) -> bytes:
    """Return the steps from READY to a START that the agent has taken."""
    order = bridge(CONTROL, start(flags, [b"true"], []), channel)
    return agent(READY, bytes(8), channel) + order + act(1, channel) + agent(PREPARED, bytes(8), channel)


BACK = {
    "plain": begun(0)
    + act(5, 2)
    + bridge(DATA, b"in", 0, 0, 8)
    + act(4, 1)
    + agent(EXITED, bytes(12))
    + bridge(POWEROFF, b"", MACHINE),
    "report": begun(4)
    + bridge(CONTROL, frame(6, 0, b""))
    + agent(REPORTED, b"status\0" + b"x" * 200 + b"\0"),
    "stop": begun(0) + bridge(STOP, b"", 0, 1) + act(5, 2) + bridge(END, b"", 0, 0) + act(3),
    "terminal": begun(9) + bridge(DATA, b"ls\n", 0, 0) + act(6, 2) + bridge(STOP, b"", 0, 1),
    "detached": begun(2) + act(6, 2) + act(6, 3) + agent(EXITED, bytes(12)),
    "exec": agent(READY, bytes(8))
    + bridge(OPEN, b"", 1)
    + act(0)
    + begun(0, 1)
    + bridge(CLOSE, b"", 1)
    + bridge(OPEN, b"", 1),
    "agent-goes": begun(0) + act(2) + bridge(CONTROL, frame(2, 0, b"")) + act(3),
    "poweroff": bridge(POWEROFF, b"", MACHINE),
}

SETUP = {
    "root": b"hostname=box\0uid=1000\0gid=1000\0caps=0\0nnp=1\0root=vda:erofs\0overlay=1000000:100\0",
}


def header(name: bytes, kind: bytes, size: int = 0, link: bytes = b"") -> bytes:
    """Return a tar header; the harness puts the checksum in."""
    fields = name.ljust(100, b"\0") + b"0000644\0" + b"0000000\0" * 2 + b"%011o\0" % size + b"00000000000\0"
    return (fields + b" " * 8 + kind + link.ljust(100, b"\0") + b"ustar\x0000").ljust(512, b"\0")


def records(*pairs: bytes) -> bytes:
    """Return a pax header with its records."""
    text = b"".join(b"%d " % (len(pair) + 4) + pair + b"\n" for pair in pairs)
    return header(b"pax", b"x", len(text)) + text.ljust(512, b"\0")


TAR = {
    "plain": header(b".", b"5")
    + header(b"./a", b"0", 5)
    + header(b"./s", b"2", 0, b"a")
    + header(b"h", b"1", 0, b"a"),
    "long": records(b"path=./some/long/name", b"linkpath=target", b"mtime=1.5") + header(b"x", b"2", 0, b"y"),
    "large": records(b"size=99999999999") + header(b"./x", b"0"),
}


def main(directory: str) -> None:
    """Write all seeds."""
    for fuzzer, seeds in (
        ("frame", FRAMES),
        ("bridge", BRIDGE),
        ("back", BACK),
        ("setup", SETUP),
        ("tar", TAR),
    ):
        place = os.path.join(directory, fuzzer)
        os.makedirs(place, exist_ok=True)
        for name, data in seeds.items():
            with open(os.path.join(place, name), "wb") as file:
                file.write(data)


main(sys.argv[1])
