"""``ringfence run``: one command, in a fresh sandbox, under a policy, with a proof."""

import gc
import os
import stat
import sys

from ringfence.cli.flags import Flag, add_flags, quick
from ringfence.cli.options import (
    FIELDS,
    JOB,
    WHAT,
    add_policy_options,
    check_workdir,
    environment,
    request,
    split,
    whole_command,
)
from ringfence.cli.terminal import Signals, fill_standard_streams
from ringfence.errors import SandboxError, UsageError, one_line
from ringfence.sandbox import launch
from ringfence.sandbox.prepare import plan_for

TYPE_CHECKING = False
if TYPE_CHECKING:
    import argparse

    from ringfence.cli.trace import Tracing
    from ringfence.plan.document import Plan
    from ringfence.sandbox.launch import Running

# Signals that mean the end, also to a sandbox that has not started yet: SIGHUP, SIGINT, SIGQUIT, SIGTERM.
_ENDS = frozenset({1, 2, 3, 15})
_SIGNALLED = 128
_EXAMPLE = """examples:
  ringfence run -- python3 -c 'print(sum(range(10)))'
  ringfence run --memory 512m --timeout 10s -v ./data:/data -- python3 /data/job.py
  ringfence run --policy strict.yaml --proof proof.json -- ./job
"""

FLAGS = (
    Flag("-d", "--detach", kind="switch", help="leave it running and print its id"),
    Flag("--interactive", kind="switch", help="pass the terminal's input on (-it: with --tty)"),
    Flag("-t", "--tty", kind="switch", help="give the command a terminal of its own"),
    Flag("--name", default="", metavar="NAME", help="call the sandbox NAME"),
    Flag("--rm", kind="switch", help="with -d: remove it when it ends (always so without -d)"),
    *JOB,
    Flag("--no-snapshot", kind="switch", help="boot a microVM instead of restoring a saved one"),
    Flag("--trace", kind="switch", help="print the job's system calls on stderr (-i gvisor)"),
    Flag("--proof", metavar="FILE", help="write the proof as JSON; '-' prints its table on stderr"),
    Flag("--usage", kind="switch", help="print on stderr what it used"),
    Flag("--json", kind="switch", help="print one object with output, usage and verdict"),
)


