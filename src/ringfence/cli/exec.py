"""``ringfence exec``: one more command in a running sandbox, under everything that its first one is under."""

from __future__ import annotations

import argparse
import os
import sys

from ringfence.cli.options import check_workdir, environment, split
from ringfence.cli.parser import Parser
from ringfence.cli.terminal import RawTerminal, Signals, fill_standard_streams, window
from ringfence.errors import SandboxError, UsageError, one_line
from ringfence.sandbox import protocol, reap, store
from ringfence.sandbox.attach import Session, not_running
from ringfence.sandbox.launch import CommandError, merged_env
from ringfence.sandbox.run import Pipes
from ringfence.sandbox.streams import Attendance, Budget, Forward, Source

TYPE_CHECKING = False
if TYPE_CHECKING:
    from ringfence.sandbox.store import Entry
    from ringfence.sandbox.streams import Ending, Sink

_HELP = """examples:
  ringfence exec web -- ps aux
  ringfence exec -it web -- sh
  tar c . | ringfence exec web -- tar x -C /work

Run COMMAND in the running sandbox NAME (a name, an id, or the beginning of one), as the same user and under the
same limits, filters and namespaces as what runs there. It ends when this process does.

exit status: the command's own; 125 nothing was run; 126, 127, 128+N as of 'ringfence run'
"""
_SIGINT, _SIGPIPE, _SIGTERM, _SIGWINCH = 2, 13, 15, 28
_KILLED = 137
# Somebody who asks three times means it.
_PATIENCE = 3
# A terminal has no end of input: it has this key, twice where there is an unfinished line.
_END_OF_INPUT = b"\x04\x04"


def main(argv: list[str]) -> int:
    """Run the verb; see the module's docstring."""
    fill_standard_streams()
    words, command = split(argv)
    args = _parser().parse_args(words)
    command = args.command + (command or [])
    if not command:
        raise UsageError("no command was given", hint="ringfence exec NAME -- COMMAND ARG ...")
    check_workdir(args.workdir)
    given = environment(args.env)
    entry = _find(args.name)
    record = entry.record()
    env = merged_env(_texts(record.get("env")), given)
    frame = protocol.encode_start(
        [os.fsencode(word) for word in command],
        [os.fsencode(item) for item in env],
        os.fsencode(args.workdir or str(record.get("cwd", "/"))),
        flags=protocol.HOLD | (_terminal_flags(record) if args.tty else 0),
        cols=window(1)[0] if args.tty else 0,
        rows=window(1)[1] if args.tty else 0,
    )
    with Signals() as signals:
        session = Session(entry, command[0])
        try:
            return _Job(session, entry, signals, frame, interactive=args.interactive, tty=args.tty).run()
        except CommandError as error:
            print(f"ringfence: {one_line(str(error))}", file=sys.stderr)
            return error.status
        finally:
            session.close()


