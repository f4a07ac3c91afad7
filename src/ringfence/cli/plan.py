"""``ringfence plan``: what a run would do, decided to the last byte, and nothing done."""

import argparse

from ringfence.cli.flags import add_flags
from ringfence.cli.options import (
    JOB,
    add_policy_options,
    check_workdir,
    environment,
    request,
    split,
    whole_command,
)
from ringfence.cli.parser import Parser
from ringfence.errors import one_line
from ringfence.sandbox.launch import merged_env
from ringfence.sandbox.prepare import plan_for

TYPE_CHECKING = False
if TYPE_CHECKING:
    from ringfence.plan.document import Control, Plan

_EXAMPLE = """examples:
  ringfence plan -- python3 job.py
  ringfence plan --policy strict.yaml --json | jq .oci.linux.seccomp
"""


def parser() -> Parser:
    """Return the parser of ``plan``."""
    made = Parser(
        prog="ringfence plan",
        usage="ringfence plan [OPTIONS] [--] [COMMAND [ARG ...]]",
        description="Print what `ringfence run` with the same options would do. Runs nothing, needs no privileges.",
        epilog=_EXAMPLE,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    made.add_argument("command", nargs=argparse.REMAINDER, metavar="COMMAND", help=argparse.SUPPRESS)
    add_flags(made, JOB)
    made.add_argument("--json", action="store_true", help="print the whole plan as JSON")
    made.add_argument("--oci", action="store_true", help="print only the OCI config.json")
    add_policy_options(made)
    return made


def main(argv: list[str]) -> int:
    """Run the verb; see the module's docstring."""
    words, command = split(argv)
    args = parser().parse_args(words)
    command = (args.command or []) + (command or [])
    check_workdir(args.workdir)
    plan = plan_for(request(args))
    if command or args.entrypoint or plan["entrypoint"] or plan["command"]:
        command = whole_command(plan, args.entrypoint, command)
    env = merged_env(plan["env"], environment(args.env))
    if args.json or args.oci:
        import json

        job = {"argv": command, "env": env, "cwd": args.workdir or plan["cwd"]}
        shown = plan["oci"] if plan["guest"] is None else plan["guest"]["oci"]
        print(json.dumps(shown if args.oci else {**plan, "job": job}, indent=2))
        return 0
    print("\n".join(_lines(plan, command, env, args.workdir or plan["cwd"])))
    return 0


def _lines(plan: "Plan", command: list[str], env: list[str], cwd: str) -> list[str]:
    from ringfence.plan.describe import describe

    oci, user = plan["oci"], plan["user"]
    lines = [
        f"isolation  {plan['isolation']}, by {plan['runtime']['path']} ({one_line(plan['runtime']['version'])})",
        *_guest_lines(plan),
        f"image      {one_line(plan['image']['name'])}  {plan['image']['digest']}",
        f"policy     {plan['policy_digest']}",
        f"plan       {plan['digest']}",
        f"user       {user['uid']}:{user['gid']} inside, a range of {user['range_size']} host ids of its own",
        f"job        {' '.join(one_line(repr(word)) for word in command) or '(no command given)'} in {one_line(cwd)}",
        f"env        {' '.join(one_line(item) for item in env)}",
        *(text.replace(" ", "    ", 1) for text in plan["summary"]),
        "",
        "set up, in a mount namespace of its own:",
        *(f"  {describe(op)}" for op in plan["stage"]),
        "",
        "mounted by the runtime:",
        *(
            f"  {mount['destination']}: {mount['type']} {','.join(mount['options'])}"
            for mount in oci["mounts"]
        ),
        "",
        "controls that the proof must find:",
        *(f"  {control['name']} = {_asked(control)}" for control in plan["controls"]),
    ]
    lines += [f"  note: {one_line(text)}" for text in plan["warnings"]]
    for item in plan["unenforced"]:
        lines.append(f"  {item['field']}: NOT enforced, as allowed: {item['reason']}")
    return lines


def _guest_lines(plan: "Plan") -> list[str]:
    guest, machine = plan["guest"], plan["machine"]
    if machine is not None:
        return [
            f"machine    {machine['program']} ({one_line(machine['version'])}), {machine['accelerator']}",
            f"           {machine['cpus']} CPUs, {machine['memory_bytes'] >> 20} MiB of memory",
            f"           kernel {one_line(machine['kernel'])}: {one_line(machine['command_line'])}",
            f"           devices: {', '.join(machine['devices'])}",
            *(
                f"           {disk['device']}: {one_line(disk['source'])} on {one_line(disk['target'])}, read-only"
                for disk in machine["disks"]
            ),
        ]
    if guest is None:
        return []
    mounts = (
        f"             {mount['destination']}: {mount['type']} {','.join(mount['options'])}"
        for mount in guest["oci"]["mounts"]
    )
    return [
        f"behind     {guest['program']} ({one_line(guest['version'])}), platform {guest['platform']}",
        f"           {' '.join(guest['flags'])}",
        "           mounted behind it:",
        *mounts,
    ]


def _asked(control: "Control") -> str:
    from ringfence.proof.prove import words

    return "(set for each sandbox)" if control["asked"] is None else one_line(words(control["asked"]))
