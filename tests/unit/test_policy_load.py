"""Presets, extends, merging, overrides, and one clear line for everything wrong."""

import os
import subprocess
import sys
from pathlib import Path

import msgspec
import pytest

from ringfence.errors import PolicyError
from ringfence.policy.fields import FIELDS, value_of
from ringfence.policy.load import PRESETS, load, loads, override
from ringfence.policy.model import Mount, Policy, user_ids


def read(text: str, directory: str = "/base") -> Policy:
    """Return the policy of a text that stands in the file p.yaml."""
    return loads(text.encode(), source="p.yaml", directory=directory)


def leaves(kind: type, prefix: str = "") -> dict[str, type]:
    """Return the dotted YAML keys of every leaf of a model class."""
    found: dict[str, type] = {}
    for field in msgspec.structs.fields(kind):
        key = f"{prefix}{field.encode_name}"
        if isinstance(field.type, type) and issubclass(field.type, msgspec.Struct):
            found |= leaves(field.type, f"{key}.")
        else:
            found[key] = field.type
    return found


def test_the_table_of_fields_is_the_model() -> None:
    """Every leaf of the model has its row, and no row is without a leaf."""
    assert list(FIELDS) == list(leaves(Policy))


def test_untrusted_is_what_the_design_says() -> None:
    """The default preset has exactly these values."""
    policy = load("untrusted")
    assert {key: value_of(policy, key) for key in FIELDS} == {
        "isolation": "auto",
        "floor": "linux",
        "user": "dedicated",
        "capabilities": (),
        "no_new_privileges": True,
        "seccomp": "default",
        "lsm": "default",
        "filesystem.root": "read-only",
        "filesystem.tmp": 64 << 20,
        "filesystem.sysfs": False,
        "filesystem.mounts": (),
        "network.mode": "none",
        "network.allow": (),
        "network.publish": (),
        "devices": (),
        "limits.memory": 256 << 20,
        "limits.swap": 0,
        "limits.cpus": 1.0,
        "limits.cpu_weight": 100,
        "limits.cpuset": None,
        "limits.pids": 64,
        "limits.stack": 8 << 20,
        "limits.threads": 64,
        "limits.open_files": 256,
        "limits.file_size": 64 << 20,
        "limits.disk": 128 << 20,
        "limits.inodes": 16384,
        "limits.shm": 16 << 20,
        "limits.io.read": 50 << 20,
        "limits.io.write": 20 << 20,
        "limits.io.read_iops": 1000,
        "limits.io.write_iops": 1000,
        "limits.time": 30.0,
        "limits.output": 8 << 20,
        "sysctls": {},
        "secrets": (),
        "image.digest_required": False,
        "image.allowed_registries": None,
        "image.signatures": None,
        "host.smt": "allowed",
        "host.ksm": "allowed",
        "host.cpu_mitigations": "any",
    }


def test_floors_of_the_presets() -> None:
    """Each preset asks for the boundary that its threat needs, and none fixes a tier."""
    assert {name: load(name).floor for name in PRESETS} == {
        "trusted": "linux",
        "ci": "linux",
        "service": "linux",
        "untrusted": "linux",
        "tenants": "microvm",
        "hostile": "gvisor",
    }
    assert {load(name).isolation for name in PRESETS} == {"auto"}


def test_hostile_refuses_leaky_hosts() -> None:
    """SMT, KSM and unmitigated CPUs are refused, in the policy itself."""
    host = load("hostile").host
    assert (host.smt, host.ksm, host.cpu_mitigations) == ("refused", "refused", "required")


@pytest.mark.parametrize("name", PRESETS)
def test_presets_give_nothing_away(name: str) -> None:
    """No preset grants a capability, a device, a mount, a network, root or new privileges."""
    policy = load(name)
    assert not (policy.capabilities or policy.devices or policy.filesystem.mounts)
    assert (policy.network.mode, policy.user, policy.no_new_privileges) == ("none", "dedicated", True)


@pytest.mark.parametrize("name", [name for name in PRESETS if name != "trusted"])
def test_tmpfs_fits_into_memory(name: str) -> None:
    """Filling every tmpfs leaves the preset's memory limit standing."""
    policy = load(name)
    limits = policy.limits
    assert limits.memory_bytes is not None
    assert policy.filesystem.tmp_bytes + limits.disk_bytes + limits.shm_bytes < limits.memory_bytes


