"""Builds images from Debian packages with mmdebstrap, for a machine that has no registry; `base` is one of them.

mmdebstrap writes a tar stream; base.py decides what of it stays; then it is an image of one layer like any other.

mmdebstrap mounts parts of the host, /dev/shm among them, into its chroot, and leaves all that behind when it
is killed. So it runs in mount and PID namespaces that end with us, however we end, and its chroot lies on a
tmpfs in them: no process, mount or file of it is left, and no directory of ours ever leads into the host.
"""

import os
import re
import shutil
import subprocess
import threading
import time
from collections import deque
from contextlib import suppress

from ringfence.errors import ImageError
from ringfence.image import store
from ringfence.image.base import BASE, DEBIAN, Recipe, rewrite
from ringfence.image.importing import making
from ringfence.image.sources import SUITES, host_suite, sources

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import IO

    from ringfence.image.record import ImageRecord

_MERGED_USR_HOOK = "/usr/share/mmdebstrap/hooks/merged-usr"
_NAMESPACES = ("--mount", "--propagation=private", "--pid", "--fork", "--kill-child=KILL", "--mount-proc")
_ON_TMPFS = 'mount -t tmpfs -o size=75%,mode=1777 none /tmp && exec "$@"'  # a chroot of about 200 MB
_USER_HINT = (
    "check the network; /etc/subuid and /etc/subgid must give you a range; or let root build it, once for all"
)
_STEPS = ("I: downloading ", "I: extracting ", "I: installing ", "I: creating ")
# Source: Debian Policy 5.6.1, "Source"; the names of packages follow the same rule.
_PACKAGE = re.compile(r"[a-z0-9][a-z0-9+.-]+")


def bootstrap(
    state: str,
    what: str,
    *,
    name: str,
    suite: str = "auto",
    include: tuple[str, ...] = (),
    force: bool = False,
    say: "Callable[[str], None]",
) -> "tuple[ImageRecord, bool]":
    """Return the image `name` made of `what`, and whether it was built now; with `force` it is built anew.

    `what` is "base", of the given `suite`, or "debian:SUITE"; `suite` is "bookworm", "trixie" or "auto" (the host's
    own, where that is one of the two); `include` names more packages. `say` is told each step. Raises ImageError.
    """
    from ringfence.image.reference import encode

    recipe, wanted = _recipe(what, suite)
    for package in include:
        if not _PACKAGE.fullmatch(package):
            raise ImageError(f"{package!r} is no name of a Debian package")
    packages = tuple(dict.fromkeys((*recipe.packages, *sorted(include))))
    made_by = f"ringfence image bootstrap {what}, Debian {wanted}: {' '.join(packages)}"
    with store.named(state, encode(name), lambda: say("waiting for another bootstrap")) as lock:
        found = _found(state, name)
        if (
            found is not None
            and not force
            and _is_it(found, made_by, any_suite=suite == "auto" and what == "base")
        ):
            return found, False
        with making(state) as work:
            say(f"bootstrapping Debian {wanted}: half a minute or so")
            lines = sources(wanted)
            started_s = int(time.time())
            try:
                layer = work.plain_layer(
                    lambda out: _unpack(
                        _mmdebstrap(recipe, packages, wanted, lock, listed=bool(lines)),
                        lines,
                        lambda stream: rewrite(stream, out, recipe, started_s=started_s),
                        say,
                    )
                )
            except OSError as error:
                raise store.cannot("build in", store.images_dir(state), error) from error
            record = work.image(
                name,
                layer,
                source=f"bootstrap:{what}",
                made_by=made_by,
                command=recipe.command,
                env=recipe.env,
                # Root owns all in it and nobody else can change any of it, so every user of this host may run it.
                shared=recipe.cut_down and os.geteuid() == 0,
                say=say,
            )
        return record, True


def _recipe(what: str, suite: str) -> tuple[Recipe, str]:
    """Return the recipe and the suite that `what` and `suite` mean together."""
    distribution, _, tag = what.partition(":")
    recipe = {"base": BASE, "debian": DEBIAN}.get(distribution)
    if recipe is None or (recipe is BASE and tag) or (tag and suite not in ("auto", tag)):
        raise ImageError(
            f"cannot bootstrap {what!r}" + (f" of the suite {suite!r}" if suite != "auto" else ""),
            hint=f"take base, or one of: {', '.join(f'debian:{one}' for one in SUITES)}",
        )
    chosen = tag or suite
    if chosen == "auto":
        with open("/etc/os-release", encoding="utf-8", errors="replace") as file:
            chosen = host_suite(file.read())
    if chosen not in SUITES:
        raise ImageError(f"no suite {chosen!r}", hint=f"take one of: {', '.join(SUITES)}")
    return recipe, chosen


