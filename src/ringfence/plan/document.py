"""The shape of a plan: JSON data, fully decided, nothing done yet.

A plan is kept in a cache and read back by a `run` that imports none of the machinery that made it, so it is
made of plain dictionaries; these types exist for the reader and the type checker alone.

What differs from one sandbox to the next (its id, its range of host ids) is not in a plan: `instantiate` in
`ringfence.runtime.bundle` fills it in.
"""

from typing import Literal, NotRequired, TypedDict

from ringfence.plan.oci import OciConfig

FORMAT = 1

# Whose host id a staged file gets: root of the sandbox, or its job's user.
Owner = Literal["root", "job"]


class Tmpfs(TypedDict):
    """Mount a tmpfs of bounded size and inode count at `at`; nosuid and nodev."""

    op: Literal["tmpfs"]
    at: str
    size_bytes: int
    inodes: int
    mode: int
    owner: Owner


class Directory(TypedDict):
    """Make directory `at` and its parents."""

    op: Literal["directory"]
    at: str
    mode: int
    owner: Owner


class File(TypedDict):
    """Write a small file."""

    op: Literal["file"]
    at: str
    text: str
    mode: int


class HostFile(TypedDict):
    """Copy the content of a small public file of the host at the time of the run."""

    op: Literal["host-file"]
    at: str
    source: str


class Symlink(TypedDict):
    """Make a symbolic link."""

    op: Literal["symlink"]
    at: str
    target: str


class Agent(TypedDict):
    """Copy the agent, so that no path of the host's shows in the sandbox's mountinfo."""

    op: Literal["agent"]
    at: str


class Bind(TypedDict):
    """Attach a copy of the mount at `source`, without submounts and without following a symlink.

    ids: "image" shows the owners as they are on disk (host 0 is root inside), "owner" shows the owner of
    `source` as the job's user and everybody else as nobody, "none" leaves ids unmapped (rootless).
    below: resolved beneath the staged root ("root") or the staging directory ("stage").
    """

    op: Literal["bind"]
    source: str
    at: str
    below: Literal["stage", "root"]
    kind: Literal["directory", "file", "socket", "fifo", "device"]
    ids: Literal["image", "owner", "none"]
    read_only: bool


class Overlay(TypedDict):
    """Put staged directories on top of each other, read-only, or with `upper` to take the writes."""

    op: Literal["overlay"]
    lower: list[str]
    upper: str
    at: str
    user: bool  # marks of deleted files are in user.* attributes: an overlay of a user's own


class Share(TypedDict):
    """Show the staged directory `source` at `at` in the staged root as well."""

    op: Literal["share"]
    source: str
    at: str


class Initrd(TypedDict):
    """Write the first file system of a guest: the agent as its init, and `modules` (paths) that its kernel lacks."""

    op: Literal["initrd"]
    at: str
    modules: list[str]


class Node(TypedDict):
    """Make a character device of the ring's own, which only `owner` may open; `number` is "10:232"."""

    op: Literal["node"]
    at: str
    number: str
    owner: Owner


class Hide(TypedDict):
    """Unmount `path` in the private mount namespace of the set-up."""

    op: Literal["hide"]
    path: str


Op = Tmpfs | Directory | File | HostFile | Symlink | Agent | Initrd | Node | Bind | Share | Overlay | Hide

Vantage = Literal["observed", "reported", "probed", "not observable"]
Value = str | int | bool | None | list[str]


class Control(TypedDict):
    """One thing that the proof must find; `name` says where to look, `asked` what must be there."""

    name: str
    field: str
    asked: Value


class Unenforced(TypedDict):
    """A field that nothing here enforces: the user let it pass in so many words, or (lsm) the policy does."""

    field: str
    reason: str


class FilterSample(TypedDict):
    """A system call to try on the seccomp filter that the kernel holds: its number and up to six arguments."""

    call: str
    number: int
    arch: int
    args: list[int]


class RuntimeChoice(TypedDict):
    """The program that carries out the plan."""

    name: str
    path: str
    version: str


class Guest(TypedDict):
    """What runs behind a kernel of its own: the program that is that kernel, its flags, and the job's OCI object.

    `platform` is how the kernel gets at the job's system calls: gVisor's systrap, ptrace or kvm.
    """

    program: str
    version: str
    platform: str
    flags: list[str]
    oci: OciConfig


class Disk(TypedDict):
    """A disk of a machine: the image, or a copy of what the policy mounts, made when the sandbox starts.

    `source` is a disk image, or the directory or file that one is made of.
    """

    device: str
    source: str
    kind: Literal["image", "directory", "file"]
    target: str
    read_only: bool


class Machine(TypedDict):
    """A virtual machine: its VMM with the command line, its shape, its kernel, and the setup text for its guest.

    `job_limits` are those of the policy that the guest's kernel keeps in a control group, by field.
    `accelerator` is "kvm", or "tcg" for emulation. In `argv` @LINK@, @CONSOLE@ and @DISKn@ stand for descriptors.
    """

    vmm: str
    program: str
    version: str
    accelerator: str
    memory_bytes: int
    cpus: int
    job_limits: dict[str, int]
    kernel: str
    kernel_path: str
    kernel_digest: str
    modules: list[str]
    command_line: str
    disks: list[Disk]
    argv: list[str]
    devices: list[str]
    setup: list[str]


class ImageChoice(TypedDict):
    """Which image, by name and identity; `record` is the file that holds an image of the store, "" for others."""

    name: str
    digest: str
    record: str


class User(TypedDict):
    """Ids inside the sandbox, and how many host ids its range has (0: no range, only the caller's own id)."""

    uid: int
    gid: int
    range_size: int


class Plan(TypedDict):
    """Everything a runtime needs; see `ringfence.plan.make.make_plan`.

    `oci` is for `runtime`: at the linux tier the job's own, at the others that of the ring around `guest`
    (gVisor) or `machine`.
    """

    format: int
    isolation: str
    rootless: bool
    runtime: RuntimeChoice
    image: ImageChoice
    policy_digest: str
    host_digest: str
    user: User
    entrypoint: list[str]
    command: list[str]
    env: list[str]
    cwd: str
    stop_signal: int
    time_s: float | None
    output_bytes: int | None
    cgroup: dict[str, object]
    cgroup_limits: bool
    deny_devices: list[str]
    stage: list[Op]
    oci: OciConfig
    guest: Guest | None
    machine: Machine | None
    controls: list[Control]
    filter_samples: list[FilterSample]
    unenforced: list[Unenforced]
    warnings: list[str]
    summary: list[str]
    digest: NotRequired[str]
