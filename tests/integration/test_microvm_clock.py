"""The time limit of a machine that keeps no time itself: it is kept on the host's side of the link, too."""

import os
import signal
import time

import pytest

from detached import Cli, command_of, processes, until

pytestmark = pytest.mark.requires("root", "userns", "crun", "qemu", "kernel", "mkfs.erofs", "image:base")


def test_a_machine_that_stands_still_ends_in_time(microvm: Cli) -> None:
    """A detached machine whose every part is stopped ends by itself three seconds after its limit, as 124."""
    sandbox = (
        microvm.run("-d", "--name", "box", "--timeout", "2", "--", "sleep", "50").stdout.decode().strip()
    )
    began = time.monotonic()
    (vmm,) = [pid for pid in processes(sandbox) if b"qemu" in command_of(pid).split(b"\0")[0]]
    os.kill(vmm, signal.SIGSTOP)
    facts = until(lambda: found if (found := microvm.ps()["box"])["state"] != "running" else None)
    assert time.monotonic() - began < 10
    assert (facts["exit_status"], facts["timed_out"]) == (124, True)
    assert b"exited (124, time limit)" in microvm("ps", "--all").stdout
    assert b"the log has no end" in microvm("logs", "box").stderr
    assert processes(sandbox) == []


def test_a_machine_that_is_in_time_is_not_late(microvm: Cli) -> None:
    """The machine's own agent is first with the limit of a machine that runs: the log has its end."""
    microvm.run("-d", "--name", "box", "--timeout", "2", "--", "sleep", "50")
    assert microvm("logs", "-f", "box").stderr == b""
    facts = until(lambda: found if (found := microvm.ps()["box"])["state"] != "running" else None)
    assert (facts["exit_status"], facts["timed_out"], facts.get("reason")) == (124, True, None)
