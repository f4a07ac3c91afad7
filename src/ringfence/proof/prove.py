"""Compare what was asked with what was observed, control by control. On the way of every run."""

from __future__ import annotations

import os
import time

from ringfence.proof.observe import Subject, id_map, mounts, observe, sources, sysctls

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import TypedDict

    from ringfence.plan.document import Control, Plan, Value, Vantage
    from ringfence.proof.guest import Guest
    from ringfence.proof.observe import Mount, Seen
    from ringfence.runtime.base import Instance

    class Line(TypedDict):
        """One control: `ok` is None where nothing was to be observed."""

        control: str
        field: str
        asked: Value
        observed: Value
        vantage: Vantage
        source: str
        ok: bool | None

    class Proof(TypedDict):
        """All of them, at one moment; the JSON that --proof writes."""

        format: int
        moment: str
        taken_at: str
        sandbox: str
        isolation: str
        runtime: str
        policy_digest: str
        plan_digest: str
        image: str
        image_digest: str
        holds: bool
        unenforced: list[str]
        lines: list[Line]


MOMENT = "before the job's first instruction"
# What gVisor calls the ids of its sentry; see ringfence.runtime.rootless.
NOBODY = 65534
# Kept by Ringfence itself while the job runs; the kernel has nothing to show of them beforehand.
_KEPT = (("time_s", "limits.time"), ("output_bytes", "limits.output"))
_MOST_DESCRIPTORS = 64
# What a user who is not root cannot see of a process with other ids; the agent reports it instead.
_UNSEEN_ROOTLESS = frozenset({"descriptors", "hostname"})


def prove(
    plan: Plan,
    instance: Instance,
    subject: Subject,
    *,
    reported_descriptors: int,
    guest: Guest | None = None,
) -> Proof:
    """Return the proof for the process `subject`; it holds if every asked control was observed as asked.

    `reported_descriptors` is the agent's own count of the held process's descriptors, which stands in, as
    "reported", where this process may not look. Of a tier with a kernel of its own, `subject` is the process that
    is this kernel, and `guest` what it reports and the ids of the parts around it; without, next to nothing holds.
    """
    told: Seen = {}
    if plan["isolation"] == "linux":
        seen = observe(subject)
        seen |= sysctls(subject.pid, plan["oci"]["linux"]["sysctl"])
        seen |= _mounts(plan, subject)
        seen |= _filter(plan, subject)
    else:
        from ringfence.proof.guest import look

        seen, told = look(plan, subject, guest, reported_descriptors)
    lines = [_line(control, _asked(control, plan, instance), seen, told) for control in plan["controls"]]
    if plan["rootless"] and plan["isolation"] == "linux":
        lines = [_from_agent(line, reported_descriptors) for line in lines]
    lines += [_kept(field, plan[key]) for key, field in _KEPT if plan[key] is not None]  # type: ignore[literal-required]
    machine = plan["machine"]
    if machine:
        lines += [_kept_inside(field, field, value) for field, value in machine["job_limits"].items()]
        lines += _sysctls_inside(machine["setup"])
    lines += [_not_enforced(item["field"], item["reason"]) for item in plan["unenforced"]]
    return {
        "format": 1,
        "moment": MOMENT,
        "taken_at": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "sandbox": instance.id,
        "isolation": plan["isolation"],
        "runtime": _runtime(plan),
        "policy_digest": plan["policy_digest"],
        "plan_digest": plan["digest"],
        "image": plan["image"]["name"],
        "image_digest": plan["image"]["digest"],
        "holds": not any(line["ok"] is False for line in lines),
        "unenforced": [item["field"] for item in plan["unenforced"]],
        "lines": lines,
    }


def _runtime(plan: Plan) -> str:
    """Return the version of what carries the plan out: for a kernel of its own, that of this and of what is around."""
    outer = plan["runtime"]["version"] or plan["runtime"]["name"]
    guest, machine = plan.get("guest"), plan.get("machine")
    if machine:
        return f"{machine['version']} ({machine['accelerator']}) in {outer}"
    return f"{guest['version']} ({guest['platform']}) in {outer}" if guest else outer


def _filter(plan: Plan, subject: Subject) -> Seen:
    """Try the plan's sample calls on the filter that the kernel holds for the subject."""
    if not plan["filter_samples"]:
        return {}
    from ringfence.proof.filter import answers

    try:
        found = answers(subject.pid, plan["filter_samples"])
    except (OSError, ValueError, IndexError):
        return {}
    return {"seccomp.answers": (found, f"PTRACE_SECCOMP_GET_FILTER of {subject.pid}")}


def failures(proof: Proof) -> list[str]:
    """Return "control: asked X, observed Y" for each control that does not hold."""
    return [
        f"{line['control']}: asked {words(line['asked'])}, "
        + (f"{line['vantage']} {words(line['observed'])}" if line["source"] else "not observed")
        for line in proof["lines"]
        if line["ok"] is False
    ]


def words(value: Value) -> str:
    """Return a value as a person reads it."""
    if isinstance(value, list):
        return ", ".join(value) if value else "none"
    if isinstance(value, bool):
        return "yes" if value else "no"
    return "no limit" if value is None else str(value)


def _asked(control: Control, plan: Plan, instance: Instance) -> Value:
    """Fill in what is known only of this sandbox."""
    if control["name"] == "credentials.range":
        return asked_range(plan, instance)
    if control["name"] == "hostname":
        return instance.id
    if plan["isolation"] != "linux":
        from ringfence.proof.guest import asked_of

        return asked_of(control, plan, instance)
    return control["asked"]


