"""What an image costs until it can be run, against podman and GNU tar, in one run.

An image of many files is made from this host's own /usr (an OCI layout by umoci), pushed to a registry on loopback,
and brought here by ``podman pull`` and by ``ringfence image pull``, which take turns, each into a new store. So do
GNU tar and our own unpacking on the layer alone. Medians are reported; ratios are what to quote.

Needs root, docker-registry, skopeo, umoci, and podman.

    python benches/images.py [--mebibytes 300] [--runs 5] [--json samples.json]
"""

import argparse
import contextlib
import hashlib
import json
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from statistics import median

from ringfence.image import layers
from ringfence.image.store import make_store

CLI = str(Path(sys.executable).with_name("ringfence"))
NEEDED = ("docker-registry", "skopeo", "umoci", "podman")
MEDIA_TYPE = "application/vnd.oci.image.layer.v1.tar+gzip"
Samples = dict[str, list[float]]


class Content:
    """The layer: a tar of the host's own files, and the same compressed."""

    def __init__(self, directory: Path, mebibytes: int) -> None:
        self.tar, self.blob = directory / "layer.tar", directory / "layer.tar.gz"
        names, self.files = _pick(mebibytes << 20)
        (directory / "names").write_bytes(b"\0".join(map(os.fsencode, names)))
        command = [
            "tar",
            "-c",
            "--no-recursion",
            "--null",
            "-C",
            "/",
            "-T",
            directory / "names",
            "-f",
            self.tar,
        ]
        subprocess.run(command, check=True)
        with self.blob.open("wb") as target:
            subprocess.run(["gzip", "-6", "-c", self.tar], check=True, stdout=target)
        self.diff_id, self.digest = _digest(self.tar), _digest(self.blob)

    def push(self, directory: Path, registry: str) -> str:
        """Make an image of one layer of it, push it to `registry`, and return its reference."""
        layout = directory / "layout"
        quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
        for command in (
            ["umoci", "init", "--layout", layout],
            ["umoci", "new", "--image", f"{layout}:bench"],
            ["umoci", "raw", "add-layer", "--image", f"{layout}:bench", self.tar],
            [
                "skopeo",
                "copy",
                "--dest-tls-verify=false",
                f"oci:{layout}:bench",
                f"docker://{registry}/bench",
            ],
        ):
            subprocess.run(command, check=True, **quiet)  # type: ignore[call-overload]
        return f"{registry}/bench"


def _pick(wanted_bytes: int) -> tuple[list[str], int]:
    """Choose files of /usr, of all sizes, in directories of all kinds, until they are `wanted_bytes` together."""
    names, total, files = [], 0, 0
    for top in ("usr/share", "usr/lib/python3", "usr/include", "usr/bin", "usr/lib"):
        for directory, _, found in os.walk(f"/{top}"):
            names.append(directory[1:])
            for name in found:
                path = os.path.join(directory, name)
                size = os.lstat(path).st_size
                if size > 16 << 20:
                    continue
                names.append(path[1:])
                total, files = total + size, files + 1
                if total >= wanted_bytes:
                    return names, files
    return names, files


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return f"sha256:{hashlib.file_digest(file, 'sha256').hexdigest()}"


