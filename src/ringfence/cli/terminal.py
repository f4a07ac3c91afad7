"""The caller's side of a foreground job: signals that are passed on, and a terminal in raw mode."""

# Not `signal`, which makes enums of all numbers: 3 ms of every start.
import _signal  # type: ignore[import-not-found]
import os
import sys

TYPE_CHECKING = False
if TYPE_CHECKING:
    from types import TracebackType

_FORWARDED = (
    _signal.SIGINT,
    _signal.SIGTERM,
    _signal.SIGHUP,
    _signal.SIGQUIT,
    _signal.SIGUSR1,
    _signal.SIGUSR2,
)


class Signals:
    """While it is entered, signals to this process become bytes that `read` returns, for a poll loop on `fd`."""

    __slots__ = ("_old", "_old_wake", "_writer", "fd")

    def __init__(self) -> None:
        """Make the pipe."""
        self.fd, self._writer = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)
        self._old: dict[int, object] = {}
        self._old_wake = -1

    def __enter__(self) -> "Signals":
        self._old_wake = _signal.set_wakeup_fd(self._writer, warn_on_full_buffer=False)
        for number in (*_FORWARDED, _signal.SIGWINCH):
            self._old[number] = _signal.signal(number, lambda *_: None)
        return self

    def __exit__(
        self, kind: "type[BaseException] | None", error: "BaseException | None", trace: "TracebackType | None"
    ) -> None:
        for number, handler in self._old.items():
            _signal.signal(number, handler if handler is not None else _signal.SIG_DFL)
        _signal.set_wakeup_fd(self._old_wake)
        os.close(self.fd)
        os.close(self._writer)

    def read(self) -> bytes:
        """Return the numbers of the signals that came, one byte each."""
        try:
            return os.read(self.fd, 256)
        except BlockingIOError:
            return b""


class RawTerminal:
    """While it is entered, terminal `fd` hands every key on unread; it is always put back as it was."""

    __slots__ = ("_saved", "fd")

    def __init__(self, fd: int) -> None:
        """Change nothing yet."""
        self.fd = fd
        self._saved: list[object] | None = None

    def __enter__(self) -> "RawTerminal":
        import termios
        import tty

        self._saved = termios.tcgetattr(self.fd)
        tty.setraw(self.fd)
        return self

    def __exit__(
        self, kind: "type[BaseException] | None", error: "BaseException | None", trace: "TracebackType | None"
    ) -> None:
        import termios

        if self._saved is not None:
            termios.tcsetattr(self.fd, termios.TCSADRAIN, self._saved)  # type: ignore[arg-type]


def window(fd: int) -> tuple[int, int]:
    """Return (columns, rows) of terminal `fd`, (80, 24) if it does not say."""
    try:
        size = os.get_terminal_size(fd)
    except OSError:
        return 80, 24
    return size.columns or 80, size.lines or 24


def fill_standard_streams() -> None:
    """Open /dev/null for each standard stream that is closed, so that no other descriptor takes its number."""
    for fd in (0, 1, 2):
        try:
            os.fstat(fd)
        except OSError:
            os.open("/dev/null", os.O_RDWR)  # the lowest free number is this one
    if sys.stderr is None:  # print() would take None for standard output
        sys.stderr = os.fdopen(2, "w", closefd=False)
