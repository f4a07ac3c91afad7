"""What the runsc of this host can do: which flags it has, and on which platforms it runs a program.

Asking takes a fifth of a second, so it is done only for the tier that needs it, and kept in a file of its own.
"""

import re
import time

import msgspec

from ringfence.host import programs
from ringfence.host.cache import host_key, keep, kept
from ringfence.host.facts import SLOW_TRIAL_S, TRIAL_S, GvisorFacts, Host
from ringfence.host.sentry import PLATFORMS

ASK_S = 5.0  # for the flags
WANTED_S = 10.0  # for a platform asked for by name: a busy machine must not refuse it for being slow
_MOST_BYTES = 1 << 16
_MOST_LETTERS = 120
_NOT_TRIED = "not tried: systrap works and is faster"

# What the plan of a gvisor sandbox and its start pass: a flag that is there can be turned off, whatever its default.
_RUN_FLAGS = ("bundle", "detach", "pass-fd", "user-log")
_GLOBAL_FLAGS = (
    "allow-flag-override",
    "debug",
    "debug-command",
    "debug-log",
    "debug-log-format",
    "directfs",
    "file-access-mounts",
    "host-fifo",
    "host-uds",
    "ignore-cgroups",
    "net-raw",
    "network",
    "nvproxy",
    "oci-seccomp",
    "overlay2",
    "panic-log",
    "platform",
    "root",
    "strace",
    "tpuproxy",
)
# runsc starts processes in sessions of their own, which only the end of their pid namespace ends for sure; and what
# it keeps is on a tmpfs that goes with the mount namespace. The two options of a user make it root of its own.
_NAMESPACES = (
    *("--pid", "--fork", "--kill-child=KILL", "--mount-proc"),
    *("--mount", "--propagation=private", "--net", "--ipc"),
)
_AS_USER = ("--user", "--map-root-user")
_ON_TMPFS = 'mount -t tmpfs none "$1" && shift && exec "$@"'


def with_gvisor(host: Host, path: str, wanted: str = "") -> Host:
    """Return `host` with `gvisor` filled: the facts kept in file `path`, or else found out and kept there.

    Without a runsc `host` stays as it is. The file is believed as `ringfence.host.cache.kept` says. A runsc on
    which systrap does not work is asked again each time: that may have been the load of a moment. A `wanted`
    platform that need not have been tried is tried now.
    """
    if "runsc" not in host.runtimes:  # so that nothing kept is read either
        return host
    key = host_key()
    facts = kept(path, key, lambda: GvisorFacts)
    if facts is None:
        facts = gvisor_facts(host)
        if facts is not None and "systrap" in facts.platforms:
            keep(path, key, facts)
    if facts is not None and facts.reasons.get(wanted) == _NOT_TRIED:
        facts = _tried(host, facts, wanted)
    return msgspec.structs.replace(host, gvisor=facts)


def _tried(host: Host, facts: GvisorFacts, platform: str) -> GvisorFacts:
    reason = _trial(host, platform, WANTED_S)
    others = {name: why for name, why in facts.reasons.items() if name != platform}
    if reason:
        return msgspec.structs.replace(facts, reasons={**others, platform: reason})
    return msgspec.structs.replace(facts, platforms=(*facts.platforms, platform), reasons=others)


def gvisor_facts(host: Host) -> GvisorFacts | None:
    """Ask and try the runsc of `host`, None when there is none.

    Takes `ASK_S` for the flags, `TRIAL_S` for kvm and `SLOW_TRIAL_S` for each other platform at most, in seconds;
    nothing is left behind.
    """
    if "runsc" not in host.runtimes:
        return None
    missing = _missing_flags(host.runtimes["runsc"].path)
    if missing:
        return GvisorFacts(missing=missing)
    platforms: list[str] = []
    reasons: dict[str, str] = {}
    for platform in PLATFORMS:
        reason = _unwanted(host, platform, platforms) or _trial(host, platform, _patience_s(platform))
        if reason:
            reasons[platform] = reason
        else:
            platforms.append(platform)
    return GvisorFacts(platforms=tuple(platforms), reasons=reasons)


def _missing_flags(runsc: str) -> tuple[str, ...]:
    deadline = time.monotonic() + ASK_S
    asked = [programs.start([runsc, *words], errors=True) for words in (("help", "run"), ("flags",))]
    run, everywhere = (programs.answer(process, deadline, _MOST_BYTES)[0] for process in asked)
    missing = [flag for flag in _RUN_FLAGS if flag not in _flags(run)]
    missing += [flag for flag in _GLOBAL_FLAGS if flag not in _flags(everywhere)]
    return tuple(f"--{flag}" for flag in missing)


def _flags(text: str) -> set[str]:
    """Return the names of the flags that a help text of runsc lists, each at the beginning of a line."""
    return set(re.findall(r"^\s+--?([A-Za-z0-9_-]+)", text, re.MULTILINE))


def _unwanted(host: Host, platform: str, working: list[str]) -> str:
    """Return why `platform` need not be tried, "" if it must."""
    if platform == "kvm" and host.kvm != "works":
        return f"KVM is {host.kvm}: {host.kvm_reason}" if host.kvm_reason else f"KVM is {host.kvm}"
    if platform == "ptrace" and "systrap" in working:
        return _NOT_TRIED
    return ""


def _patience_s(platform: str) -> float:
    """Only kvm is known to hang where it does not work; the others may be slow on a busy machine."""
    return TRIAL_S if platform == "kvm" else SLOW_TRIAL_S


def _trial(host: Host, platform: str, patience_s: float) -> str:
    """Let runsc run a program that does nothing; return why that failed, "" when it worked."""
    process = programs.start(_trial_command(host, platform), errors=True)
    said, status = programs.answer(process, time.monotonic() + patience_s, _MOST_BYTES)
    if status == 0:
        return ""
    if process is None:
        return "cannot start setpriv and unshare: install the package util-linux"
    if status is None:
        return f"did not run a program within {patience_s:g} s"
    return _last_line(said) or f"runsc ended with {status}"


def _trial_command(host: Host, platform: str) -> list[str]:
    namespaces = (*_AS_USER, *_NAMESPACES) if host.rootless else _NAMESPACES
    rootless = ["--rootless"] if host.rootless else []
    # A tmpfs over our own directory hides nothing from anybody: the mount namespace is the trial's.
    place = host.run_dir or "/tmp"
    return [
        *("setpriv", "--pdeathsig=KILL", "unshare", *namespaces, "sh", "-c", _ON_TMPFS, "sh", place),
        *(host.runtimes["runsc"].path, "--root", place, f"--platform={platform}"),
        *("--network=none", "--ignore-cgroups", *rootless, "do", "/bin/true"),
    ]


def _last_line(said: str) -> str:
    lines = [line for line in said.splitlines() if line.strip()]
    last = lines[-1].strip() if lines else ""
    return "".join(character for character in last if character.isprintable())[:_MOST_LETTERS]