@contextlib.contextmanager
def registry(directory: Path) -> Iterator[str]:
    """Run a registry on a free port of the loopback interface; yield its address."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{probe.getsockname()[1]}"
    config = {
        "version": "0.1",
        "log": {"level": "error", "accesslog": {"disabled": True}},
        "storage": {"filesystem": {"rootdirectory": str(directory / "registry")}},
        "http": {"addr": address},
    }
    path = directory / "registry.json"
    path.write_text(json.dumps(config))
    with (directory / "registry.log").open("wb") as log:
        process = subprocess.Popen(["docker-registry", "serve", path], stdout=log, stderr=log)
    try:
        for _ in range(100):
            with contextlib.suppress(OSError), urllib.request.urlopen(f"http://{address}/v2/"):
                break
            time.sleep(0.05)
        yield address
    finally:
        process.terminate()
        process.wait()


def timed(samples: Samples, name: str, work: Callable[[], object]) -> None:
    """Let the disk come to rest, then add one sample in seconds."""
    os.sync()
    started = time.perf_counter()
    work()
    samples.setdefault(name, []).append(time.perf_counter() - started)


def unpack_contest(content: Content, place: Path, samples: Samples) -> None:
    """GNU tar and ours, each into a new directory and written out to the disk."""
    tree, state = place / "tree", place / "state"
    tree.mkdir()
    state.mkdir()
    make_store(str(state))

    def with_tar() -> None:
        subprocess.run(["tar", "-xpzf", content.blob, "--numeric-owner", "-C", tree], check=True)
        subprocess.run(["sync", "-f", tree], check=True)

    def with_ours() -> None:
        layers.unpack(
            str(state),
            str(content.blob),
            media_type=MEDIA_TYPE,
            digest=content.digest,
            diff_id=content.diff_id,
        )

    timed(samples, "unpack: GNU tar and sync", with_tar)
    timed(samples, "unpack: ringfence", with_ours)


def pull_contest(reference: str, place: Path, samples: Samples) -> None:
    """Podman and ours, each into a new store."""
    store, state = place / "podman", place / "ringfence"
    state.mkdir()
    podman = ["podman", "--root", store, "--runroot", place / "podman-run", "--storage-driver", "overlay"]
    environment = os.environ | {"RINGFENCE_STATE_DIR": str(state)}

    def with_podman() -> None:
        command = [*podman, "pull", "-q", "--tls-verify=false", reference]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)

    def with_ours() -> None:
        command = [CLI, "image", "pull", "-q", reference]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL, env=environment)

    timed(samples, "pull: podman", with_podman)
    timed(samples, "pull: ringfence", with_ours)
    subprocess.run([*podman, "system", "reset", "--force"], check=False, capture_output=True)


_MEMORY = """
import sys
from ringfence.image import layers
layers.unpack(sys.argv[1], sys.argv[2], media_type=sys.argv[3], digest=sys.argv[4], diff_id=sys.argv[5])
with open("/proc/self/status") as status:
    print(next(line.split()[1] for line in status if line.startswith("VmHWM")))
"""


def memory_mebibytes(content: Content, place: Path) -> float:
    """Unpack in a process of its own and return the most memory that it had."""
    place.mkdir()
    command = [
        sys.executable,
        "-c",
        _MEMORY,
        place,
        content.blob,
        MEDIA_TYPE,
        content.digest,
        content.diff_id,
    ]
    return int(subprocess.run(command, check=True, capture_output=True, text=True).stdout) / 1024


def report(samples: Samples, content: Content, memory: float) -> None:
    """Print the table."""
    mebibytes = content.tar.stat().st_size >> 20
    print(
        f"one layer: {mebibytes} MiB, {content.files} files, {content.blob.stat().st_size >> 20} MiB compressed"
    )
    print(f"{'':28} {'median':>8} {'least':>8} {'most':>8}")
    for name, values in samples.items():
        print(f"{name:28} {median(values):7.2f}s {min(values):7.2f}s {max(values):7.2f}s")
    for kind, other in (("unpack", "GNU tar and sync"), ("pull", "podman")):
        if f"{kind}: {other}" in samples:
            ratio = median(samples[f"{kind}: ringfence"]) / median(samples[f"{kind}: {other}"])
            print(f"{kind}: ringfence takes {ratio:.2f} of the time of {other}")
    print(f"memory while unpacking: {memory:.0f} MiB")


def main() -> None:
    """Run the contests."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--mebibytes", type=int, default=300)
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    missing = [name for name in NEEDED if shutil.which(name) is None]
    if missing or os.geteuid():
        sys.exit(f"needs root and {' '.join(missing or NEEDED)}")
    samples: Samples = {}
    with tempfile.TemporaryDirectory(prefix="ringfence-bench-") as name:
        home = Path(name)
        content = Content(home, arguments.mebibytes)
        with registry(home) as address:
            reference = content.push(home, address)
            # Stores are removed only at the end: ext4 is slow to make files where some have just been removed.
            for number in range(arguments.runs):
                place = home / str(number)
                place.mkdir()
                unpack_contest(content, place, samples)
                pull_contest(reference, place, samples)
        memory = memory_mebibytes(content, home / "memory")
        report(samples, content, memory)
    if arguments.json:
        arguments.json.write_text(json.dumps({"samples_s": samples, "memory_mib": memory}, indent=2) + "\n")


if __name__ == "__main__":
    main()
