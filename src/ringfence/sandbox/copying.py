"""Copy files out of a running sandbox and into one: at every tier the agent's binary does it inside, as one more job.

So it has the rights and limits of a job, and works wherever `exec` does. What it sends may be the work of a hostile
job beside it, and is judged as such: packing.py, files.py.
"""

from __future__ import annotations

import os
import posixpath
import select
import time

from ringfence.errors import ImageError, SandboxError
from ringfence.image.tarstream import shown
from ringfence.sandbox import protocol
from ringfence.sandbox.attach import Session
from ringfence.sandbox.files import destination
from ringfence.sandbox.launch import CommandError
from ringfence.sandbox.packing import Archive, Stream, judged, pack
from ringfence.sandbox.run import Pipes
from ringfence.sandbox.streams import Collect

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

    from ringfence.sandbox.packing import Target
    from ringfence.sandbox.store import Entry

AGENT = "/.ringfence"
MOST_BYTES = 1 << 30
_ALL, _SOME = 0, 1  # agent/pack.h
_MOST_WORDS = 1 << 18
# After the job's end, how long a pipe may stay silent that somebody else in the sandbox may hold.
_SILENT_S = 5.0
# How long it may take for what pipes still hold, after the last byte was sent or taken.
_FINISH_S = 60.0


class LeftOut:
    """What was not copied, told as it happens, the first hundred of it, and how much there was."""

    MOST_TOLD = 100

    def __init__(self, tell: Callable[[str], None]) -> None:
        """Tell each with `tell`, in one line of hostile words."""
        self.count = 0
        self._tell = tell

    def __call__(self, path: bytes, reason: str) -> None:
        """Count and tell one."""
        self.count += 1
        if self.count <= self.MOST_TOLD:
            self._tell(f"left out {shown(path or b'.')}: {reason}")

    def finish(self) -> None:
        """Say how many were not told."""
        if self.count > self.MOST_TOLD:
            self._tell(f"left out {self.count - self.MOST_TOLD} more")


class Job:
    """The agent's binary packing or unpacking in a sandbox, and its three pipes."""

    def __init__(self, entry: Entry, words: list[str]) -> None:
        """Start it; the second of `words` is the path that it is about. Raises SandboxError."""
        self._session = Session(entry, AGENT)
        self._about = os.fsencode(words[1])
        self._exited: int | None = None
        self._gone = False
        self._words = bytearray()
        self._stdin = self._stdout = self._stderr = -1
        try:
            self._start([AGENT, *words])
        except BaseException:
            self.close()
            raise

    def _start(self, argv: list[str]) -> None:
        pipes = Pipes(self._session.owner)
        try:
            frame = protocol.encode_start([os.fsencode(word) for word in argv], [], b"/", flags=protocol.HOLD)
            self._session.start(frame, pipes.theirs)
            self._stdin = pipes.take_input()
            self._stdout, self._stderr = pipes.take_outputs(Collect(), Collect())
        except CommandError as error:
            raise SandboxError(f"the sandbox cannot start its agent: {error}") from None
        finally:
            pipes.close()
        os.set_blocking(self._stdin, False)

    def read(self, size: int) -> bytes:
        """Return some of what it writes, b"" at the end."""
        return os.read(self._stdout, size) if self._ready(self._stdout, select.POLLIN) else b""

    def write(self, data: bytes | memoryview) -> None:
        """Give it all of `data`. Raises BrokenPipeError when it has stopped reading."""
        rest = memoryview(data)
        while rest:
            if not self._ready(self._stdin, select.POLLOUT):
                raise BrokenPipeError
            try:
                rest = rest[os.write(self._stdin, rest) :]
            except BlockingIOError:  # there is room, but not for all of a small write
                time.sleep(0.001)

    def end_input(self) -> None:
        """Let it see the end of its input."""
        if self._stdin >= 0:
            os.close(self._stdin)
            self._stdin = -1

    def finish(self, left_out: LeftOut) -> None:
        """Wait for its end; tell what it has left out. Raises SandboxError with its own reason when it has failed."""
        self.end_input()
        os.close(self._stdout)
        self._stdout = -1
        if self._ready(-1, 0, time.monotonic() + _FINISH_S):
            raise SandboxError(
                "the copy does not end in the sandbox", hint="it may be paused, or out of memory"
            )
        told = [_complaint(item) for item in bytes(self._words).split(b"\0")[:-1]]
        if self._exited not in (_ALL, _SOME):
            path, reason = told[-1] if told else (b"", "the sandbox ended, or killed the copy")
            raise SandboxError(
                f"in the sandbox, {shown(self._about if path in (b'', b'.') else path)}: {reason}"
            )
        for path, reason in told:
            left_out(path, reason)

    def close(self) -> None:
        """End it if it still runs, and close everything. Idempotent."""
        self._session.close()
        for fd in (self._stdin, self._stdout, self._stderr):
            if fd >= 0:
                os.close(fd)
        self._stdin = self._stdout = self._stderr = -1

    def _ready(self, wanted: int, events: int, until_s: float | None = None) -> bool:
        """Wait until `wanted` is ready; False: the job is over, and it never will be.

        With -1 the end of the job is what is waited for, until `until_s` on the clock of time.monotonic().
        """
        while True:
            poll = select.poll()
            connection = self._session.connection
            if wanted >= 0:
                poll.register(wanted, events)
            if self._stderr >= 0:
                poll.register(self._stderr, select.POLLIN)
            if connection is not None and not self._gone:
                poll.register(connection.fileno(), select.POLLIN)
            over = self._exited is not None or self._gone
            if wanted < 0 and over and self._stderr < 0:
                return False
            patience_s = _SILENT_S if over else None
            if until_s is not None:
                patience_s = min(patience_s or _FINISH_S, max(0.0, until_s - time.monotonic()))
            found = dict(poll.poll(None if patience_s is None else patience_s * 1000))
            if wanted in found:
                return True
            if not found or (until_s is not None and time.monotonic() > until_s):
                return not over
            if self._stderr in found:
                self._hear_words()
            if connection is not None and connection.fileno() in found:
                self._hear()

    def _hear_words(self) -> None:
        piece = os.read(self._stderr, 1 << 16)
        self._words += piece[: max(0, _MOST_WORDS - len(self._words))]
        if not piece:
            os.close(self._stderr)
            self._stderr = -1

    def _hear(self) -> None:
        connection = self._session.connection
        assert connection is not None  # noqa: S101 - only close() takes it away
        try:
            frame = connection.recv()
        except (BlockingIOError, TimeoutError):
            return
        if frame is None:
            self._gone = True
        elif frame[0] == protocol.EXITED:
            self._exited = protocol.decode_exited(frame[2])[0]
        elif frame[0] == protocol.FAILED:
            self._gone = True