def test_a_policy_is_immutable() -> None:
    """Nothing downstream can change what was checked."""
    with pytest.raises(AttributeError):
        load("untrusted").limits.pids = 9  # type: ignore[misc]


def test_no_extends_means_untrusted() -> None:
    """A file says what differs from the default preset."""
    policy = read("limits: {memory: 1GiB}")
    assert policy == override(load("untrusted"), {"limits.memory": 1 << 30})


def test_merging_goes_deep_and_lists_replace(tmp_path: Path) -> None:
    """Mappings are merged at every level; lists and single values replace; sysctls are a mapping."""
    (tmp_path / "base.yaml").write_text(
        "extends: hostile\n"
        "capabilities: [CHOWN]\n"
        "limits: {io: {read: 1MiB/s}, pids: 40}\n"
        "sysctls: {net.core.somaxconn: 1, kernel.sem: 1 2 3 4}\n"
    )
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub" / "top.yaml").write_text(
        "extends: ../base.yaml\n"
        "capabilities: [kill]\n"
        "limits: {io: {write: null}}\n"
        "sysctls: {net.core.somaxconn: '2'}\n"
    )
    policy = load(str(tmp_path / "sub" / "top.yaml"))
    assert policy.capabilities == ("CAP_KILL",)
    assert (policy.limits.io.read_bytes_per_s, policy.limits.io.write_bytes_per_s) == (1 << 20, None)
    assert policy.limits.pids == 40
    assert policy.limits.memory_bytes == load("hostile").limits.memory_bytes
    assert policy.sysctls == {"net.core.somaxconn": "2", "kernel.sem": "1 2 3 4"}


def test_paths_start_at_the_file_that_names_them(tmp_path: Path) -> None:
    """A base file's ./data is beside the base file, whoever extends it and wherever one stands."""
    (tmp_path / "lib").mkdir()
    (tmp_path / "lib" / "base.yml").write_text(
        "seccomp: profile.json\nfilesystem: {mounts: [{source: ./data, target: /data}]}\n"
    )
    (tmp_path / "top.json").write_text('{"extends": "lib/base.yml"}')
    policy = load(str(tmp_path / "top.json"))
    assert policy.seccomp == str(tmp_path / "lib" / "profile.json")
    assert policy.filesystem.mounts == (Mount(source=str(tmp_path / "lib" / "data"), target="/data"),)


def test_canonical_forms() -> None:
    """What means the same is the same: case, order, repeats, defaults and slashes."""
    policy = read(
        """
        user: 1000
        capabilities: [net_raw, CAP_CHOWN, CHOWN]
        devices: [/dev/kvm, /dev//fuse:rwm]
        network:
          mode: egress
          allow: [API.Example.com.:443, 10.1.0.0/16:5432, "10.0.0.1/32:1",
                  "[2001:DB8::1]:443", "[fd00::/8]:1"]
          publish: [8080:80, "[::1]:22:22/tcp", 0.0.0.0:1:2]
        limits: {cpuset: "3,0-1,2,7"}
        filesystem: {mounts: [{source: b, target: //data/in/}, {source: /x/../a, target: /data, mode: rw}]}
        """
    )
    assert user_ids(policy.user) == (1000, 1000)
    assert policy.capabilities == ("CAP_CHOWN", "CAP_NET_RAW")
    assert policy.devices == ("/dev/fuse:rwm", "/dev/kvm:rw")
    assert set(policy.network.allow) == {
        "api.example.com:443",
        "10.1.0.0/16:5432",
        "10.0.0.1:1",
        "[2001:db8::1]:443",
        "[fd00::/8]:1",
    }
    assert set(policy.network.publish) == {"127.0.0.1:8080:80/tcp", "[::1]:22:22/tcp", "0.0.0.0:1:2/tcp"}
    assert policy.limits.cpuset == "0-3,7"
    assert policy.filesystem.mounts == (
        Mount(source="/a", target="/data", mode="rw"),
        Mount(source="/base/b", target="/data/in"),
    )


