"""Builds `base` with mmdebstrap: once, under a lock, and either wholly or not at all.

mmdebstrap writes a tar stream; base.py decides what of it stays. Whoever builds, root owns all of it inside.

mmdebstrap mounts parts of the host, /dev/shm among them, into its chroot, and leaves all that behind when it
is killed. So it runs in mount and PID namespaces that end with us, however we end, and its chroot lies on a
tmpfs in them: no process, mount or file of it is left, and no directory of ours ever leads into the host.
"""

import os
import shutil
import subprocess
import threading
import time
from collections import deque
from contextlib import suppress

import msgspec

from ringfence.errors import ImageError
from ringfence.image import store
from ringfence.image.base import write_base
from ringfence.image.find import images_dir
from ringfence.image.sources import host_suite, sources

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import IO

# The Essential packages come with them. usr-is-merged keeps out usrmerge, and with it 50 MB of Perl.
PACKAGES = ("python3", "usr-is-merged")
_MERGED_USR_HOOK = "/usr/share/mmdebstrap/hooks/merged-usr"
_NAMESPACES = ("--mount", "--propagation=private", "--pid", "--fork", "--kill-child=KILL", "--mount-proc")
_ON_TMPFS = 'mount -t tmpfs -o size=2g,mode=1777 none /tmp && exec "$@"'  # a chroot of about 200 MB
_USER_HINT = (
    "check the network; /etc/subuid and /etc/subgid must give you a range; or let root build it, once for all"
)
_STEPS = ("I: downloading ", "I: extracting ", "I: installing ", "I: creating ")


def bootstrap(
    state: str, *, suite: str, force: bool, say: "Callable[[str], None]"
) -> tuple[store.Manifest, bool]:
    """Return the manifest of `base` in `state` and whether it was built now; with `force` it is built anew.

    `suite` is "bookworm", "trixie" or "auto" (the host's own, where that is one of the two); `say` is told
    each step. Raises ImageError.
    """
    with store.locked(state, lambda: say("waiting for another bootstrap")) as lock:
        found = store.manifest(state, "base")
        wanted = _suite(suite)
        if found is not None and not force and suite in ("auto", found.suite):
            return found, False
        home = os.path.join(images_dir(state), "base")
        building = os.path.join(home, f"{store.BUILDING}{os.getpid()}")
        try:
            store.make_directory(home)
            store.sweep(state, "base")
            store.make_directory(building)
            made = _build(building, wanted, lock, say)
            store.publish(home, os.path.join(building, "image"), made.digest)
        except OSError as error:
            raise ImageError(
                f"cannot build base in {home}: {error.strerror}", hint="check space and rights"
            ) from error
        finally:
            store.remove_tree(building)
        store.sweep(state, "base")
        return made, True


def _suite(suite: str) -> str:
    if suite != "auto":
        return suite
    with open("/etc/os-release", encoding="utf-8", errors="replace") as file:
        return host_suite(file.read())


def _build(building: str, suite: str, lock: int, say: "Callable[[str], None]") -> store.Manifest:
    image = os.path.join(building, "image")
    root = os.path.join(image, "rootfs")
    store.make_directory(image)
    say(f"bootstrapping Debian {suite}: half a minute or so")
    lines = sources(suite)
    digest, size_bytes = _unpack(_mmdebstrap(suite, lock, listed=bool(lines)), lines, root, say)
    made = store.Manifest(
        name="base",
        digest=digest,
        suite=suite,
        architecture=_output("dpkg", "--print-architecture").strip(),
        created=time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        size_bytes=size_bytes,
        packages=_packages(root),
    )
    with open(os.path.join(image, "manifest.json"), "wb") as file:
        os.fchmod(file.fileno(), 0o644)
        file.write(msgspec.json.format(msgspec.json.encode(made)) + b"\n")
    return made


def _mmdebstrap(suite: str, lock: int, *, listed: bool) -> "subprocess.Popen[bytes]":
    """Start mmdebstrap, which writes a tar to standard output.

    With `listed` it reads its sources from standard input, where no other user sees them; else it has own ones.
    """
    for program in ("mmdebstrap", "mount", "setpriv", "unshare", "dpkg-query"):
        if shutil.which(program) is None:
            raise ImageError(
                f"{program} is not installed", hint="apt-get install mmdebstrap mount util-linux dpkg"
            )
    mapped = [] if os.geteuid() == 0 else ["--map-root-user", "--map-auto"]
    command = ["setpriv", "--pdeathsig=KILL", "unshare", *mapped, *_NAMESPACES, "sh", "-c", _ON_TMPFS, "sh"]
    command += ["mmdebstrap", "--mode=root", "--variant=essential", "--format=tar"]
    command += [f"--include={','.join(PACKAGES)}"]
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
    process: "subprocess.Popen[bytes]", lines: str, root: str, say: "Callable[[str], None]"
) -> tuple[str, int]:
    """Feed the process, unpack what it writes into `root`, and see that both end well; else it is stopped."""
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
            result = write_base(process.stdout, root)
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
    return result


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


def _packages(root: str) -> dict[str, str]:
    database = f"--admindir={root}/var/lib/dpkg"
    listing = _output("dpkg-query", database, "--show", "--showformat=${Package}\t${Version}\n")
    return dict(line.split("\t") for line in listing.splitlines())


def _output(*command: str) -> str:
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout
