"""What the linux tier costs, against crun, runc and podman on the same root file system, in one run.

The contenders take turns, so that a machine whose speed drifts drifts for all of them; medians are reported, and
ratios of medians are what to quote. Needs root, crun, runc and the image `base`; podman if it is there.

    python benches/linux.py [--runs 30] [--many 1000] [--json samples.json]
"""

import argparse
import contextlib
import json
import os
import queue
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from statistics import median

import ringfence
from ringfence.linux import libc
from ringfence.linux.paths import state_dir
from ringfence.linux.userns import make_userns
from ringfence.plan.document import Plan
from ringfence.runtime.spawn import agent_path
from ringfence.runtime.stage import Ids, Stager
from ringfence.sandbox import launch
from ringfence.sandbox.prepare import Request, plan_for
from ringfence.sandbox.run import Pipes, start_job

CLI = str(Path(sys.executable).with_name("ringfence"))
# Free for us: the last range of the pool, claimed like any other would be.
BASE = 0x7FFF0000
LIMITS = ["--ulimit", "nofile=1024:1024", "--ulimit", "nproc=1024:1024"]
Samples = dict[str, list[float]]


class Staged:
    """A worker thread that keeps the mount namespace in which a root is staged, as the set-up of a sandbox does."""

    def __init__(self, directory: str, stage: Callable[[], None]) -> None:
        """Run `stage` on the thread, in `directory` with an empty directory "staging"."""
        self.directory = directory
        self.staging = f"{directory}/staging"
        self.jobs: queue.Queue[Callable[[], None] | None] = queue.Queue()
        self.done: queue.Queue[BaseException | None] = queue.Queue()
        self.count = 0
        os.chmod(directory, 0o711)
        os.mkdir(self.staging, 0o711)
        threading.Thread(target=self._work, daemon=True).start()
        self.on_thread(stage)

    def close(self) -> None:
        """End the thread, and with it the mounts."""
        self.jobs.put(None)

    def stage(self, plan: Plan) -> None:
        """Stage the root of `plan`, in a mount namespace of the thread's own."""
        libc.unshare(libc.CLONE_NEWNS)
        libc.make_private("/")
        userns = make_userns(agent_path(), [(0, BASE, 65536)], [(0, BASE, 65536)])
        ids = Ids(base=BASE, uid=plan["user"]["uid"], gid=plan["user"]["gid"], userns=userns)
        Stager(self.staging, ids, agent_path()).run(plan["stage"])

    def on_thread(self, job: Callable[[], None]) -> None:
        """Run `job` there and wait for it; what it raises is raised here."""
        self.jobs.put(job)
        error = self.done.get()
        if error is not None:
            raise error

    def _work(self) -> None:
        while (job := self.jobs.get()) is not None:
            try:
                job()
            except BaseException as error:  # noqa: BLE001 - told to the main thread
                self.done.put(error)
            else:
                self.done.put(None)


def run_to_its_end(argv: list[str]) -> None:
    """Run a bare runtime. Pipes, as in the tiers: crun gives its standard streams to the sandbox's user."""
    reader, writer = os.pipe2(os.O_CLOEXEC)
    actions = [(os.POSIX_SPAWN_DUP2, fd, place) for place, fd in enumerate((reader, writer, writer))]
    pid = os.posix_spawn(argv[0], argv, {"PATH": os.defpath}, file_actions=actions)
    os.close(writer)
    status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    said = os.read(reader, 4096)
    os.close(reader)
    if status:
        raise RuntimeError(f"{argv[0]} failed: {said!r}")


class Bundle(Staged):
    """The bundle that Ringfence would run, with ``true`` in place of the agent, run by the bare runtime."""

    def __init__(self, directory: str, plan: Plan) -> None:
        super().__init__(directory, lambda: self._stage(plan))

    def run(self, runtime: str) -> None:
        """Run the bundle once."""
        self.count += 1
        argv = [shutil.which(runtime) or runtime, "--root", f"{self.directory}/state", "run"]
        argv += ["--bundle", f"{self.directory}/{runtime}", f"bench-{self.count}"]
        self.on_thread(lambda: run_to_its_end(argv))

    def _stage(self, plan: Plan) -> None:
        self.stage(plan)
        for runtime in ("crun", "runc"):
            config = json.loads(json.dumps(plan["oci"]))
            config["root"]["path"] = f"{self.staging}/root"
            config["hostname"] = "bench"
            config["process"] |= {"args": ["true"], "env": plan["env"], "cwd": "/work"}
            linux = config["linux"]
            linux["cgroupsPath"] = "/ringfence/bench"
            linux["namespaces"] = [{"type": space["type"]} for space in linux["namespaces"]]
            for mappings in (linux["uidMappings"], linux["gidMappings"]):
                mappings[0]["hostID"] = BASE
            os.mkdir(f"{self.directory}/{runtime}")
            Path(f"{self.directory}/{runtime}/config.json").write_text(json.dumps(config), encoding="utf-8")


