"""Docker's default profile, written in moby's format from the facts in data/docker-default-allows.txt."""

import json
from functools import cache
from pathlib import Path

FACTS = Path(__file__).parent / "data" / "docker-default-allows.txt"


@cache
def facts():
    """Return {condition: names}: "always", architectures as Go names them, capabilities."""
    found = {}
    for line in FACTS.read_text().splitlines():
        if line.startswith("["):
            names = found.setdefault(line.strip("[]"), [])
        elif line and not line.startswith("#"):
            names.extend(line.split())
    return found


def allow(names, *args, **more):
    return {"names": list(names), "action": "SCMP_ACT_ALLOW", "args": list(args) or None, **more}


def when(op, value, index=0):
    return {"index": index, "value": value, "op": "SCMP_CMP_" + op}


def document(*syscalls, **more):
    """Return the bytes of a profile that denies by default."""
    return json.dumps(
        {"defaultAction": "SCMP_ACT_ERRNO", "defaultErrnoRet": 1, "syscalls": syscalls, **more}
    ).encode()


@cache
def docker_default():
    """Return the profile as `docker run --security-opt seccomp=FILE` would take it."""
    known = facts()
    return document(
        allow(known["always"]),
        allow(["ptrace", "process_vm_readv", "process_vm_writev"], includes={"minKernel": "4.8"}),
        allow(["socket"], when("LT", 38)),
        allow(["socket"], when("EQ", 39)),
        allow(["socket"], when("GT", 40)),
        *(allow(["personality"], when("EQ", value)) for value in (0, 8, 0x20000, 0x20008, 0xFFFFFFFF)),
        *(allow(known[arch], includes={"arches": [arch]}) for arch in ("amd64", "arm64")),
        *(allow(names, includes={"caps": [cap]}) for cap, names in known.items() if cap.startswith("CAP_")),
        allow(["clone"], when("MASKED_EQ", 0x7E020000), excludes={"caps": ["CAP_SYS_ADMIN"]}),
        {
            "names": ["clone3"],
            "action": "SCMP_ACT_ERRNO",
            "errnoRet": 38,
            "excludes": {"caps": ["CAP_SYS_ADMIN"]},
        },
    )