WRONG = [
    # unknown keys
    ("limits: {memry: 1}", "p.yaml:1:10: unknown key 'memry' in limits; did you mean 'memory'?"),
    ("memory: 1GiB", "p.yaml:1:1: unknown key 'memory'; did you mean 'limits.memory'?"),
    ("limits.memory: 1GiB", "p.yaml:1:1: unknown key 'limits.memory'; nest it: limits: {memory: ...}"),
    ("extend: ci", "did you mean 'extends'?"),
    ("'': 1", "p.yaml:1:1: unknown key ''"),
    (
        "filesystem: {mounts: [{source: a, taget: /x}]}",
        "p.yaml:1:35: filesystem.mounts: unknown key 'taget'; did",
    ),
    ("filesystem: {mounts: [{source: a}]}", "p.yaml:1:23: filesystem.mounts: a mount needs target"),
    # types and units
    (
        "limits:\n  memory: 256 MiBs",
        "p.yaml:2:11: limits.memory: '256 MiBs' is not a size; write for example",
    ),
    ("limits: 3", "p.yaml:1:9: limits: 3 is not a mapping"),
    ("limits: null", "limits: null is not a mapping"),
    ("limits: {memory: [1]}", "p.yaml:1:18: limits.memory: a list stands where a single value belongs"),
    ("limits: {cpu_weight: null}", "limits.cpu_weight: null is not a whole number"),
    ("limits: {pids: true}", "limits.pids: true is not a whole number"),
    ("limits: {pids: 1.5}", "limits.pids: 1.5 is not a whole number"),
    ("limits: {pids: -1}", "limits.pids: -1 is not"),
    ("limits: {time: .nan}", "limits.time: nan is not a duration"),
    ("limits: {time: 0}", "limits.time: 0 is not a duration"),
    ("limits: {memory: 0}", "limits.memory: 0 is not a size from 1MiB"),
    ("limits: {inodes: 0}", "limits.inodes: 0 is not"),
    ("filesystem: {tmp: 0}", "filesystem.tmp: 0 is not a size from 4KiB"),
    ("limits: {cpuset: 3-1}", "'3-1' is not a set of CPUs"),
    ("limits: {cpuset: 0-1-2}", "is not a set of CPUs"),
    ("limits: {cpuset: 9000}", "is not a set of CPUs"),
    ("no_new_privileges: no", "p.yaml:1:20: no_new_privileges: 'no' is not true or false"),
    ("isolation: gvisr", "'gvisr' is not one of auto, linux, gvisor, microvm; did you mean 'gvisor'?"),
    ("isolation: {}", "isolation: a mapping is not one of"),
    ("user: root", "user: 'root' is not a user"),
    ("user: 0:70000", "user: '0:70000' is not a user"),
    ("user: true", "user: true is not a user"),
    (
        "capabilities: [NET_BIND_SERVIC]",
        "p.yaml:1:16: capabilities: 'NET_BIND_SERVIC' is not a capability; did you",
    ),
    ("capabilities: [ALL]", "capabilities: 'ALL' is not a capability; write each one out"),
    ("capabilities: ALL", "capabilities: 'ALL' is not a list"),
    ("capabilities: [[CHOWN]]", "a list stands where a single value belongs"),
    (
        "seccomp: unconfined",
        "seccomp: 'unconfined' is not default, strict or a path; it cannot be turned off",
    ),
    ("seccomp: stric", "did you mean 'strict'?"),
    ("image: {digest_required: 1}", "image.digest_required: 1 is not true or false"),
    ("image: {allowed_registries: example.com}", "image.allowed_registries: 'example.com' is not a list"),
    ("image: {allowed_registries: [team/app]}", "'team/app' is not a registry; write for example"),
    (
        "image: {allowed_registries: [loca]}",
        "p.yaml:1:30: image.allowed_registries: 'loca' is not a registry",
    ),
    ("image: {allowed_registries: ['example.com/A']}", "'example.com/A' is not a registry"),
    ("image: {signatures: []}", "image.signatures: a list stands where a single value belongs"),
    ("image: {signed: true}", "unknown key 'signed' in image"),
    ("secrets: [token]", "p.yaml:1:11: secrets: secrets are not built yet"),
    ("devices: [/etc/passwd]", "is not a device"),
    ("devices: [/dev/../etc/passwd]", "contains '..'"),
    ("devices: ['/dev/kvm:']", "is not a device"),
    ("devices: [/dev/.]", "is not a device"),
    (
        "sysctls: {kernel.core_pattern: x}",
        "p.yaml:1:11: sysctls: kernel parameter 'kernel.core_pattern' belongs",
    ),
    ("sysctls: {kernel.shmmx: 1}", "did you mean kernel.shmmax?"),
    ("sysctls: {net/core/x: 1}", "write it with dots"),
    ("sysctls: {net..core: 1}", "belongs to the whole host"),
    ("sysctls: {net.core.x: [1]}", "p.yaml:1:23: sysctls: a list is not a value for net.core.x"),
    ("sysctls: {net.core.x: true}", "true is not a value"),
    ("sysctls: []", "sysctls: a list is not a mapping"),
    # network
    (
        "network: {mode: egress, allow: [example.com]}",
        "p.yaml:1:33: network.allow: 'example.com' is not a destination",
    ),
    ("network: {mode: egress, allow: ['example.com:0']}", "is not a destination"),
    ("network: {mode: egress, allow: ['exa_mple.com:1']}", "is not a destination"),
    ("network: {mode: egress, allow: ['2001:db8::1:443']}", "is not a destination"),
    ("network: {mode: egress, allow: ['10.1.2.3/16:1']}", "the network is 10.1.0.0/16"),
    ("network: {mode: egress, allow: ['1.2.3:1']}", "is not an address"),
    ("network: {mode: egress, allow: ['[10.0.0.1]:1']}", "is not an address"),
    ("network: {mode: egress, allow: ['[2001:db8::]/32:443']}", "is not a destination"),
    ("network: {mode: ports, publish: ['1.2.3:80:80']}", "is not a published TCP port"),
    ("network: {mode: ports, publish: ['[1.2.3.4]:80:80']}", "is not a published TCP port"),
    ("network: {mode: ports, publish: [8080]}", "8080 is not a published TCP port"),
    ("network: {mode: ports, publish: ['80:80/udp']}", "is not a published TCP port"),
    ("network: {mode: ports, publish: ['::1:80:80']}", "is not a published TCP port"),
    # mounts
    (
        "filesystem: {mounts: [{source: /, target: /x}]}",
        "p.yaml:1:32: filesystem.mounts: source / is or holds",
    ),
    ("filesystem: {mounts: [{source: /proc/1, target: /x}]}", "source /proc/1 is or holds"),
    ("filesystem: {mounts: [{source: /dev/sda, target: /x}]}", "source /dev/sda is or holds"),
    (
        "filesystem: {mounts: [{source: /var/run/docker.sock, target: /x}]}",
        "a runtime socket; add allow_dangerous",
    ),
    ("filesystem: {mounts: [{source: /home/u/docker.sock, target: /x}]}", "a runtime socket"),
    ("filesystem: {mounts: [{source: /run/user/1000, target: /x}]}", "runtime sockets"),
    ("filesystem: {mounts: [{source: /var, target: /x}]}", "source /var is or holds"),
    ("filesystem: {mounts: [{source: ../../.., target: /x}]}", "the whole host file system"),
    (
        "filesystem: {mounts: [{source: a, target: x}]}",
        "p.yaml:1:43: filesystem.mounts: target: 'x' is not an absolute",
    ),
    ("filesystem: {mounts: [{source: a, target: /a/../b}]}", "contains '..'"),
    ("filesystem: {mounts: [{source: a, target: /}]}", "a mount cannot cover /"),
    ("filesystem: {mounts: [{source: a, target: /tmp/}]}", "a mount cannot cover /tmp"),
    ("filesystem: {mounts: [{source: a, target: //sys/fs}]}", "a mount cannot cover /sys/fs"),
    ("filesystem: {mounts: [{source: a, target: /dev/shm}]}", "a mount cannot cover /dev/shm"),
    ("filesystem: {mounts: [{source: a, target: /x, mode: rwx}]}", "mode: 'rwx' is not one of ro, rw"),
    ("filesystem: {mounts: [{source: '', target: /x}]}", "source: '' is not a path"),
    ('filesystem: {mounts: [{source: "a\\nb", target: /x}]}', "p.yaml:1:32: control character in 'a\\nb'"),
    # contradictions
    (
        "isolation: linux\nfloor: microvm",
        "p.yaml:1:12: isolation: isolation linux is weaker than floor microvm",
    ),
    (
        "extends: hostile\nisolation: linux",
        "p.yaml:2:12: isolation: isolation linux is weaker than floor gvisor",
    ),
    ("limits: {pids: 32}", "p.yaml:1:16: limits.pids: threads 64 can never be reached with pids 32"),
    ("limits: {threads: 65}", "p.yaml:1:19: limits.threads: threads 65 can never"),
    ("limits: {memory: null}", "p.yaml:1:18: limits.memory: swap 0 is counted beyond"),
    ("network: {allow: ['a:1']}", "p.yaml:1:18: network.allow: allow lists a:1 but network.mode is none"),
    ("network: {mode: ports, allow: ['a:1']}", "but network.mode is ports"),
    ("network: {publish: ['1:1']}", "p.yaml:1:20: network.publish: publish lists"),
    ("network: {mode: ports, publish: ['1:1', '127.0.0.1:1:2']}", "127.0.0.1:1 is published twice"),
    ("filesystem: {mounts: [{source: a, target: /x}, {source: b, target: /x/}]}", "two mounts cover /x"),
    # extends
    ("extends: hostil", "p.yaml:1:10: extends: unknown preset 'hostil'; did you mean 'hostile'?"),
    ("extends: null", "p.yaml:1:10: extends: null is not a policy"),
    ("extends: [ci]", "p.yaml:1:10: extends: a list is not a policy"),
    (
        "extends: ./missing.yaml",
        "p.yaml:1:10: extends: cannot read policy /base/./missing.yaml: No such file",
    ),
    ("extends: /dev/zero", "p.yaml:1:10: extends: /dev/zero: not a regular file"),
]