def spawn(argv: list[str]) -> None:
    """Run `argv` to its end without a shell."""
    null = os.open(os.devnull, os.O_RDWR)
    try:
        pid = os.posix_spawn(argv[0], argv, os.environ, file_actions=[(os.POSIX_SPAWN_DUP2, null, 1)])
        if os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]):
            raise RuntimeError(f"{argv} failed")
    finally:
        os.close(null)


def alternate(contenders: dict[str, Callable[[], None]], runs: int) -> Samples:
    """Time each contender `runs` times, in turn, after one warm-up; milliseconds."""
    samples: Samples = {name: [] for name in contenders}
    for turn in range(runs + 1):
        for name, run in contenders.items():
            started = time.perf_counter()
            run()
            if turn:
                samples[name].append((time.perf_counter() - started) * 1000)
    return samples


def starts(runs: int, rootfs: str) -> Samples:
    """Whole processes and Python calls against the bare runtimes and podman."""
    plan = plan_for(Request(rootfs=rootfs))
    with (
        tempfile.TemporaryDirectory(prefix="bench-") as directory,
        contextlib.closing(Bundle(directory, plan)) as bundle,
    ):
        contenders: dict[str, Callable[[], None]] = {
            "python -c pass": lambda: spawn([sys.executable, "-c", "pass"]),
            "ringfence --help": lambda: spawn([CLI, "--help"]),
            "crun run": lambda: bundle.run("crun"),
            "runc run": lambda: bundle.run("runc"),
            "ringfence run (crun)": lambda: spawn([CLI, "run", "--rootfs", rootfs, "--", "true"]),
            "ringfence run --runtime runc": lambda: spawn(
                [CLI, "run", "--rootfs", rootfs, "--runtime", "runc", "--", "true"]
            ),
            "ringfence.run, cold": lambda: _api(rootfs),
            "ringfence.run, plan not cached": lambda: _uncached(rootfs),
            "ringfence.run of the image it is from": _image,
        }
        podman = shutil.which("podman")
        if podman:
            argv = [
                podman,
                "--runtime",
                "runc",
                "run",
                "--rm",
                "--network",
                "none",
                "--read-only",
                *LIMITS,
                "--rootfs",
                rootfs,
                "true",
            ]
            contenders["podman run"] = lambda: spawn(argv)
        return alternate(contenders, runs)


def _api(rootfs: str) -> None:
    if ringfence.run(["true"], rootfs=rootfs).exit_status:
        raise RuntimeError("ringfence.run failed")


def _image() -> None:
    if ringfence.run(["true"]).exit_status:
        raise RuntimeError("ringfence.run failed")


def _uncached(rootfs: str) -> None:
    os.environ["RINGFENCE_PLAN_CACHE"] = "off"
    try:
        _api(rootfs)
    finally:
        del os.environ["RINGFENCE_PLAN_CACHE"]


@contextlib.contextmanager
def at_the_gate(plan: Plan) -> Iterator[launch.Running]:
    """A sandbox whose agent waits for a job."""
    running = launch.prepare(plan, name="", argv=["echo"], detached=False, remove=True)
    try:
        launch.start(running)
        yield running
    finally:
        running.close()


def gate(runs: int, rootfs: str) -> Samples:
    """From the host's word to the job's first byte, with and without the proof in between."""
    plan = plan_for(Request(rootfs=rootfs))
    samples: Samples = {"START + proof + GO to first output": [], "GO to first output": []}
    for _ in range(runs):
        with at_the_gate(plan) as running:
            pipes = Pipes(running.owner())
            started = time.perf_counter()
            start_job(running, [b"/bin/echo", b"hi"], [], None, pipes.theirs)
            pipes.close_theirs()
            went = running.started_s
            out = next(iter(pipes.take_outputs(None, None)))  # type: ignore[arg-type]
            said = os.read(out, 10)
            now = time.monotonic()
            if said != b"hi\n":
                raise RuntimeError(f"the job said {said!r}")
            samples["GO to first output"].append((now - went) * 1000)
            samples["START + proof + GO to first output"].append((time.perf_counter() - started) * 1000)
            os.close(out)
            pipes.close()
    return samples