def asked_range(plan: Plan, instance: Instance) -> str:
    """Return the id map that this sandbox's user namespace has to have, as `ringfence.proof.observe.id_map`."""
    base, size = instance.base, plan["user"]["range_size"]
    if not plan["rootless"]:
        return f"0 {base} {size}"
    # A user's own id stands for root inside: see ringfence.runtime.rootless.
    others = f"; 1 {base + 1} {size - 1}" if size else ""
    if size and plan["guest"] is not None:
        others = f"; 1 {base + 1} {size - 2}; {NOBODY} {base + size - 1} 1"
    return id_map(f"0 {os.geteuid()} 1{others}", f"0 {os.getegid()} 1{others}")


def _line(control: Control, asked: Value, seen: Seen, told: Seen) -> Line:
    """Compare; what was seen counts before what was told, which is hardly more than a claim."""
    name = control["name"]
    value, source = seen.get(name) or told.get(name) or (None, "")
    vantage: Vantage = "observed" if name in seen else "reported" if name in told else "not observable"
    return {
        "control": name,
        "field": control["field"],
        "asked": asked,
        "observed": value,
        "vantage": vantage,
        "source": source,
        "ok": bool(source) and type(value) is type(asked) and value == asked,
    }


def _mounts(plan: Plan, subject: Subject) -> Seen:
    """Judge the mounts that are there because a path is masked, read-only or a device, and find all others."""
    try:
        found = {mount.target: mount for mount in mounts(subject.pid)}
    except OSError:
        return {}
    source = f"/proc/{subject.pid}/mountinfo"
    linux = plan["oci"]["linux"]
    # The same kernel: a path that the host's /proc lacks is not in the sandbox's either.
    masked = [
        path
        for path in linux["maskedPaths"]
        if (path in found and _covers(found[path])) or not os.path.lexists(path)
    ]
    read_only = [
        path
        for path in linux["readonlyPaths"]
        if (path in found and "ro" in found[path].flags) or not os.path.lexists(path)
    ]
    nodes = sorted(
        target.removeprefix("/dev/")
        for target, mount in found.items()
        if mount.kind == "devtmpfs" and target == f"/dev{mount.root}"  # not another device under that name
    )
    asked = {
        control["name"].removeprefix("mount:")
        for control in plan["controls"]
        if control["name"][:6] == "mount:"
    }
    explained = asked.union(linux["maskedPaths"], linux["readonlyPaths"], (f"/dev/{node}" for node in nodes))
    return {
        **binds(plan, found, source),
        "paths.masked": (masked, source),
        "paths.read_only": (read_only, source),
        "devices.nodes": (nodes, source),
        "mounts.others": (sorted(found.keys() - explained), source),
    }


def binds(plan: Plan, found: dict[str, Mount], source: str) -> Seen:
    """Say of each bind mount what of the host it shows; its type is that of whatever file system that lies on.

    `found` are the mounts of the sandbox by target. Raises OSError.
    """
    host = mounts(os.getpid())
    seen: Seen = {}
    for op in plan["stage"]:
        mount = found.get(op["at"]) if op["op"] == "bind" and op["below"] == "root" else None
        if mount is not None:
            asked = next((c["asked"] for c in plan["controls"] if c["name"] == f"mount:{mount.target}"), "")
            shown = [f"bind {mount.ways()} of {path}" for path in sources(mount, host)]
            unknown = f"bind {mount.ways()} of {mount.root} on {mount.device}"
            words = asked if asked in shown else (shown or [unknown])[0]
            seen[f"mount:{mount.target}"] = (words, source)
    return seen


def _covers(mount: Mount) -> bool:
    return mount.kind == "tmpfs" or (mount.kind == "devtmpfs" and mount.root == "/null")


def _from_agent(line: Line, descriptors: int) -> Line:
    if line["source"] or line["control"] not in _UNSEEN_ROOTLESS:
        return line
    if line["control"] == "descriptors":
        value = counted(descriptors)
        return {
            **line,
            "observed": value,
            "vantage": "reported",
            "source": "agent",
            "ok": value == line["asked"],
        }
    return {**line, "observed": "only root can look there", "ok": None}


def counted(descriptors: int) -> Value:
    """Return the numbers of so many descriptors; of a count that nobody asks for not all, whoever reports it."""
    return [str(number) for number in range(min(descriptors, _MOST_DESCRIPTORS))]


def _kept(field: str, asked: Value) -> Line:
    return {
        "control": field,
        "field": field,
        "asked": asked,
        "observed": "kept by Ringfence during the run",
        "vantage": "not observable",
        "source": "",
        "ok": None,
    }


def _sysctls_inside(setup: list[str]) -> list[Line]:
    given = [line.split("=", 2)[1:] for line in setup if line.startswith("sysctl=")]
    return [_kept_inside(f"sysctl:{name}", "sysctls", value) for name, value in given]


def _kept_inside(control: str, field: str, asked: Value) -> Line:
    """Return the line of what the guest's init has set, and of which the job's processes show nothing."""
    return {
        "control": control,
        "field": field,
        "asked": asked,
        "observed": "kept by the guest's kernel, which would not have started the job without",
        "vantage": "not observable",
        "source": "",
        "ok": None,
    }


def _not_enforced(field: str, reason: str) -> Line:
    return {
        "control": field,
        "field": field,
        "asked": "allowed to go unenforced",
        "observed": f"not enforced: {reason}",
        "vantage": "not observable",
        "source": "",
        "ok": None,
    }
