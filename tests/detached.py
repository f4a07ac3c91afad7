"""The command line with sandboxes that live on: started, asked, looked at from the host, and what is left of them."""

import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import leftovers
from ringfence.cgroup.group import Cgroup
from ringfence.cgroup.group import leftovers as groups_below
from ringfence.cgroup.layout import Layout
from ringfence.host.cgroups import cgroup_facts

T = TypeVar("T")
CLI = [sys.executable, "-m", "ringfence"]
WAIT_S = 20
FACTS = cgroup_facts()


class Cli:
    """The command line in the run directory `home`; what `run`, `detached` and `running` start is of one tier."""

    def __init__(self, home: Path, isolation: str = "linux") -> None:
        self.home = home
        emulated = ("--allow-emulation",) if isolation == "microvm" else ()
        self.tier = ("--isolation", isolation, *emulated)
        self.seen: set[str] = set()
        self.started: list[subprocess.Popen[bytes]] = []
        self.logs = Path("/var/lib/ringfence/logs") / str(home.resolve()).replace("/", "%2F")

    def __call__(
        self, *words: str | bytes, stdin: bytes = b"", status: int | None = 0, **more: object
    ) -> "subprocess.CompletedProcess[bytes]":
        """Run it to its end; `status` None takes any."""
        done = subprocess.run([*CLI, *words], input=stdin, capture_output=True, timeout=WAIT_S * 3, **more)  # type: ignore[call-overload]
        assert b"Traceback" not in done.stderr, done.stderr.decode()
        assert status is None or done.returncode == status, done
        return done  # type: ignore[no-any-return]

    def run(self, *words: str | bytes, **more: object) -> "subprocess.CompletedProcess[bytes]":
        """Run ``ringfence run WORDS`` to its end."""
        return self("run", *self.tier, *words, **more)  # type: ignore[arg-type]

    def running(self, *words: str) -> "subprocess.Popen[bytes]":
        """Start ``ringfence run WORDS`` and wait for the first byte of output, a dot: the job runs."""
        process = self.start("run", *self.tier, *words, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
        assert process.stdout is not None
        first = process.stdout.read(1)
        assert first == b".", (first, process.communicate(timeout=WAIT_S))
        return process

    def start(self, *words: str, **more: object) -> "subprocess.Popen[bytes]":
        """Start it and leave it running."""
        process = subprocess.Popen([*CLI, *words], **{"stdin": subprocess.DEVNULL, **more})  # type: ignore[call-overload]
        self.started.append(process)
        return process  # type: ignore[no-any-return]

    def detached(self, *words: str, name: str = "box", options: tuple[str, ...] = ()) -> str:
        """Start a detached sandbox and return its id."""
        done = self.run("-d", "--name", name, "--timeout", "60", *options, "--", *words)
        return done.stdout.decode().strip()

    def ps(self) -> dict[str, dict[str, Any]]:
        """Return {name: facts} of `ps --all --json`."""
        return {facts["name"]: facts for facts in json.loads(self("ps", "--all", "--json").stdout)}

    def log_file(self, sandbox: str) -> Path:
        return self.logs / sandbox

    def wait_for_log(self, name: str, text: bytes) -> bytes:
        """Wait until the log of `name` has `text`."""
        return until(lambda: found if text in (found := self("logs", name).stdout) else None)

    def look(self) -> None:
        """Remember the ids of the sandboxes that are there now, for `remains`."""
        home = self.home / "sandboxes"
        self.seen |= {name.rpartition("-")[2] for name in os.listdir(home)} if home.is_dir() else set()

    def remains(self) -> list[str]:
        """Return everything that is left of the sandboxes seen: the kernel's words and files of ours."""
        found = [f"directory {name}" for name in os.listdir(self.home / "sandboxes")]
        found += [f"log {name}" for name in os.listdir(self.logs)] if self.logs.is_dir() else []
        found += [f"range {path.name}" for path, _ in leftovers._ranges(self.home)]
        found += [f"cgroup {name}" for name in set(groups_below(layout())) & self.seen]
        # Every set-up mounts below the run directory.
        mounts = Path("/proc/self/mountinfo").read_text().splitlines()
        found += [f"mount {line}" for line in mounts if str(self.home) in line]
        for process in Path("/proc").glob("[0-9]*"):
            try:
                texts = [(process / name).read_bytes() for name in ("cgroup", "cmdline", "environ")]
            except OSError:
                continue
            ids = {word.decode() for word in re.findall(rb"/ringfence/([0-9a-f]{12})", texts[0])}
            if ids & self.seen or (
                int(process.name) != os.getpid() and str(self.home).encode() in texts[1] + texts[2]
            ):
                found.append(f"process {process.name} {texts[1]!r}")
        return found


def until(look: Callable[[], T | None], wait_s: float = WAIT_S) -> T:
    """Return what `look` finds; fails when it finds nothing in time."""
    deadline = time.monotonic() + wait_s
    while not (found := look()):
        assert time.monotonic() < deadline, "it did not come to pass"
        time.sleep(0.02)
    return found


def layout() -> Layout:
    return Layout.from_dict({name: getattr(FACTS, name) for name in FACTS.__struct_fields__})


def processes(sandbox: str) -> list[int]:
    """Return the processes in the cgroup of a sandbox."""
    return Cgroup(layout(), layout().path(sandbox)).procs()


def name_of(pid: int) -> str:
    return Path(f"/proc/{pid}/comm").read_text().strip()


def agent_of(sandbox: str) -> int:
    """Return the host's id of the agent: the one whose parent is not in the sandbox."""
    pids = processes(sandbox)
    stats = {pid: Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split() for pid in pids}
    (agent,) = [pid for pid, fields in stats.items() if int(fields[1]) not in pids]
    return agent


def command_of(pid: int) -> bytes:
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes()
    except OSError:
        return b""