@pytest.mark.parametrize(("text", "words"), WRONG, ids=[text for text, _ in WRONG])
def test_wrong_policies(text: str, words: str) -> None:
    """One line: where, which field, which value, what to do."""
    with pytest.raises(PolicyError) as error:
        read(text)
    line = str(error.value)
    assert words in line
    assert line.startswith(("p.yaml:1:", "p.yaml:2:"))
    assert "\n" not in line
    assert len(line) < 300


def test_allow_dangerous_is_the_way_past() -> None:
    """The user may mean it, and says so on that mount."""
    policy = read("filesystem: {mounts: [{source: /, target: /host, allow_dangerous: true}]}")
    assert policy.filesystem.mounts == (Mount(source="/", target="/host", allow_dangerous=True),)


def test_memory_may_be_below_the_tmpfs_bounds() -> None:
    """A tmpfs size reserves nothing, so that one smaller memory limit alone is no contradiction."""
    policy = override(load("untrusted"), {"limits.memory": "32m"})
    assert policy.limits.memory_bytes == 32 << 20 < policy.filesystem.tmp_bytes


def test_json_with_tabs_and_escapes(tmp_path: Path) -> None:
    """A JSON file is read whatever its layout."""
    file = tmp_path / "p.json"
    file.write_text(
        '{\n\t"limits": {\n\t\t"memory": "1G",\n\t\t"pids": null\n\t},\n\t"seccomp": "\\/a\\u002ejson"\n}\n'
    )
    policy = load(str(file))
    assert (policy.limits.memory_bytes, policy.limits.pids, policy.seccomp) == (1 << 30, None, "/a.json")


