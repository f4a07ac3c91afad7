"""What programs and policies are known to need that gVisor does not have: warnings of a plan, never refusals.

Source: https://gvisor.dev/docs/user_guide/compatibility/ and the release 20240729's own answers, which the tests ask.
"""

from ringfence.plan.workload import Workload
from ringfence.policy.model import Policy

# (path in an image, what it is, why it does not work as it does elsewhere)
PROGRAMS: tuple[tuple[str, str, str], ...] = (
    ("usr/bin/dockerd", "dockerd", "containers inside a sandbox want mounts, cgroups and iptables"),
    ("usr/bin/containerd", "containerd", "containers inside a sandbox want mounts, cgroups and overlayfs"),
    ("usr/bin/podman", "podman", "containers inside a sandbox want user namespaces and overlayfs"),
    (
        "usr/bin/qemu-system-x86_64",
        "qemu-system-x86_64",
        "there is no /dev/kvm, so it emulates every instruction",
    ),
    ("usr/sbin/tcpdump", "tcpdump", "raw and packet sockets are off"),
    ("usr/bin/tcpdump", "tcpdump", "raw and packet sockets are off"),
    ("usr/sbin/bpftool", "bpftool", "there is no bpf(2)"),
    ("usr/bin/bpftrace", "bpftrace", "there is no bpf(2), and no tracing of the kernel"),
    ("usr/bin/perf", "perf", "there is no perf_event_open(2)"),
    ("usr/sbin/modprobe", "modprobe", "the sentry loads no modules"),
    ("usr/bin/fusermount3", "fusermount3", "mounting FUSE file systems wants CAP_SYS_ADMIN in the sandbox"),
    ("usr/lib/systemd/systemd", "systemd", "cgroups and most of /sys are not there"),
    ("lib/ld-linux.so.2", "32-bit x86 programs", "the sentry runs 64-bit programs only"),
)
_WITHOUT_EFFECT = {
    "CAP_SYS_MODULE": "the sentry loads no modules",
    "CAP_SYS_RAWIO": "there is no port and no raw memory to reach",
    "CAP_SYS_BOOT": "there is nothing to reboot",
    "CAP_SYS_TIME": "the clock cannot be set",
    "CAP_MKNOD": "device nodes of the host cannot be made",
    "CAP_MAC_ADMIN": "there is no security module inside",
    "CAP_MAC_OVERRIDE": "there is no security module inside",
    "CAP_AUDIT_CONTROL": "there is no audit subsystem",
    "CAP_AUDIT_READ": "there is no audit subsystem",
    "CAP_AUDIT_WRITE": "there is no audit subsystem",
    "CAP_SYSLOG": "the kernel log cannot be read",
    "CAP_WAKE_ALARM": "there are no alarm timers",
    "CAP_BLOCK_SUSPEND": "there is no suspend",
    "CAP_LEASE": "there are no file leases",
}


def warnings(policy: Policy, workload: Workload) -> list[str]:
    """Return one sentence for each thing that will not work, or not as elsewhere, at the gVisor tier."""
    found = [f"the image has {what}: {why}" for path, what, why in PROGRAMS if path in workload.noticed]
    found += [
        f"{name} has no effect in gVisor: {_WITHOUT_EFFECT[name]}"
        for name in policy.capabilities
        if name in _WITHOUT_EFFECT
    ]
    if not policy.no_new_privileges:
        found.append(
            "no_new_privileges: false has no effect: the sentry ignores set-user-id bits and file capabilities"
        )
    if policy.seccomp not in ("default", "strict"):
        found.append(
            "the seccomp profile is gVisor's to keep: errors other than ENOSYS are EPERM, what is to be logged passes"
            " without, and what is to be killed is the thread"
        )
    return found
