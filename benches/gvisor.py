"""What the gVisor tier costs: its start against a bare ``runsc run``, and a job's work against the linux tier.

The contenders take turns, so that a machine whose speed drifts drifts for all of them; medians are reported, and
ratios of medians are what to quote. Needs root, crun, runsc, gcc with a static libc, and the image `base`.

    python benches/gvisor.py [--runs 20] [--rounds 3] [--json samples.json]
"""

import argparse
import contextlib
import json
import os
import shutil
import subprocess
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median

import ringfence
from linux import CLI, Samples, Staged, alternate, run_to_its_end, spawn, table
from ringfence.plan.document import Guest, Plan
from ringfence.sandbox.prepare import Request, plan_for

HERE = Path(__file__).parent
GVISOR = {"isolation": "gvisor"}


class Bare(Staged):
    """The guest's bundle with ``true`` in place of the agent and the same flags, run by runsc alone, as root."""

    def __init__(self, directory: str, plan: Plan) -> None:
        guest = plan["guest"]
        assert guest is not None
        self.argv = [guest["program"], "--root", f"{directory}/state", *guest["flags"]]
        super().__init__(directory, lambda: self._stage(plan, guest))

    def run(self) -> None:
        """Run the bundle once."""
        self.count += 1
        argv = [*self.argv, "run", "--bundle", f"{self.directory}/bundle", f"bench-{self.count}"]
        self.on_thread(lambda: run_to_its_end(argv))

    def _stage(self, plan: Plan, guest: Guest) -> None:
        self.stage(plan)
        config = json.loads(json.dumps(guest["oci"]))
        config["root"]["path"] = f"{self.staging}/root"
        config["hostname"] = "bench"
        config["process"] |= {"args": ["true"], "env": plan["env"], "cwd": "/work"}
        for mount in config["mounts"]:
            if mount["type"] == "bind":
                mount["source"] = f"{self.staging}{mount['source']}"
        os.mkdir(f"{self.directory}/bundle")
        Path(f"{self.directory}/bundle/config.json").write_text(json.dumps(config), encoding="utf-8")


def starts(runs: int) -> Samples:
    """Whole processes and Python calls against the bare runtime."""
    plan = plan_for(Request(overrides=GVISOR))
    with (
        tempfile.TemporaryDirectory(prefix="bench-") as directory,
        contextlib.closing(Bare(directory, plan)) as bare,
    ):
        contenders: dict[str, Callable[[], None]] = {
            "runsc run": bare.run,
            "ringfence run -i gvisor": lambda: spawn([CLI, "run", "-i", "gvisor", "--", "true"]),
            "ringfence.run, cold": lambda: _api("gvisor"),
            "ringfence.run at the linux tier": lambda: _api("linux"),
        }
        return alternate(contenders, runs)


def _api(isolation: str) -> None:
    if ringfence.run(["true"], isolation=isolation).exit_status:
        raise RuntimeError("ringfence.run failed")


def costs(rounds: int) -> dict[str, dict[str, list[float]]]:
    """Nanoseconds for each thing that costs.c does, by tier: {thing: {tier: [one value a round]}}."""
    found: dict[str, dict[str, list[float]]] = {}
    with tempfile.TemporaryDirectory(prefix="bench-") as directory:
        os.chmod(directory, 0o755)
        program = f"{directory}/costs"
        compiler = shutil.which("musl-gcc") or "gcc"
        subprocess.run([compiler, "-O2", "-static", "-o", program, HERE / "costs.c"], check=True)
        mount = [{"source": directory, "target": "/bench"}]
        for _ in range(rounds):
            for tier in ("linux", "gvisor"):
                fields = {"filesystem.mounts": mount, "limits.memory": "512MiB", "limits.cpus": 2}
                # A library of the image: what a job reads most.
                argv = ["/bench/costs", "/work", "/usr/lib/x86_64-linux-gnu/libc.so.6"]
                result = ringfence.run(argv, isolation=tier, overrides=fields, timeout=300)
                if result.exit_status:
                    raise RuntimeError(result.stderr.decode())
                for line in result.stdout.decode().splitlines():
                    name, value = line.split()
                    found.setdefault(name, {}).setdefault(tier, []).append(float(value))
    return found


def exec_ms(runs: int) -> dict[str, float]:
    """Milliseconds of `ringfence exec -- true` in a sandbox of each tier, whole process."""
    found = {}
    for tier in ("linux", "gvisor"):
        argv = [CLI, "run", "-d", "-i", tier, "--timeout", "600s", "--", "sleep", "600"]
        name = subprocess.run(argv, check=True, capture_output=True, text=True).stdout.strip()
        try:
            samples = []
            for _ in range(runs):
                started = time.perf_counter()
                spawn([CLI, "exec", name, "--", "true"])
                samples.append((time.perf_counter() - started) * 1000)
            found[f"`ringfence exec -- true`, {tier}, median ms"] = median(samples)
        finally:
            subprocess.run([CLI, "rm", "--force", name], check=False, capture_output=True)
    return found


def memory(count: int) -> dict[str, float]:
    """KiB of each part of an idle detached sandbox, PSS, and how many processes of ours beside the door there are."""
    parts: dict[str, list[float]] = {}
    for _ in range(count):
        argv = [CLI, "run", "-d", "-i", "gvisor", "--timeout", "60s", "--", "sleep", "60"]
        name = subprocess.run(argv, check=True, capture_output=True, text=True).stdout.strip()
        try:
            time.sleep(0.5)
            for part, kib in _parts(name).items():
                parts.setdefault(part, []).append(kib)
        finally:
            subprocess.run([CLI, "rm", "--force", name], check=False, capture_output=True)
    return {f"{part}, PSS KiB": median(values) for part, values in parts.items()}


def _parts(name: str) -> dict[str, float]:
    group = Path("/sys/fs/cgroup/pids/ringfence") / name / "cgroup.procs"
    if not group.exists():
        group = Path("/sys/fs/cgroup/ringfence") / name / "cgroup.procs"
    sizes: dict[str, float] = {}
    for pid in group.read_text().split():
        command = Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")[0].decode()
        part = {"runsc-sandbox": "sentry", "runsc-gofer": "gofer", "/.ringfence": "door (ours)"}.get(
            command, "stand-ins of the job's processes"
        )
        lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
        sizes[part] = sizes.get(part, 0) + next(float(li.split()[1]) for li in lines if li.startswith("Pss:"))
    return sizes


def main() -> None:
    """Run everything and print Markdown."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--runs", type=int, default=20)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--json", metavar="FILE", help="write every sample there")
    args = parser.parse_args()
    start = starts(args.runs)
    work = costs(args.rounds)
    facts = exec_ms(args.runs) | memory(5)
    print("\n".join(table(start, "runsc run")))
    print("\n| a job's work | linux ns | gvisor ns | ratio |\n|---|---|---|---|")
    for name, by_tier in work.items():
        one, other = median(by_tier["linux"]), median(by_tier["gvisor"])
        print(f"| {name} | {one:.0f} | {other:.0f} | {other / one:.1f} |")
    print("\n| | |\n|---|---|")
    for name, value in facts.items():
        print(f"| {name} | {value:.1f} |")
    if args.json:
        data = {"starts_ms": start, "costs_ns": work, "facts": facts}
        Path(args.json).write_text(json.dumps(data, indent=1), encoding="utf-8")


if __name__ == "__main__":
    main()