def _complaint(item: bytes) -> tuple[bytes, str]:
    """Read "ERRNO PATH", in whatever a hostile job has made of it."""
    number, _, path = item.partition(b" ")
    if not number.isdigit() or len(number) > 4:
        return item[:4096], "it says no more"
    if number == b"0":
        return path, "is no file, directory or symlink"
    return path, os.strerror(int(number))


def _inside(path: str) -> str:
    """Return a path in a sandbox as docker has it: relative ones begin at the root."""
    if "\0" in path:
        raise SandboxError("a path has a NUL byte")
    return path if path.startswith("/") else f"/{path}"


def _name_of(path: str) -> bytes:
    """Return what a copy of `path` is called; b"" where only its content is meant."""
    last = path.rstrip("/").rpartition("/")[2]
    return b"" if path.endswith("/.") or last in ("", ".", "..") else os.fsencode(last)


def copy_out(
    entry: Entry,
    path: str,
    to: str | Callable[[bytes | memoryview], None],
    *,
    follow: bool,
    most_bytes: int,
    left_out: LeftOut,
) -> None:
    """Copy `path` of a running sandbox to the path `to`, or write it as an archive with the function `to`.

    `most_bytes` may come out, names and all. With `follow` a symlink that `path` itself is is followed.
    Raises SandboxError; what was copied before that stays.
    """
    name = _name_of(path)
    tree = destination(to, name) if isinstance(to, str) else None
    try:
        target: Target = tree if tree is not None else Archive(to, name or b".")  # type: ignore[arg-type]
        job = Job(entry, ["--pack", _inside(path), str(int(follow))])
        try:
            _receive(job, target, most_bytes, left_out)
        finally:
            job.close()
    finally:
        if tree is not None:
            tree.close()


def _receive(job: Job, target: Target, most_bytes: int, left_out: LeftOut) -> None:
    job.end_input()
    stream = Stream(job.read, most_bytes)
    count = 0
    try:
        for path, item in judged(stream, rooted=True, left_out=left_out):
            target.add(path, item, stream)
            count += 1
    except ImageError as error:
        if stream.ended:
            job.finish(left_out)  # its own reason, if it has one, is the better one
        raise SandboxError(f"the sandbox sends no sound archive: {error.message}") from None
    job.finish(left_out)
    if count == 0:
        raise SandboxError("nothing was copied")
    target.finish()


def copy_in(
    source: str | Callable[[int], bytes],
    entry: Entry,
    path: str,
    *,
    follow: bool,
    left_out: LeftOut,
) -> None:
    """Copy the path `source` to `path` of a running sandbox, or unpack there the archive that the function reads.

    Files belong to the job's user inside; its limits bound them. With `follow` a symlink that `source` itself is is
    followed. Raises SandboxError; what was copied before that stays.
    """
    inside = _inside(path)
    if isinstance(source, str):
        name = _name_of(source)
        os.stat(source, follow_symlinks=follow)  # before anything is started
    else:
        name, inside = b"", posixpath.join(inside, "")
    job = Job(entry, ["--unpack", inside, os.fsdecode(name)])
    try:
        _send(job, source, follow=follow, left_out=left_out)
    finally:
        job.close()


def _send(job: Job, source: str | Callable[[int], bytes], *, follow: bool, left_out: LeftOut) -> None:
    archive = Archive(job.write, b".")
    try:
        if isinstance(source, str):
            pack(source, archive, follow=follow, left_out=left_out)
        else:
            stream = Stream(source, None)
            for path, item in judged(stream, rooted=False, left_out=left_out):
                archive.add(path, item, stream)
            archive.finish()
    except ImageError as error:
        raise SandboxError(f"standard input is no sound archive: {error.message}", hint=error.hint) from None
    except BrokenPipeError:
        pass  # it says why
    job.finish(left_out)