def parser() -> "argparse.ArgumentParser":
    """Return the parser of ``run``."""
    import argparse

    from ringfence.cli.parser import Parser

    made = Parser(
        prog="ringfence run",
        usage="ringfence run [OPTIONS] [--] COMMAND [ARG ...]",
        description="Run COMMAND in a fresh sandbox, take the proof of what the kernel enforces, then let it go.",
        epilog=_EXAMPLE
        + "exit status: the command's own; 124 time limit; 125 nothing was run; 126, 127, 128+N",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    made.add_argument("command", nargs=argparse.REMAINDER, metavar="COMMAND", help=argparse.SUPPRESS)
    add_flags(made, FLAGS)
    add_policy_options(made)
    return made


def main(argv: list[str]) -> int:
    """Run the verb; see the module's docstring."""
    # A start makes thousands of small objects and no circles of them: looking for some would take 3 ms of it.
    gc.disable()
    fill_standard_streams()
    words, command = split(argv)
    args = quick((*FLAGS, *WHAT, *FIELDS), words) or parser().parse_args(words)
    command = (args.command or []) + (command or [])
    if args.json and (args.tty or args.detach):
        raise UsageError("--json goes with neither --tty nor --detach")
    if args.trace and args.detach:
        raise UsageError("--trace does not go with --detach: nobody would read it")
    _check_name(args.name)
    check_workdir(args.workdir)
    env = environment(args.env)
    if not command and args.image is None:
        raise UsageError("no command was given", hint="ringfence run -- COMMAND ARG ...")
    plan = plan_for(request(args))
    command = whole_command(plan, args.entrypoint, command)
    if args.trace and plan["guest"] is None:
        raise UsageError(f"the {plan['isolation']} tier has no --trace yet", hint="-i gvisor has")
    for text in plan["warnings"]:
        print(f"ringfence: note: {one_line(text)}", file=sys.stderr)
    with Signals() as signals:
        return _run(args, command, env, plan, signals)


def _run(
    args: "argparse.Namespace", command: list[str], env: list[str], plan: "Plan", signals: Signals
) -> int:
    proof_file = _ProofFile(args.proof)
    try:
        running = launch.prepare(
            plan,
            name=args.name,
            argv=command,
            detached=args.detach,
            remove=args.rm or not args.detach,
            env=env,
            cwd=args.workdir,
            traced=args.trace,
        )
    except BaseException:
        proof_file.drop()
        raise
    running.snapshots = not args.no_snapshot
    running.say = _say
    keep = False
    tracing: list[Tracing] = []
    asked: list[int] = []

    def interrupted() -> bool:
        asked.extend(number for number in signals.read() if number in _ENDS)
        return bool(asked)

    def meanwhile() -> None:
        # From the first line on: a pipe that nobody reads would stop the kernel that writes into it.
        if args.trace:
            tracing.append(_trace(running))
        _load_the_rest()

    try:
        launch.start(running, meanwhile=meanwhile, wake_fd=signals.fd, interrupted=interrupted)
        from ringfence.cli.job import Job

        job = Job(args, running, [os.fsencode(word) for word in command], env, signals)
        if args.detach:
            keep = job.detach()
            return 0
        return job.attend()
    except launch.CommandError as error:
        print(f"ringfence: {one_line(str(error))}", file=sys.stderr)
        return error.status
    except launch.Interrupted:
        # In silence, as any program that dies of a signal.
        return _SIGNALLED + asked[0]
    finally:
        try:
            if keep:
                running.let_go()
            else:
                running.close()
            for thread in tracing:
                thread.join()
        finally:
            proof_file.write(running)


def _trace(running: "Running") -> "Tracing":
    from ringfence.cli.trace import Tracing

    assert running.door is not None  # noqa: S101 - a plan without a guest was refused
    return Tracing(running.door.take_trace())


def _say(step: str) -> None:
    """Tell a person, and nobody else, why this once takes longer."""
    if os.isatty(2):
        print(f"ringfence: {one_line(step)}", file=sys.stderr, flush=True)


def _load_the_rest() -> None:
    """Load what comes after the start while the runtime is at it."""
    import ringfence.cli.job  # noqa: F401


class _ProofFile:
    """Where the proof goes; opened before anything runs, so that a bad path is a refusal and not a loss.

    Directory and file stay open: the job may be able to write there, and put a symlink to elsewhere in the way.
    """

    def __init__(self, path: str | None) -> None:
        self.path = path
        if path is None or path == "-":
            return
        home, self.name = os.path.split(path)
        self.temporary = f"{self.name}.{os.getpid()}"
        try:
            self.home = os.open(home or ".", os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
            self._check()
            flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
            self.file = os.open(self.temporary, flags, 0o644, dir_fd=self.home)
        except OSError as error:
            raise UsageError(f"cannot write the proof to {path!r}: {error.strerror}") from error

    def _check(self) -> None:
        """Refuse what is there and is no file: /dev/null would be one afterwards."""
        try:
            found = os.stat(self.name or ".", dir_fd=self.home, follow_symlinks=False)
        except FileNotFoundError:
            return
        if not stat.S_ISREG(found.st_mode):
            raise UsageError(f"cannot write the proof to {self.path!r}: it is there and is no file")

    def write(self, running: "Running") -> None:
        """Write what was proved, also when it does not hold. Raises SandboxError."""
        if self.path is None:
            return
        if self.path == "-":
            if running.proof is not None:
                from ringfence.proof.report import table

                print(table(running.proof), file=sys.stderr)
            return
        import json

        with open(self.file, "w", encoding="utf-8") as file:
            if not self._is_ours():
                raise SandboxError(
                    f"cannot write the proof to {self.path!r}: somebody has taken its file away meanwhile",
                    hint="choose a directory that the job cannot write to",
                )
            if running.proof is None:
                self.drop()
                return
            json.dump(running.proof, file, indent=1)
            file.write("\n")
        os.rename(self.temporary, self.name, src_dir_fd=self.home, dst_dir_fd=self.home)

    def drop(self) -> None:
        """Leave nothing: there is nothing to write."""
        if self.path not in (None, "-"):
            os.unlink(self.temporary, dir_fd=self.home)

    def _is_ours(self) -> bool:
        try:
            found = os.stat(self.temporary, dir_fd=self.home, follow_symlinks=False)
        except FileNotFoundError:
            return False
        return os.path.samestat(found, os.fstat(self.file))


def _check_name(name: str) -> None:
    if name and (
        len(name) > 64 or not name.isascii() or not name.replace("-", "").replace("_", "").isalnum()
    ):
        raise UsageError(
            f"--name {name!r} is not made of letters, digits, - and _", hint="at most 64 of them"
        )
