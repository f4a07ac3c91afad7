"""A user who is not root and exists in a private mount namespace of each of his commands alone.

The passwd, group, subuid and subgid files are mounted over those of the machine, which stay as they are.
"""

import os
import random
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from commands import RINGFENCE, Done

UID, GID = 4242, 4243
# Another session of these tests may run here at the same time.
FIRST = 1_000_000 + 65_536 * random.randrange(1000)
BEYOND = FIRST + 65_536
NO_CGROUP = "limits.memory,limits.cpus,limits.cpu_weight,limits.pids,limits.io.read,limits.io.read_iops"
ACCEPTED = ("--allow-unenforced", NO_CGROUP)
OWN_ID = ("--allow-unenforced", "user,limits.threads")
_BECOME = """
for name in passwd group subuid subgid; do mount --bind "$PLACE/$name" "/etc/$name"; done
exec setpriv --reuid "$USER_ID" --regid "$GROUP_ID" --groups "$GROUPS_OF" --inh-caps=-all \
    env -i PATH=/usr/bin:/bin:/usr/sbin "HOME=$PLACE/home" "XDG_RUNTIME_DIR=$PLACE/run" "$@"
"""


class User:
    """A user of his own making: `ids` says whether he has subordinate ids."""

    def __init__(self, place: Path, *, ids: bool) -> None:
        self.place = place
        place.chmod(0o755)
        (place / "passwd").write_text(Path("/etc/passwd").read_text() + f"rfuser:x:{UID}:{GID}::/:/bin/sh\n")
        (place / "group").write_text(Path("/etc/group").read_text() + f"rfuser:x:{GID}:\n")
        for name in ("subuid", "subgid"):
            (place / name).write_text(f"rfuser:{FIRST}:65536\n" if ids else "")
        for name in ("home", "run"):
            (place / name).mkdir(mode=0o700)
            os.chown(place / name, UID, GID)

    def command(self, *words: str | Path) -> list[str | Path]:
        return ["unshare", "--mount", "--propagation", "private", "sh", "-ec", _BECOME, "sh", *words]

    def environment(self) -> dict[str, str]:
        # A supplementary group, which most users have and no job should.
        own = {"PLACE": str(self.place), "USER_ID": str(UID), "GROUP_ID": str(GID), "GROUPS_OF": "27"}
        return {**os.environ, **own}

    def __call__(self, *words: str | Path) -> Done:
        """Run ``ringfence WORDS`` as this user."""
        command = self.command(RINGFENCE, *words)
        return subprocess.run(
            command, env=self.environment(), stdin=subprocess.DEVNULL, capture_output=True, timeout=60
        )

    def run(self, *words: str | Path) -> Done:
        """Run ``ringfence run WORDS`` as this user."""
        return self("run", *words)

    def remains(self) -> list[str]:
        """Return what is left of his sandboxes."""
        run = self.place / "run/ringfence"
        return [str(path) for path in (*run.glob("sandboxes/*"), *run.glob("ranges/[0-9]*"))]


def make_user(*, ids: bool) -> Iterator[User]:
    place = Path(tempfile.mkdtemp(prefix="ringfence-user-"))
    made = User(place, ids=ids)
    reached = subprocess.run(made.command("test", "-x", RINGFENCE), env=made.environment())
    if reached.returncode:
        shutil.rmtree(place)
        pytest.skip(f"needs {RINGFENCE} to be reachable by other users")
    yield made
    assert made.remains() == []
    shutil.rmtree(place)


def processes_of_ids() -> list[str]:
    """Return the processes that run with a subordinate id of the user."""
    found = []
    for status in Path("/proc").glob("[0-9]*/status"):
        try:
            text = status.read_text()
        except OSError:
            continue
        uid = int(text.partition("\nUid:\t")[2].split()[0])
        if FIRST <= uid < BEYOND and "\nState:\tZ" not in text:  # a zombie only waits for the machine's init
            found.append(" ".join(text.splitlines()[:7]))
    return found