def test_a_wrong_parent_is_named_itself(tmp_path: Path) -> None:
    """An error in an extended file has that file's place, even when the child would replace the value."""
    (tmp_path / "base.yaml").write_text("limits:\n  pids: many\n")
    (tmp_path / "top.yaml").write_text("extends: base.yaml\nlimits: {pids: 4}\n")
    with pytest.raises(PolicyError, match=r"base\.yaml:2:9: limits\.pids: 'many'"):
        load(str(tmp_path / "top.yaml"))


def test_circles_name_their_chain(tmp_path: Path) -> None:
    """A circle is found, also one through a symbolic link."""
    (tmp_path / "a.yaml").write_text("extends: b.yaml")
    (tmp_path / "b.yaml").write_text("extends: link.yaml")
    (tmp_path / "link.yaml").symlink_to("a.yaml")
    with pytest.raises(
        PolicyError, match=r"b\.yaml:1:10: extends: .*circle: \S*a\.yaml -> \S*b\.yaml -> \S*a\.yaml"
    ):
        load(str(tmp_path / "a.yaml"))


def test_chains_are_bounded(tmp_path: Path) -> None:
    """Eight policies may extend each other, the preset included; a ninth is an error naming them."""
    for i in range(9):
        (tmp_path / f"{i}.yaml").write_text(f"extends: {i + 1}.yaml" if i < 8 else "extends: untrusted")
    assert load(str(tmp_path / "2.yaml")) == load("untrusted")
    with pytest.raises(PolicyError, match=r"more than 8 policies .*1\.yaml -> .*8\.yaml -> untrusted"):
        load(str(tmp_path / "1.yaml"))


