"""The agent has the job's uid and is in its reach: what a job does to it must not let anything run on, out or by.

The controls do the same to an ordinary process of the same user, outside.
"""

import json
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from boxes import USER, Sandboxes

pytestmark = pytest.mark.requires("root", "compiler")

Outside = Callable[..., "subprocess.CompletedProcess[bytes]"]
# Tries on process TARGET, in /proc, everything that an owner may do; says what came of it.
PRY = """
import json, os, sys
def attempt(work, *args):
    try: work(*args)
    except OSError as error: return error.errno
    return 0
def read(path):
    with open(path, 'rb', buffering=0) as file: file.read(1)
base = '/proc/' + TARGET + '/'
found = {name: attempt(read, base + name) for name in ('environ', 'maps', 'auxv', 'stack')}
found |= {name + ' listed': attempt(os.listdir, base + name) for name in ('fd', 'root', 'map_files')}
found |= {name + ' followed': attempt(os.readlink, base + name) for name in ('cwd', 'root', 'exe')}
found |= {name + ' opened': attempt(os.open, base + name, os.O_RDONLY) for name in ('exe', 'ns/net', 'pagemap')}
found |= {name + ' written': attempt(os.open, base + name, os.O_WRONLY)
          for name in ('mem', 'exe', 'oom_score_adj', 'clear_refs', 'comm')}
print(json.dumps(found))
"""
# Reading its own kernel stack and opening a running program for writing fail for everybody.
NEVER = {"stack", "exe written"}


@pytest.fixture(scope="module")
def victim() -> Iterator["subprocess.Popen[bytes]"]:
    """An ordinary process of USER's."""
    with subprocess.Popen(
        ["sleep", "600"], user=USER, group=USER, extra_groups=[], start_new_session=True
    ) as process:
        yield process
        process.kill()


def test_memory_descriptors_and_files_of_the_agent_are_closed(
    sandboxes: Sandboxes, victim: "subprocess.Popen[bytes]", outside: Outside
) -> None:
    """The agent is not dumpable: nothing in /proc/1 that is the owner's opens, while outside it does."""
    control = outside([sys.executable, "-I", "-c", f"TARGET = '{victim.pid}'\n{PRY}"])
    assert {name for name, error in json.loads(control.stdout).items() if error} <= NEVER, control.stderr
    found = sandboxes.ask(f"TARGET = '1'\n{PRY.replace('print(json.dumps(found))', 'out(found)')}")
    assert {name for name, error in found.items() if error not in (1, 13)} == set()


@pytest.mark.requires("x86_64")
def test_agent_cannot_be_traced(
    sandboxes: Sandboxes, victim: "subprocess.Popen[bytes]", probes: Path, outside: Outside
) -> None:
    """No ptrace, no memory through process_vm_*, no descriptor of it; outside its own user may all that."""
    names = ["trace_target", "vm_read", "vm_write", "steal_descriptor"]
    control = outside([probes / "attack", "--pid", str(victim.pid), *names])
    # EFAULT: the address is nothing there, but asking was allowed.
    assert control.stdout.split() == b"trace_target 0 vm_read 14 vm_write 14 steal_descriptor 0".split()
    result = sandboxes.run(["/probe/attack", "--pid", "1", *names])
    assert result.stdout.split() == b"trace_target 1 vm_read 1 vm_write 1 steal_descriptor 1".split()


def test_agent_survives_every_signal(sandboxes: Sandboxes) -> None:
    """All signals, thousands of them, by kill and by queue; the job goes on and its status arrives."""
    code = """
import os, signal, sys
signals = signal.valid_signals() - {signal.SIGKILL, signal.SIGSTOP}
for number in signals: signal.signal(number, signal.SIG_IGN)
if os.fork() == 0:
    while True: signal.pause()
for _ in range(200):
    for number in signal.valid_signals(): os.kill(1, number)
os.kill(-1, signal.SIGSTOP)
state = open('/proc/1/stat').read().rpartition(')')[2].split()[0]
sys.exit(7 if state in 'SR' else 8)
"""
    result = sandboxes.run(["python3", "-c", code])
    assert (result.exit_status, result.signal) == (7, 0)


def test_control_those_signals_end_an_ordinary_process(outside: Outside) -> None:
    """Outside the first SIGKILL of the same user is the end."""
    with subprocess.Popen(
        ["sleep", "600"], user=USER, group=USER, extra_groups=[], start_new_session=True
    ) as process:
        assert outside(["kill", "-KILL", str(process.pid)]).returncode == 0
        assert process.wait(10) == -signal.SIGKILL