def _parser() -> argparse.ArgumentParser:
    parser = Parser(
        prog="ringfence exec",
        usage="ringfence exec [OPTIONS] NAME [--] COMMAND [ARG ...]",
        description=_HELP,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("name", metavar="NAME", help=argparse.SUPPRESS)
    parser.add_argument("command", nargs=argparse.REMAINDER, metavar="COMMAND", help=argparse.SUPPRESS)
    parser.add_argument(
        "-i", "--interactive", action="store_true", help="pass the terminal's input on (-it: with --tty)"
    )
    parser.add_argument("-t", "--tty", action="store_true", help="give the command a terminal of its own")
    parser.add_argument(
        "-e", "--env", action="append", default=[], metavar="NAME[=VALUE]", help="add to the environment"
    )
    parser.add_argument(
        "-w", "--workdir", metavar="DIR", help="working directory inside; default: the sandbox's"
    )
    return parser


def _find(name: str) -> Entry:
    try:
        entry = store.find(name)
    except UsageError as error:
        # 2 could be the command's own exit status; that nothing was run is 125.
        raise SandboxError(error.message, hint=error.hint) from None
    if not entry.alive():
        raise not_running(entry)
    return entry


def _terminal_flags(record: dict[str, object]) -> int:
    return protocol.TTY if record.get("isolation") == "linux" else protocol.TTY | protocol.RELAY


def _texts(found: object) -> list[str]:
    return [item for item in found if isinstance(item, str)] if isinstance(found, list) else []


class _JobHasEnded(Exception):
    """A signal came for a job that is over; only processes that it left behind still hold its output open."""


class _Job:
    """The job of one `exec`, and its streams."""

    def __init__(
        self, session: Session, entry: Entry, signals: Signals, frame: bytes, *, interactive: bool, tty: bool
    ) -> None:
        self.session = session
        self.signals = signals
        self.frame = frame
        self.interactive = interactive
        self.tty = tty
        self.asked: dict[int, int] = {}
        self.group = reap.cgroup_of(entry.record())

    def run(self) -> int:
        """Carry the streams until the job ends, and return the exit status."""
        killed_before = self._killed_for_memory()
        attendance = self._with_terminal() if self.tty else self._with_pipes()
        try:
            if self.tty and self.interactive and os.isatty(0):
                with RawTerminal(0):
                    attendance.run()
            else:
                attendance.run()
        except _JobHasEnded:
            pass
        status = self._status(attendance.ending)
        if status == _KILLED and self._killed_for_memory() > killed_before:
            print("ringfence: out of memory (limits.memory of the sandbox)", file=sys.stderr)
        return status

    def _killed_for_memory(self) -> int:
        return self.group.oom_kills() if self.group is not None else 0

    def _status(self, ending: Ending) -> int:
        if ending.exited is not None:
            return ending.exited[0] & 0xFF
        if not self.session.killed:
            print("ringfence: the sandbox ended while the command ran", file=sys.stderr)
        return _KILLED

    def _with_pipes(self) -> Attendance:
        pipes = Pipes(self.session.owner)
        try:
            self.session.start(self.frame, pipes.theirs)
            pipes.close_theirs()
            forwarded = self.interactive or not os.isatty(0)
            source = Source(pipes.take_input(), fd=0 if forwarded else -1)
            return self._attendance(pipes.take_outputs(Forward(1), Forward(2)), source)
        finally:
            pipes.close()

    def _with_terminal(self) -> Attendance:
        self.session.start_with_terminal(self.frame)
        master, self.session.pty = self.session.pty, -1
        source = Source(os.dup(master), fd=0 if self.interactive else -1, end=_END_OF_INPUT)
        return self._attendance({master: Forward(1)}, source)

    def _attendance(self, outputs: dict[int, Sink], source: Source) -> Attendance:
        return Attendance(
            self.session,
            outputs,
            source,
            budget=Budget(None),
            deadline_s=None,
            wake_fd=self.signals.fd,
            on_wake=self._pass_signals_on,
            on_unread=self._break_pipe if self.session.relayed and not self.tty else None,
        )

    def _break_pipe(self) -> None:
        if self.session.connection is not None:
            self.session.connection.send(protocol.encode_signal(_SIGPIPE))

    def _pass_signals_on(self) -> None:
        connection = self.session.connection
        assert connection is not None  # noqa: S101 - it is closed after us
        for number in self.signals.read():
            self.asked[number] = self.asked.get(number, 0) + 1
            if number == _SIGWINCH and not self.tty:
                continue
            try:
                if number == _SIGWINCH:
                    connection.send(protocol.encode_resize(*window(1)))
                elif self.asked[number] >= _PATIENCE and number in (_SIGINT, _SIGTERM):
                    self.session.kill()
                else:
                    connection.send(protocol.encode_signal(number))
            except SandboxError:
                if number != _SIGWINCH:
                    raise _JobHasEnded from None
