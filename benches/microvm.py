"""What the microVM tier costs: a boot against a restore, phase by phase, by kernel, with its memory, and eight at once.

The contenders take turns, so that a machine whose speed drifts drifts for all of them; medians are reported, and
ratios of medians are what to quote. Where KVM does not work the machines are emulated, and say little about KVM.
Needs root, crun, QEMU, the image `base`, and a kernel (``ringfence kernel build``; ``fetch`` for the comparison).

    python benches/microvm.py [--runs 10] [--json samples.json]
"""

import argparse
import json
import os
import subprocess
import threading
import time
from pathlib import Path
from statistics import median

import ringfence
from linux import CLI, Samples, alternate, spawn, table
from ringfence.host.detect import detect
from ringfence.linux.paths import state_dir
from ringfence.runtime.microvm.kernels.store import kernels
from ringfence.sandbox import launch, protocol
from ringfence.sandbox.prepare import Request, plan_for
from ringfence.sandbox.run import Pipes

RUN = [CLI, "run", "-i", "microvm", "--allow-emulation"]
PHASES = ("ring and VMM started", "guest at the gate", "job held and proved", "first output")


def starts(runs: int) -> Samples:
    """Whole processes, booted and restored, beside the other tiers."""
    spawn([*RUN, "--", "true"])  # so that there is a snapshot to restore
    return alternate(
        {
            "boot": lambda: spawn([*RUN, "--no-snapshot", "--", "true"]),
            "restore": lambda: spawn([*RUN, "--", "true"]),
            "ringfence run -i gvisor": lambda: spawn([CLI, "run", "-i", "gvisor", "--", "true"]),
            "ringfence run -i linux": lambda: spawn([CLI, "run", "--", "true"]),
        },
        runs,
    )


def phases(runs: int) -> dict[str, dict[str, list[float]]]:
    """Milliseconds from the start to the end of each phase, {"boot" | "restore": {phase: [one a run]}}."""
    found: dict[str, dict[str, list[float]]] = {}
    for _ in range(runs):
        for way in ("boot", "restore"):
            for phase, value in _once(snapshots=way == "restore").items():
                found.setdefault(way, {}).setdefault(phase, []).append(value)
    return found


def _once(*, snapshots: bool) -> dict[str, float]:
    plan = plan_for(Request(overrides={"isolation": "microvm"}, allow_emulation=True))
    started = time.perf_counter()
    marks: list[float] = []
    running = launch.prepare(plan, name="", argv=["echo"], detached=False, remove=True)
    running.snapshots = snapshots
    pipes = None
    try:
        launch.start(running, meanwhile=lambda: marks.append(time.perf_counter()))
        marks.append(time.perf_counter())
        pipes = Pipes(running.owner())
        env = [os.fsencode(item) for item in plan["env"]]
        frame = protocol.encode_start([b"/bin/echo", b"hi"], env, b"/work", flags=protocol.HOLD)
        reported = launch.hold(running, frame, pipes.theirs)
        launch.prove_held(running, reported)
        marks.append(time.perf_counter())
        launch.go(running)
        pipes.close_theirs()
        out = next(iter(pipes.take_outputs(None, None)))  # type: ignore[arg-type]
        if os.read(out, 10) != b"hi\n":
            raise RuntimeError("the job did not say hi")
        marks.append(time.perf_counter())
        os.close(out)
    finally:
        if pipes is not None:
            pipes.close()
        running.close()
    return {phase: (mark - started) * 1000 for phase, mark in zip(PHASES, marks, strict=True)}


def by_kernel(runs: int) -> Samples:
    """Boots with each kind of kernel that is here; the choice is put back afterwards."""
    here = {kernel.kind: kernel.name for kernel in kernels(state_dir())}
    before = os.readlink(f"{state_dir()}/kernels/default")
    wanted = [kind for kind in ("built", "fetched") if kind in here]

    def boot(kind: str) -> None:
        subprocess.run([CLI, "kernel", "use", here[kind]], check=True, capture_output=True)
        spawn([*RUN, "--no-snapshot", "--timeout", "60s", "--", "true"])

    try:
        return alternate({f"boot, {kind} kernel": lambda kind=kind: boot(kind) for kind in wanted}, runs)  # type: ignore[misc]
    finally:
        subprocess.run([CLI, "kernel", "use", before], check=True, capture_output=True)


def memory() -> dict[str, float]:
    """KiB of the parts of an idle detached machine, PSS."""
    argv = [*RUN, "-d", "--timeout", "60s", "--", "sleep", "60"]
    name = subprocess.run(argv, check=True, capture_output=True, text=True).stdout.strip()
    try:
        time.sleep(1)
        group = Path("/sys/fs/cgroup/pids/ringfence") / name / "cgroup.procs"
        if not group.exists():
            group = Path("/sys/fs/cgroup/ringfence") / name / "cgroup.procs"
        sizes: dict[str, float] = {}
        for pid in group.read_text().split():
            command = Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")[0].decode()
            part = "bridge (ours), PSS KiB" if command == "/.ringfence" else "VMM with its guest, PSS KiB"
            lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
            pss = next(float(line.split()[1]) for line in lines if line.startswith("Pss:"))
            sizes[part] = sizes.get(part, 0) + pss
        return sizes
    finally:
        subprocess.run([CLI, "rm", "--force", name], check=False, capture_output=True)


def together(count: int) -> dict[str, float]:
    """`count` restored machines at once: seconds until all have ended, and how many failed."""
    wrong: list[object] = []

    def one() -> None:
        try:
            result = ringfence.run(["true"], isolation="microvm", allow_emulation=True, timeout=120)
            if result.exit_status:
                wrong.append(result)
        except ringfence.RingfenceError as error:
            wrong.append(error)

    threads = [threading.Thread(target=one) for _ in range(count)]
    started = time.perf_counter()
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return {
        f"{count} at once: seconds for all": time.perf_counter() - started,
        f"{count} at once: failures": float(len(wrong)),
    }


def main() -> None:
    """Run everything and print Markdown."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--runs", type=int, default=10)
    parser.add_argument("--json", metavar="FILE", help="write every sample there")
    args = parser.parse_args()
    print(f"KVM: {detect().kvm}\n")
    whole = starts(args.runs)
    parts = phases(args.runs)
    kernel = by_kernel(max(2, args.runs // 2))
    facts = memory() | together(8)
    print("\n".join(table(whole, "boot")))
    print("\n| until | boot, median ms | restore, median ms | ratio |\n|---|---|---|---|")
    for phase in PHASES:
        one, other = median(parts["boot"][phase]), median(parts["restore"][phase])
        print(f"| {phase} | {one:.0f} | {other:.0f} | {other / one:.2f} |")
    print()
    if kernel:
        print("\n".join(table(kernel, next(iter(kernel)))))
    print("\n| | |\n|---|---|")
    for name, value in facts.items():
        print(f"| {name} | {value:.1f} |")
    if args.json:
        data = {"starts_ms": whole, "phases_ms": parts, "kernels_ms": kernel, "facts": facts}
        Path(args.json).write_text(json.dumps(data, indent=1), encoding="utf-8")


if __name__ == "__main__":
    main()