LIMITS = """
import resource, sys
def attempt(kind, value):
    try: resource.prlimit(TARGET, getattr(resource, 'RLIMIT_' + kind), (value, value))
    except OSError as error: return error.errno
    return 0
print([attempt(kind, 0) for kind in ('NOFILE', 'FSIZE', 'NPROC', 'AS', 'CPU')])
"""


def test_limits_of_the_agent_cannot_be_changed(sandboxes: Sandboxes, outside: Outside) -> None:
    """prlimit works on oneself alone; outside, on every process of the same user."""
    with subprocess.Popen(
        ["sleep", "600"], user=USER, group=USER, extra_groups=[], start_new_session=True
    ) as process:
        control = outside([sys.executable, "-I", "-c", f"TARGET = {process.pid}\n{LIMITS}"])
        process.kill()
    assert control.stdout == b"[0, 0, 0, 0, 0]\n"
    result = sandboxes.run(["python3", "-c", f"TARGET = 1\n{LIMITS}"])
    assert (result.stdout, result.exit_status) == (b"[1, 1, 1, 1, 1]\n", 0)


def test_own_limits_can_be_lowered(sandboxes: Sandboxes) -> None:
    """What a shell's ulimit does still works."""
    result = sandboxes.run(["sh", "-c", "ulimit -n 20 && ulimit -n && exec python3 -c pass"])
    assert (result.stdout, result.exit_status) == (b"20\n", 0)


# Puts the agent last in every queue that there is, then spins on every CPU that it may use.
STARVE = """
import os
def attempt(work, *args):
    try: work(*args)
    except OSError: pass
attempt(os.sched_setscheduler, 1, os.SCHED_IDLE, os.sched_param(0))
attempt(os.sched_setaffinity, 1, {min(os.sched_getaffinity(0))})
attempt(os.setpriority, os.PRIO_PROCESS, 1, 19)
attempt(os.sched_setaffinity, 0, {min(os.sched_getaffinity(0))})
for _ in range(5): attempt(os.fork)
while True: pass
"""


def test_starving_the_agent_does_not_stretch_time(sandboxes: Sandboxes) -> None:
    """A job that takes all CPU time away from the agent is ended on time all the same: the host has its own clock."""
    start = time.monotonic()
    result = sandboxes.run(["python3", "-c", STARVE], timeout=1)
    assert (result.exit_status, result.timed_out) == (124, True)
    assert result.usage.wall_s < 4
    assert time.monotonic() - start < 8


def test_job_that_kills_all_its_processes(sandboxes: Sandboxes) -> None:
    """kill(-1) reaches the job's processes and nobody else: its own end is reported as what it was."""
    result = sandboxes.run(["python3", "-c", "import os\nos.fork()\nos.kill(-1, 9)\nos.kill(os.getpid(), 9)"])
    assert (result.exit_status, result.signal, result.oom_killed) == (137, 9, False)


def test_flood_of_processes_that_end(sandboxes: Sandboxes) -> None:
    """Orphans by the hundred are reaped, and the job's own status is not lost among them."""
    code = """
import os, sys
for _ in range(200):
    if os.fork() == 0:
        for _ in range(2): os.fork()
        os._exit(0)
    try:
        while os.waitpid(-1, os.WNOHANG)[0]: pass
    except ChildProcessError: pass
sys.exit(9)
"""
    limits = {"limits.pids": 512, "limits.threads": 512}
    result = sandboxes.run(["python3", "-c", code], limits)
    assert result.exit_status == 9


def test_agent_speaks_to_nobody_inside(sandboxes: Sandboxes, home: Path) -> None:
    """Its socket lies on the host, on no path that the sandbox sees, and under no abstract name."""
    code = """
import socket
def connect(path):
    with socket.socket(socket.AF_UNIX) as client:
        try: client.connect(path)
        except OSError as error: return error.errno
found = []
for directory, names, files in os.walk('/', onerror=None):
    if directory.startswith(('/proc', '/usr')): names.clear()
    found += [f'{directory}/{name}' for name in files if name.endswith('.sock') or name == 'control']
names = [line.split()[7] for line in list(open('/proc/net/unix'))[1:] if len(line.split()) > 7]
out([found, names, connect('control.sock'), os.path.exists(HOME)])
"""
    assert sandboxes.ask(f"HOME = {str(home)!r}\n{code}") == [[], [], 2, False]
