"""The command line as users call it, and what every refusal must look like."""

import os
import subprocess
import sys
from pathlib import Path

RINGFENCE = str(Path(sys.executable).with_name("ringfence"))
# A private mount namespace, so that whatever a script hides or mounts is gone with it; then the command.
_IN_MOUNTS = ("unshare", "--mount", "--propagation", "private", "sh", "-ec")

Word = str | bytes
Done = subprocess.CompletedProcess[bytes]


def ringfence(
    *words: Word | Path,
    mounts: str = "",
    env: dict[str, str] | None = None,
    timeout: float = 60,
    **more: object,
) -> Done:
    """Run ``ringfence WORDS``; `mounts` is a shell script for a private mount namespace, `env` comes on top.

    The script may call "$@" itself, to look at what is left afterwards; otherwise that is its end.
    """
    command: list[Word | Path] = [RINGFENCE, *words]
    if mounts:
        script = mounts if '"$@"' in mounts else f'{mounts}\nexec "$@"'
        command = [*_IN_MOUNTS, script, "sh", *command]
    options = {"stdin": subprocess.DEVNULL, "capture_output": True, "timeout": timeout, **more}
    return subprocess.run(command, env={**os.environ, **(env or {})}, **options)  # type: ignore[call-overload,no-any-return]


def run(*words: Word | Path, **more: object) -> Done:
    """Run ``ringfence run WORDS``."""
    return ringfence("run", *words, **more)  # type: ignore[arg-type]


def refused(done: Done, status: int, *parts: str) -> str:
    """Assert one line on stderr that has all of `parts`, nothing on stdout and exit `status`; return the line."""
    said = done.stderr.decode("utf-8", "replace")
    assert done.returncode == status, said
    assert done.stdout == b""
    assert said.endswith("\n"), said
    assert said.count("\n") == 1, said
    assert said.startswith("ringfence: "), said
    assert "Traceback" not in said
    for part in parts:
        assert part in said
    return said


def remains(home: Path) -> list[str]:
    """Return what is left of sandboxes of run directory `home`; cgroups and processes are looked at in the end."""
    found = [str(path) for path in (home / "sandboxes").glob("*")]
    for path in Path("/run/ringfence/ranges").glob("[0-9]*"):
        try:
            found += [str(path)] if path.read_text().startswith(f"{home}/") else []
        except FileNotFoundError:  # somebody else's, just given back
            continue
    return found + [
        line for line in Path("/proc/self/mountinfo").read_text().splitlines() if str(home) in line
    ]
