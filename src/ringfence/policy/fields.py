"""Every field of the policy, by its dotted YAML key: its kind, its unit and what it means.

The one table behind reading, writing, the JSON Schema and docs/policy.md.
"""

from __future__ import annotations

import msgspec

from ringfence.policy import kinds, lists
from ringfence.policy.kinds import Kind
from ringfence.policy.model import Policy

MAX_PIDS = 4_194_304  # PID_MAX_LIMIT of 64-bit kernels, linux/threads.h
PAGE = 4096  # a tmpfs of size 0, or of 0 inodes, is one without a limit: tmpfs(5)


class Field(msgspec.Struct, frozen=True):
    """One leaf of the policy."""

    kind: Kind
    unit: str
    meaning: str
    example: str


FIELDS: dict[str, Field] = {
    "isolation": Field(
        kinds.choice("auto", "linux", "gvisor", "microvm"),
        "tier",
        "The tier that runs the workload. `auto` takes the cheapest one at or above `floor` that this "
        "host has, without emulation, and refuses when there is none.",
        "gvisor",
    ),
    "floor": Field(
        kinds.choice("linux", "gvisor", "microvm"),
        "tier",
        "The weakest tier that may be used; a weaker `isolation` is an error.",
        "gvisor",
    ),
    "user": Field(
        kinds.user(),
        "uid:gid",
        "Who the workload is. `dedicated`: not root inside, and a host uid and gid range that no other "
        "sandbox has. Numbers choose the ids inside; the host range stays the sandbox's own. Names are "
        "not looked up.",
        '"1000:1000"',
    ),
    "capabilities": Field(
        lists.capability_names(),
        "names",
        "Capabilities kept, with or without `CAP_`, in either case. Everything else is dropped from "
        "every set.",
        "[NET_BIND_SERVICE]",
    ),
    "no_new_privileges": Field(
        kinds.flag(),
        "true or false",
        "Whether set-user-ID programs and file capabilities are without effect.",
        "true",
    ),
    "seccomp": Field(
        kinds.seccomp(),
        "name or path",
        "Which system calls are let through: `default`, the small allow list `strict`, or a JSON "
        "profile in moby's format, whose path starts at the policy file. It cannot be turned off; only "
        "the native ABI is ever allowed.",
        "strict",
    ),
    "lsm": Field(
        kinds.choice("default", "none", "required"),
        "word",
        "The AppArmor or SELinux label: `default` where the host has one, `required` refuses a host "
        "without, `none` asks for no label.",
        "required",
    ),
    "filesystem.root": Field(
        kinds.choice("read-only", "writable"),
        "word",
        "Whether the workload may write to the root file system. What it writes is thrown away after "
        "the run, and counts against `limits.disk` and `limits.inodes`; the image never changes.",
        "writable",
    ),
    "filesystem.tmp": Field(
        kinds.size(least=PAGE),
        "size",
        "How large `/tmp` may grow. It is memory that counts against `limits.memory`; being a bound and "
        "not a reservation, it may be larger than that limit, which then comes first.",
        "64MiB",
    ),
    "filesystem.sysfs": Field(
        kinds.flag(),
        "true or false",
        "Whether `/sys` is there at all; read-only if so.",
        "false",
    ),
    "filesystem.mounts": Field(
        lists.mounts(),
        "list",
        "Host files and directories to show inside: `source` (from the policy file's directory), "
        "`target`, `mode` `ro` or `rw`, and `allow_dangerous: true`, without which `/`, `/proc`, "
        "`/sys`, `/dev`, runtime sockets and the directories that hold them are refused. Always nosuid, "
        "nodev and private.",
        "[{source: ./data, target: /data, mode: ro}]",
    ),
    "network.mode": Field(
        kinds.choice("none", "egress", "ports"),
        "word",
        "`none`: only a loopback of its own. `egress`: may open connections to what `allow` lists. "
        "`ports`: may be reached at what `publish` lists, and opens no connection. `egress` with "
        "`publish` is both.",
        "egress",
    ),
    "network.allow": Field(
        lists.destinations(),
        "host:port",
        "Names, addresses or networks that may be reached, each with a port; IPv6 in brackets. Needs "
        "`mode: egress`.",
        '["api.example.com:443", "10.1.0.0/16:5432"]',
    ),
    "network.publish": Field(
        lists.published_ports(),
        "[address:]port:port",
        "Host ports that lead to ports inside, TCP, on 127.0.0.1 unless an address is written. Needs "
        "`mode: ports` or `egress`.",
        '["8080:80"]',
    ),
    "devices": Field(
        lists.device_nodes(),
        "path[:access]",
        "Host devices to show inside, with access `r`, `rw` (when none is written) or `rwm`, beyond the "
        "harmless ones that are always there (null, zero, full, random, urandom, tty).",
        '["/dev/fuse:rw"]',
    ),
    "limits.memory": Field(
        kinds.size(least=1 << 20, null=True),
        "size",
        "Memory, with page cache, tmpfs and kernel memory; going beyond ends the workload (137).",
        "256MiB",
    ),
    "limits.swap": Field(
        kinds.size(least=0, null=True),
        "size",
        "Swap beyond the memory limit. Needs `limits.memory`.",
        "0",
    ),
    "limits.cpus": Field(
        kinds.cpus(),
        "CPUs",
        "How much CPU time a second, in CPUs, in steps of 0.001.",
        "1.5",
    ),
    "limits.cpu_weight": Field(
        kinds.count(least=1, most=10_000),
        "1 to 10000",
        "Share of a busy CPU against other sandboxes, on the scale of cgroup v2. It limits nothing on "
        "an idle host.",
        "100",
    ),
    "limits.cpuset": Field(
        kinds.cpuset(),
        "CPU list",
        "The CPUs that may be used at all.",
        '"0-1"',
    ),
    "limits.pids": Field(
        kinds.count(least=1, most=MAX_PIDS, null=True),
        "count",
        "Processes and threads in the whole sandbox.",
        "64",
    ),
    "limits.stack": Field(
        kinds.size(least=128 * 1024),
        "size",
        "Stack of a main thread (RLIMIT_STACK).",
        "8MiB",
    ),
    "limits.threads": Field(
        kinds.count(least=1, most=MAX_PIDS, null=True),
        "count",
        "Processes and threads of the workload's user (RLIMIT_NPROC); at most `limits.pids`.",
        "64",
    ),
    "limits.open_files": Field(
        kinds.count(least=8, most=1_048_576),
        "count",
        "Open descriptors of one process (RLIMIT_NOFILE).",
        "256",
    ),
    "limits.file_size": Field(
        kinds.size(least=0, null=True),
        "size",
        "The largest file that may be written (RLIMIT_FSIZE).",
        "64MiB",
    ),
    "limits.disk": Field(
        kinds.size(least=PAGE),
        "size",
        "What the work directory and a writable root may hold together.",
        "128MiB",
    ),
    "limits.inodes": Field(
        kinds.count(least=16, most=2**31 - 1),
        "count",
        "How many files, directories and links each of those and `/tmp` may hold.",
        "16384",
    ),
    "limits.shm": Field(
        kinds.size(least=PAGE),
        "size",
        "How large `/dev/shm` may grow; memory, as `/tmp` is.",
        "16MiB",
    ),
    "limits.io.read": Field(
        kinds.rate(),
        "rate",
        "Bytes read from block devices per second.",
        "50MiB/s",
    ),
    "limits.io.write": Field(
        kinds.rate(),
        "rate",
        "Bytes written to block devices per second.",
        "20MiB/s",
    ),
    "limits.io.read_iops": Field(
        kinds.count(least=1, most=2**32 - 2, null=True),
        "count",
        "Reads from block devices per second.",
        "1000",
    ),
    "limits.io.write_iops": Field(
        kinds.count(least=1, most=2**32 - 2, null=True),
        "count",
        "Writes to block devices per second.",
        "1000",
    ),
    "limits.time": Field(
        kinds.duration(),
        "duration",
        "Wall-clock time from the first instruction; then the workload is ended (124).",
        "30s",
    ),
    "limits.output": Field(
        kinds.size(least=1, null=True),
        "size",
        "Bytes of standard output and standard error together.",
        "8MiB",
    ),
    "sysctls": Field(
        lists.kernel_parameters(),
        "name: value",
        "Kernel parameters to set, only those of which every sandbox has its own: `kernel.shm*`, "
        "`kernel.msg*`, `kernel.sem`, `fs.mqueue.*`, `net.*`. Merged with those of the policy it "
        "extends.",
        '{net.core.somaxconn: "1024"}',
    ),
    "secrets": Field(
        lists.secret_names(),
        "list",
        "Not built yet: anything but an empty list is an error.",
        "[]",
    ),
    "image.digest_required": Field(
        kinds.flag(),
        "true or false",
        "Whether an image must be named with its digest, so that nobody can put another in its place.",
        "true",
    ),
    "image.allowed_registries": Field(
        lists.registries(),
        "host[:port][/path]",
        "Where images may come from: registries, or the beginning of a name in one, and `local` for what was "
        "built or imported on this host, the host's own files among it. `null` is everywhere.",
        "[registry.example.com/team, local]",
    ),
    "image.signatures": Field(
        kinds.file(),
        "path",
        "A `policy.json` of containers-policy.json(5), starting at the policy file: an image that it does not "
        "let in is not fetched, and one that was not fetched under it does not run. `null` is the host's own.",
        "./policy.json",
    ),
    "host.smt": Field(
        kinds.choice("allowed", "refused"),
        "word",
        "Whether the host may run two threads on one core, where they share caches and predictors.",
        "refused",
    ),
    "host.ksm": Field(
        kinds.choice("allowed", "refused"),
        "word",
        "Whether the host may merge equal pages of memory, which tells one tenant what another holds.",
        "refused",
    ),
    "host.cpu_mitigations": Field(
        kinds.choice("any", "required"),
        "word",
        "`required` refuses a host that calls any of its CPU vulnerabilities unmitigated.",
        "required",
    ),
}

GROUPS = frozenset(key[:i] for key in FIELDS for i, letter in enumerate(key) if letter == ".")


def value_of(policy: Policy, key: str) -> object:
    """Return the value that `policy` holds for a dotted YAML key."""
    value: object = policy
    for part in key.split("."):
        if not isinstance(value, msgspec.Struct):
            raise KeyError(key)
        value = getattr(value, value.__struct_fields__[value.__struct_encode_fields__.index(part)])
    return value


def nest(values: dict[str, object]) -> dict[str, object]:
    """Return flat dotted keys as the nested mappings of a file."""
    root: dict[str, object] = {}
    for key, value in values.items():
        *groups, leaf = key.split(".")
        here = root
        for group in groups:
            here = here.setdefault(group, {})  # type: ignore[assignment]
        here[leaf] = value
    return root
