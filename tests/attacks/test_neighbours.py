"""Two sandboxes at once: nothing of one is in reach of the other, by any of the ways that processes share things."""

import json
import os
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from boxes import USER, Plain, Sandboxes, bind

pytestmark = pytest.mark.requires("root", "compiler")

Outside = Callable[..., "subprocess.CompletedProcess[bytes]"]
KEY = 0x52464E47
# Leaves something in every place that could be shared.
LEAVE = """
import ctypes, socket
libc = ctypes.CDLL(None, use_errno=True)
for path in ('/tmp/left', '/dev/shm/left', '/work/left'):
    if os.access(os.path.dirname(path), os.W_OK):
        with open(path, 'w') as file: file.write('secret')
assert libc.shmget(KEY, 4096, 0o1666) >= 0
assert libc.msgget(KEY, 0o1666) >= 0
server = socket.socket(socket.AF_UNIX)
server.bind('\\0ringfence-left')
server.listen()
port = socket.socket()
port.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
port.bind(('127.0.0.1', PORT))
port.listen()
"""
# Looks for all of that, and for the other's processes.
SEEK = """
import ctypes, json, os, socket
libc = ctypes.CDLL(None, use_errno=True)
def connects(family, address):
    with socket.socket(family) as client:
        try: client.connect(address)
        except OSError: return False
    return True
def words(name):
    try:
        with open(f'/proc/{name}/cmdline') as file: return file.read()
    except OSError: return ''
print(json.dumps({
    'files': [path for path in ('/tmp/left', '/dev/shm/left', '/work/left') if os.path.exists(path)],
    'memory': libc.shmget(KEY, 4096, 0) >= 0, 'queue': libc.msgget(KEY, 0) >= 0,
    'abstract': connects(socket.AF_UNIX, '\\0ringfence-left'), 'port': connects(socket.AF_INET, ('127.0.0.1', PORT)),
    'processes': sum('ringfence-left' in words(name) for name in os.listdir('/proc') if name.isdigit()) > 1}))
"""
SET_UP = f"KEY, PORT = {KEY}, 47113\n"
NOTHING = {"files": [], "memory": False, "queue": False, "abstract": False, "port": False, "processes": False}


@pytest.fixture
def left_outside() -> Iterator["subprocess.Popen[bytes]"]:
    """The control's first half: a process without a sandbox that leaves the same things."""
    code = (
        SET_UP + "import os\n" + LEAVE + "os.write(1, b'here')\nserver.accept()\nimport time\ntime.sleep(60)"
    )
    remove = "libc.shmctl(libc.shmget(KEY, 4096, 0), 0, None)\nlibc.msgctl(libc.msgget(KEY, 0), 0, None)"
    command = ["/usr/bin/python3", "-I", "-c"]
    who = {"user": USER, "group": USER, "extra_groups": []}
    process = subprocess.Popen([*command, code], stdout=subprocess.PIPE, start_new_session=True, **who)  # type: ignore[call-overload]
    try:
        assert process.stdout.read(4) == b"here"
        yield process
    finally:
        process.kill()
        process.wait()
        process.stdout.close()
        subprocess.run(
            [*command, f"{SET_UP}import ctypes\nlibc = ctypes.CDLL(None)\n{remove}"],
            check=True,
            timeout=30,
            **who,
        )  # type: ignore[call-overload]
        for path in ("/tmp/left", "/dev/shm/left"):
            if os.path.lexists(path):
                os.unlink(path)


def test_control_processes_of_one_user_share_all_of_it(
    left_outside: "subprocess.Popen[bytes]", outside: Outside
) -> None:
    """Outside, a second process of the same user finds everything that the first one left."""
    found = json.loads(outside(["/usr/bin/python3", "-I", "-c", SET_UP + SEEK]).stdout)
    assert found == {
        "files": ["/tmp/left", "/dev/shm/left"],
        **dict.fromkeys(("memory", "queue", "abstract", "port", "processes"), True),
    }


def test_nothing_is_shared(sandboxes: Sandboxes) -> None:
    """While one sandbox holds all of it, the other finds nothing; nor does a later one."""
    with sandboxes.held(SET_UP + LEAVE + "hold({'leaver': os.getpid()})"):
        assert sandboxes.ask(SET_UP + SEEK.replace("print(json.dumps(", "out((")) == NOTHING
    assert sandboxes.ask(SET_UP + SEEK.replace("print(json.dumps(", "out((")) == NOTHING


def test_private_files_of_a_neighbour_in_a_shared_mount(sandboxes: Sandboxes, shared: Path) -> None:
    """Two sandboxes with the same writable mount are both its owner there: what they share is what was asked for."""
    mount = {"filesystem.mounts": [bind(shared, "/data", "rw")]}
    sandboxes.ask("os.close(os.open('/data/x', os.O_CREAT | os.O_WRONLY, 0o600))\nout(0)", mount)
    found: dict[str, Plain] = sandboxes.ask(
        "out([os.stat('/data/x').st_uid, os.access('/data/x', os.R_OK)])", mount
    )
    assert found == [1000, True]
    assert (shared / "x").stat().st_uid == USER


def test_files_on_the_host_are_closed_to_sandboxes_and_users(
    sandboxes: Sandboxes, home: Path, outside: Outside
) -> None:
    """What Ringfence keeps of a live sandbox on the host is not readable for other users."""
    with sandboxes.held("hold(1)"):
        (entry,) = (home / "sandboxes").iterdir()
        for path in (home / "sandboxes", entry, entry / "record.json", entry / "control.sock"):
            assert outside(["cat", path]).returncode != 0
            assert outside(["ls", path]).returncode != 0
        code = f"import socket\nsocket.socket(socket.AF_UNIX).connect({str(entry / 'control.sock')!r})"
        assert outside(["/usr/bin/python3", "-I", "-c", code]).returncode != 0
