"""Work on a thread of its own, whose namespaces and current directory end with it.

Namespaces belong to a thread, not to a process: unshare(2) and setns(2) on a short-lived one leave the caller where
it was, and need no fork, which is unsafe in a process that has threads.
"""

import _thread

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import TypeVar

    T = TypeVar("T")


def in_thread(work: "Callable[[], T]") -> "T":
    """Return what `work` returns, or raise what it raises, after it has run on a new thread."""
    done = _thread.allocate_lock()
    done.acquire()
    results: list[T] = []
    failures: list[BaseException] = []

    def body() -> None:
        try:
            results.append(work())
        except BaseException as error:  # noqa: BLE001 - raised again on the caller's thread
            failures.append(error)
        finally:
            done.release()

    _thread.start_new_thread(body, ())
    done.acquire()
    if failures:
        raise failures[0]
    return results[0]