@pytest.mark.parametrize(
    ("ref", "words"),
    [
        ("hostil", "unknown preset 'hostil'; did you mean 'hostile'?"),
        ("policy", "known: trusted, ci"),
        ("../untrusted", "No such file"),
        ("policy.yaml", "cannot read policy policy.yaml: No such file"),
        ("", "unknown preset ''"),
        ("/dev/full", "not a regular file"),
        ("a\0/b", "null byte"),
        ("a\n/b", r"a\n/b: No such file"),
    ],
)
def test_wrong_refs(ref: str, words: str) -> None:
    """A preset's name or a path, never a path out of the presets."""
    with pytest.raises(PolicyError) as error:
        load(ref)
    assert words in str(error.value)


def test_override_spells_values_as_files_do() -> None:
    """The command line's words go through the readers of files."""
    policy = override(
        load("untrusted"),
        {
            "limits.memory": "512m",
            "limits.cpus": "1.5",
            "limits.pids": "100",
            "limits.time": None,
            "capabilities": ("net_raw",),
            "filesystem.mounts": [Mount(source="/srv", target="/srv"), {"source": "rel", "target": "/rel"}],
            "sysctls": {"net.core.somaxconn": "9"},
        },
    )
    assert policy.limits.memory_bytes == 512 << 20
    assert policy.limits.cpus == 1.5
    assert policy.limits.pids == 100
    assert policy.limits.time_s is None
    assert policy.capabilities == ("CAP_NET_RAW",)
    assert [mount.source for mount in policy.filesystem.mounts] == [os.path.abspath("rel"), "/srv"]
    assert policy.sysctls == {"net.core.somaxconn": "9"}


@pytest.mark.parametrize(
    ("key", "value", "words"),
    [
        ("limits.memory", "lots", "--memory: limits.memory: 'lots' is not a size"),
        ("limits.memry", 1, "--memory: unknown field 'limits.memry'; did you mean 'memory'?"),
        ("limits", 1, "--memory: limits: 1 is not a mapping"),
        ("extends", "ci", "--memory: unknown field 'extends'"),
        ("", 1, "--memory: unknown field ''"),
        pytest.param("limits.pids", 10**5000, "limits.pids: a number that large", id="huge"),
        ("seccomp", "/a\x1b", "--memory: seccomp: control character"),
        ("seccomp", "/a\udcff", "--memory: seccomp: control character"),
        ("limits.pids", 10, "--memory: limits.pids: threads 64 can never be reached"),
        ("capabilities", [[[[[[[[[[[[[[[[[[1]]]]]]]]]]]]]]]]]], "nested deeper"),
    ],
)
def test_wrong_overrides(key: str, value: object, words: str) -> None:
    """The line names the flag and the field."""
    with pytest.raises(PolicyError) as error:
        override(load("untrusted"), {key: value}, source="--memory")
    assert words in str(error.value)


def test_a_vanished_directory_is_one_line(tmp_path: Path) -> None:
    """Relative paths need a current directory; without one it is a policy error and not a crash."""
    code = (
        "import os, sys; os.chdir(sys.argv[1]); os.rmdir(sys.argv[1])\n"
        "from ringfence.errors import PolicyError\n"
        "from ringfence.policy.load import load, override\n"
        "policy = load('untrusted')\n"
        "try: override(policy, {'seccomp': './x.json'})\n"
        "except PolicyError as error: print(error)\n"
    )
    gone = tmp_path / "gone"
    gone.mkdir()
    done = subprocess.run([sys.executable, "-c", code, str(gone)], capture_output=True, text=True, check=True)
    assert "the current directory is gone" in done.stdout