def _found(state: str, name: str) -> "ImageRecord | None":
    digest = store.resolve(state, name)
    return None if digest is None else store.read_record(state, digest)


def _is_it(record: "ImageRecord", made_by: str, *, any_suite: bool) -> bool:
    """Say whether `record` was made so; a base that is there is good enough, whatever suite this host has now."""
    found = record.history[0].created_by if record.history else ""
    return found == made_by or (any_suite and found.startswith(made_by.partition(",")[0] + ","))


def _mmdebstrap(
    recipe: Recipe, packages: tuple[str, ...], suite: str, lock: int, *, listed: bool
) -> "subprocess.Popen[bytes]":
    """Start mmdebstrap, which writes a tar to standard output.

    With `listed` it reads its sources from standard input, where no other user sees them; else it has own ones.
    """
    for program in ("mmdebstrap", "mount", "setpriv", "unshare"):
        if shutil.which(program) is None:
            raise ImageError(
                f"{program} is not installed", hint="apt-get install mmdebstrap mount util-linux"
            )
    mapped = [] if os.geteuid() == 0 else ["--map-root-user", "--map-auto"]
    command = ["setpriv", "--pdeathsig=KILL", "unshare", *mapped, *_NAMESPACES, "sh", "-c", _ON_TMPFS, "sh"]
    command += ["mmdebstrap", "--mode=root", f"--variant={recipe.variant}", "--format=tar"]
    command += [f"--include={','.join(packages)}"]
    command += [f"--hook-dir={_MERGED_USR_HOOK}"] if os.path.isdir(_MERGED_USR_HOOK) else []
    command += [suite, "-", "-"] if listed else [suite, "-"]
    passed_on = {
        name: os.environ[name] for name in os.environ if name.lower().endswith("_proxy") or name == "HOME"
    }
    environment = passed_on | {"LC_ALL": "C.UTF-8", "PATH": "/usr/sbin:/usr/bin:/sbin:/bin"}
    return subprocess.Popen(
        command,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env=environment,
        cwd="/",
        pass_fds=[lock],  # so that nobody builds beside an mmdebstrap that outlives us
    )


def _unpack(
    process: "subprocess.Popen[bytes]",
    lines: str,
    consume: "Callable[[IO[bytes]], object]",
    say: "Callable[[str], None]",
) -> None:
    """Feed the process, let `consume` read what it writes, and see that both end well; else it is stopped."""
    assert process.stdin and process.stdout and process.stderr  # noqa: S101 - for the type checker: all are pipes
    last: deque[str] = deque(maxlen=5)
    listener = threading.Thread(target=_listen, args=(process.stderr, last, say), daemon=True)
    listener.start()
    broken = None
    try:
        with suppress(BrokenPipeError):  # it has ended already, and its status says more
            process.stdin.write(lines.encode())
            process.stdin.close()
        try:
            consume(process.stdout)
        except ImageError as error:
            broken = error
        _drain(process.stdout)
        status = process.wait()
    finally:
        _stop(process, process.stdout)
        listener.join()
        process.stdout.close()
        process.stderr.close()
    if status != 0:
        raise ImageError(
            f"mmdebstrap ended with status {status}: {' | '.join(last)}",
            hint="check the network and the apt sources of this host" if os.geteuid() == 0 else _USER_HINT,
        )
    if broken is not None:
        raise broken


def _listen(stream: "IO[bytes]", last: deque[str], say: "Callable[[str], None]") -> None:
    """Pass on mmdebstrap's own steps ("I: ..."); keep its last lines for an error."""
    for raw in stream:
        line = raw.decode("utf-8", "replace").strip()
        if line.startswith(_STEPS):
            say(line[3:].rstrip("."))
        elif line:
            last.append(line)


def _stop(process: "subprocess.Popen[bytes]", output: "IO[bytes]") -> None:
    """End the process and its children if they still run, and wait until the last of them is gone."""
    if process.poll() is not None:
        return
    process.kill()  # its namespaces go with it, and all that is in them
    _drain(output)
    process.wait()


def _drain(output: "IO[bytes]") -> None:
    """Read to the end, which comes when no process is left that could write."""
    while output.read(1 << 16):
        pass
