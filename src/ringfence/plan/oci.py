"""The part of the OCI runtime-spec's ``config.json`` that plans use, in the specification's own names.

Source: https://github.com/opencontainers/runtime-spec/blob/v1.2.0/config.md and config-linux.md
"""

from typing import NotRequired, TypedDict

from ringfence.plan.seccomp_match import LinuxSeccomp


class Root(TypedDict):
    path: str
    readonly: bool


class ProcessUser(TypedDict):
    uid: int
    gid: int
    additionalGids: list[int]
    umask: int


class Capabilities(TypedDict):
    bounding: list[str]
    effective: list[str]
    inheritable: list[str]
    permitted: list[str]
    ambient: list[str]


class Rlimit(TypedDict):
    type: str
    soft: int
    hard: int


class Process(TypedDict):
    terminal: bool
    user: ProcessUser
    args: list[str]
    env: list[str]
    cwd: str
    capabilities: Capabilities
    rlimits: list[Rlimit]
    noNewPrivileges: bool
    apparmorProfile: NotRequired[str]
    oomScoreAdj: NotRequired[int]


class Mount(TypedDict):
    destination: str
    type: str
    source: str
    options: list[str]


class IdMapping(TypedDict):
    containerID: int
    hostID: int
    size: int


class Namespace(TypedDict):
    type: str
    path: NotRequired[str]


class Memory(TypedDict, total=False):
    limit: int
    swap: int


class Cpu(TypedDict, total=False):
    shares: int
    quota: int
    period: int
    cpus: str


class Pids(TypedDict):
    limit: int


class DeviceRule(TypedDict):
    allow: bool
    access: str
    type: NotRequired[str]
    major: NotRequired[int]
    minor: NotRequired[int]


class Throttle(TypedDict):
    major: int
    minor: int
    rate: int


class BlockIo(TypedDict, total=False):
    throttleReadBpsDevice: list[Throttle]
    throttleWriteBpsDevice: list[Throttle]
    throttleReadIOPSDevice: list[Throttle]
    throttleWriteIOPSDevice: list[Throttle]


class Resources(TypedDict, total=False):
    devices: list[DeviceRule]
    memory: Memory
    cpu: Cpu
    pids: Pids
    blockIO: BlockIo
    unified: dict[str, str]


class Linux(TypedDict):
    namespaces: list[Namespace]
    uidMappings: list[IdMapping]
    gidMappings: list[IdMapping]
    cgroupsPath: str
    resources: Resources
    sysctl: dict[str, str]
    seccomp: LinuxSeccomp
    rootfsPropagation: str
    maskedPaths: list[str]
    readonlyPaths: list[str]


class OciConfig(TypedDict):
    ociVersion: str
    root: Root
    process: Process
    hostname: str
    mounts: list[Mount]
    linux: Linux