def memory(count: int, rootfs: str) -> dict[str, float]:
    """KiB of the agent, the only process of ours that a detached sandbox keeps."""
    names = []
    try:
        for _ in range(count):
            argv = [CLI, "run", "-d", "--rootfs", rootfs, "--timeout", "60s", "--", "sleep", "60"]
            done = subprocess.run(argv, check=True, capture_output=True, text=True)
            names.append(done.stdout.strip())
        sizes = [_agent_kib(name) for name in names]
        ours = subprocess.run(
            ["pgrep", "-f", f"{CLI} run -d"], check=False, capture_output=True, text=True
        ).stdout.split()
    finally:
        for name in names:
            subprocess.run([CLI, "rm", "--force", name], check=False, capture_output=True)
    pss, rss = (median(size[place] for size in sizes) for place in (0, 1))
    return {"agent PSS KiB": pss, "agent RSS KiB": rss, "Python processes left": float(len(ours))}


def _agent_kib(name: str) -> tuple[int, int]:
    group = Path("/sys/fs/cgroup/pids/ringfence") / name / "cgroup.procs"
    if not group.exists():
        group = Path("/sys/fs/cgroup/ringfence") / name / "cgroup.procs"
    for pid in group.read_text().split():
        status = Path(f"/proc/{pid}/status").read_text()
        if next(line for line in status.splitlines() if line.startswith("NSpid:")).split()[-1] == "1":
            rollup = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
            values = {line.split()[0]: int(line.split()[1]) for line in rollup[1:]}
            return values["Pss:"], values["Rss:"]
    raise RuntimeError(f"no agent in {group}")


def many(count: int, at_once: int, rootfs: str) -> dict[str, float]:
    """`count` runs one after the other, then `at_once` at a time; how many failed, what was left."""
    started = time.perf_counter()
    failed = sum(ringfence.run(["true"], rootfs=rootfs).exit_status != 0 for _ in range(count))
    one_by_one_s = time.perf_counter() - started
    wrong: list[BaseException | int] = []

    def worker() -> None:
        try:
            for _ in range(4):
                status = ringfence.run(["true"], rootfs=rootfs, timeout=120).exit_status
                if status:
                    wrong.append(status)
        except BaseException as error:  # noqa: BLE001 - told to the main thread
            wrong.append(error)

    threads = [threading.Thread(target=worker) for _ in range(at_once)]
    started = time.perf_counter()
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    together_s = time.perf_counter() - started
    leftovers = Path(__file__).parents[1] / "scripts" / "leftovers"
    left = subprocess.run([leftovers], check=False, capture_output=True, text=True).stdout.splitlines()
    for item in wrong:
        print(f"failed: {item!r}", file=sys.stderr)
    return {
        f"{count} runs in a row: ms each": one_by_one_s / count * 1000,
        f"{count} runs in a row: failures": failed,
        f"{at_once} at once, 4 times: ms each": together_s / (4 * at_once) * 1000,
        f"{at_once} at once, 4 times: failures": len(wrong),
        "lines of leftovers afterwards": len(left),
    }


def table(samples: Samples, against: str) -> list[str]:
    """Return Markdown rows with medians, minima and the ratio of medians to `against`."""
    base = median(samples[against])
    lines = [f"| | median ms | min ms | ratio to {against} |", "|---|---|---|---|"]
    for name, values in samples.items():
        lines.append(f"| {name} | {median(values):.1f} | {min(values):.1f} | {median(values) / base:.2f} |")
    return lines


def main() -> None:
    """Run everything and print Markdown."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--runs", type=int, default=30)
    parser.add_argument("--many", type=int, default=1000)
    parser.add_argument("--json", metavar="FILE", help="write every sample there")
    args = parser.parse_args()
    image = plan_for(Request())
    rootfs = next(op["source"] for op in image["stage"] if op["op"] == "bind")
    state_dir()
    start = starts(args.runs, rootfs)
    gates = gate(args.runs, rootfs)
    print("\n".join(table(start, "crun run")))
    print("\n| from the gate | median ms | min ms |\n|---|---|---|")
    for name, values in gates.items():
        print(f"| {name} | {median(values):.2f} | {min(values):.2f} |")
    facts = memory(5, rootfs) | many(args.many, 32, rootfs)
    print("\n| | |\n|---|---|")
    for name, value in facts.items():
        print(f"| {name} | {value:.1f} |")
    if args.json:
        data = {"starts_ms": start, "gate_ms": gates, "facts": facts}
        Path(args.json).write_text(json.dumps(data, indent=1), encoding="utf-8")


if __name__ == "__main__":
    main()
