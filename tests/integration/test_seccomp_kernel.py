"""The filters in the real kernel, put there by the real crun and runc, asserted from inside.

Every denied call is also made outside any filter, by the same program with all the privileges of root, and
must have another outcome there; so an EPERM seen inside is the filter's and not a missing capability's.
"""

import errno
import json
import os
import platform
import shutil
import stat
import subprocess
import uuid
from pathlib import Path

import pytest

from ringfence.linux import syscalls
from ringfence.plan import seccomp_calls as calls
from ringfence.plan.seccomp import seccomp_for

ARCH = platform.machine()
HERE = Path(__file__).parent
SIGSYS = 31
EPERM, ENOSYS = str(errno.EPERM), str(errno.ENOSYS)
HYBRID = Path("/sys/fs/cgroup/unified/cgroup.controllers")
ALL_ONES = ",".join(["-1"] * 6)  # no descriptor, no address, no flag: harmless where nothing denies it
GO_ON = 'umount /sys/fs/cgroup/unified && exec "$@"'  # crun refuses the hybrid layout

pytestmark = [
    pytest.mark.skipif(os.geteuid() != 0, reason="needs root to run bundles and controls"),
    pytest.mark.skipif(
        ARCH != "x86_64", reason="the foreign entries and call numbers tested are those of x86"
    ),
]


@pytest.fixture(scope="module", params=["crun", "runc"])
def runtime(request):
    path = shutil.which(request.param, path=os.environ["PATH"] + ":/usr/sbin:/sbin")
    if not path:
        pytest.skip(f"{request.param} is not installed")
    return path


@pytest.fixture(scope="module")
def probe(tmp_path_factory):
    compiler = shutil.which("musl-gcc") or shutil.which("gcc")
    if not compiler:
        pytest.skip("no C compiler")
    binary = tmp_path_factory.mktemp("probe") / "seccomp_probe"
    source = HERE / "seccomp_probe.c"
    subprocess.run([compiler, "-static", "-O1", "-Wall", "-Werror", "-o", binary, source], check=True)
    return binary


def spec(args, seccomp, mounts):
    """The smallest useful OCI config: root without capabilities, in namespaces of its own."""
    capabilities = {kind: [] for kind in ("bounding", "effective", "permitted", "inheritable", "ambient")}
    return {
        "ociVersion": "1.0.2",
        "process": {
            "user": {"uid": 0, "gid": 0},
            "args": args,
            "env": ["PATH=/usr/bin:/bin", "LC_ALL=C.UTF-8"],
            "cwd": "/",
            "noNewPrivileges": True,
            "capabilities": capabilities,
            "rlimits": [{"type": "RLIMIT_NOFILE", "hard": 1024, "soft": 1024}],
        },
        "root": {"path": "rootfs", "readonly": True},
        "mounts": [
            {"destination": "/proc", "type": "proc", "source": "proc"},
            {"destination": "/dev", "type": "tmpfs", "source": "tmpfs", "options": ["nosuid", "mode=755"]},
            {"destination": "/dev/pts", "type": "devpts", "source": "devpts", "options": ["ptmxmode=0666"]},
            {"destination": "/dev/shm", "type": "tmpfs", "source": "shm"},
            *mounts,
        ],
        "linux": {
            "namespaces": [{"type": kind} for kind in ("pid", "mount", "ipc", "uts", "network")],
            "cgroupsPath": f"/ringfence-test-{uuid.uuid4().hex[:12]}",
            "seccomp": seccomp,
        },
    }


def bind(source, destination, mode):
    return {"destination": destination, "type": "bind", "source": str(source), "options": ["rbind", mode]}


def contained(runtime, tmp_path, args, seccomp, *mounts):
    """Run `args` in a bundle of its own under `seccomp` and return the finished process."""
    bundle = tmp_path / uuid.uuid4().hex[:8]
    for place in ("proc", "dev", "usr", "tmp", "work"):
        (bundle / "rootfs" / place).mkdir(parents=True)
    for link in ("bin", "lib", "lib64"):
        (bundle / "rootfs" / link).symlink_to("usr/" + link)
    (bundle / "config.json").write_text(json.dumps(spec(args, seccomp, mounts)))
    command = [
        runtime,
        "--root",
        str(tmp_path / "state"),
        "run",
        "--bundle",
        str(bundle),
        f"rf-{bundle.name}",
    ]
    if runtime.endswith("crun") and HYBRID.exists() and HYBRID.read_text().strip():
        command = ["unshare", "--mount", "--propagation", "private", "sh", "-c", GO_ON, "sh", *command]
    return subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=60)


def outcomes(finished):
    assert finished.returncode == 0, finished.stderr
    return dict(line.split(" ", 1) for line in finished.stdout.splitlines())


def inside(runtime, tmp_path, probe, requests, name="default"):
    """Make the calls under one of our profiles, with the directory of the probe, writable, at /work."""
    oci = seccomp_for(name, arch=ARCH).oci
    work = bind(probe.parent, "/work", "rw")
    return outcomes(contained(runtime, tmp_path, [f"/work/{probe.name}", *requests], oci, work))


def outside(probe, requests):
    """The control: the same calls by root without any filter, in a session of its own because of vhangup."""
    return outcomes(
        subprocess.run(
            [probe, *requests],
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            start_new_session=True,
            timeout=60,
        )
    )


def number(name):
    found = syscalls.number_of(name, ARCH)
    assert found is not None, name
    return found


@pytest.mark.parametrize("name", ["default", "strict"])
def test_every_denied_call_is_denied_by_the_filter(runtime, tmp_path, probe, name):
    """EPERM inside for each call that is denied outright, and something else outside."""
    denied = sorted(calls.names(calls.NEVER + calls.DENIED) & syscalls.all_names(ARCH).keys())
    requests = [f"{call}:{number(call)}:{ALL_ONES}" for call in denied]
    seen, control = inside(runtime, tmp_path, probe, requests, name), outside(probe, requests)
    assert len(seen) > 60
    assert {call: seen[call] for call in denied if seen[call] != EPERM} == {}
    assert {call for call in denied if control[call] == EPERM} == set()


UNKNOWN = {
    "clone3": f"clone3:435:{ALL_ONES}",
    "openat2": f"openat2:437:{ALL_ONES}",
    "statmount": f"statmount:457:{ALL_ONES}",
}


@pytest.mark.parametrize("name", ["default", "strict"])
def test_calls_that_are_left_out_do_not_exist(runtime, tmp_path, probe, name):
    """ENOSYS, so that libraries fall back; also for a number that no kernel has."""
    requests = [*UNKNOWN.values(), f"future:9999:{ALL_ONES}"]
    seen, control = inside(runtime, tmp_path, probe, requests, name), outside(probe, requests)
    assert set(seen.values()) == {ENOSYS}
    assert control["clone3"] != ENOSYS
    assert control["openat2"] != ENOSYS


SOCKETS = {  # label: domain, type, protocol
    "alg": (38, 5, 0),
    "vsock": (40, 1, 0),
    "packet": (17, 3, 0),
    "audit": (16, 3, 9),
    "uevent": (16, 3, 15),
    "generic": (16, 3, 16),
    "route in the upper half": (16, 3, 1 << 32 | 9),
    "alg by the upper half": (1 << 32 | 38, 5, 0),
    "no family": (0, 1, 0),
    "icmp raw": (2, 3, 255),
    "far": (2, 1, 0xFFFF),
}
GOOD_SOCKETS = {
    "unix": (1, 1, 0),
    "tcp": (2, 1, 6),
    "tcp6": (10, 1, 0),
    "udp": (2, 2, 17),
    "route": (16, 3, 0),
}


def sockets(table):
    return [f"{label.replace(' ', '_')}:{number('socket')}:{d},{t},{p}" for label, (d, t, p) in table.items()]


def test_only_the_usual_sockets_can_be_made(runtime, tmp_path, probe):
    """Families and protocols of the allow list open, all others are EPERM, whatever the upper halves hold."""
    seen, control = inside(runtime, tmp_path, probe, sockets(SOCKETS)), outside(probe, sockets(SOCKETS))
    assert set(seen.values()) == {EPERM}
    assert EPERM not in control.values()
    assert control["audit"] == control["packet"] == "0"
    assert control["alg"] == control["alg_by_the_upper_half"]
    good = inside(runtime, tmp_path, probe, sockets(GOOD_SOCKETS))
    assert set(good.values()) == {"0"}


def test_strict_makes_no_socket_at_all(runtime, tmp_path, probe):
    """But socketpair, which leads nowhere, works."""
    pair = f"pair:{number('socketpair')}:1,1,0,@12345678"
    seen = inside(runtime, tmp_path, probe, [*sockets(GOOD_SOCKETS), pair], "strict")
    assert seen.pop("pair") == "0"
    assert set(seen.values()) == {EPERM}


@pytest.mark.parametrize("name", ["default", "strict"])
def test_nobody_types_into_a_terminal(runtime, tmp_path, probe, name):
    """TIOCSTI and TIOCLINUX are EPERM, whatever the upper half (CVE-2019-10063, CVE-2023-28100)."""
    ioctl = number("ioctl")
    bad = [
        f"{label}:{ioctl}:0,{command:#x},@x"
        for label, command in {
            "sti": 0x5412,
            "sti_high": 0x1_0000_5412,
            "sti_signed": 0xFFFFFFFF_00005412,
            "linux": 0x541C,
            "linux_high": 0x100_0000_541C,
        }.items()
    ]
    good = [f"winsize:{ioctl}:0,0x5413,@12345678", f"ptn:{ioctl}:0,0xffffffff80045430,@12345678"]
    seen, control = inside(runtime, tmp_path, probe, bad + good, name), outside(probe, bad + good)
    assert {seen[request.split(":")[0]] for request in bad} == {EPERM}
    assert {seen["winsize"], seen["ptn"]} == {str(errno.ENOTTY)}
    assert set(control.values()) == {str(errno.ENOTTY)}


NEW_NAMESPACES = (0x20000, 0x2000000, 0x4000000, 0x8000000, 0x10000000, 0x20000000, 0x40000000)


@pytest.mark.parametrize("name", ["default", "strict"])
def test_clone_makes_no_namespace(runtime, tmp_path, probe, name):
    """Each CLONE_NEW* flag is EPERM, a plain fork through clone works."""
    bad = [f"new_{flag:x}:{number('clone')}:{flag | 17}" for flag in NEW_NAMESPACES]
    bad.append(f"high:{number('clone')}:{1 << 32 | 0x10000000 | 17}")
    good = f"fork:{number('clone')}:17"
    seen, control = inside(runtime, tmp_path, probe, [*bad, good], name), outside(probe, [*bad, good])
    assert seen.pop("fork") == "0"
    assert set(seen.values()) == {EPERM}
    assert set(control.values()) == {"0"}


def modes(directory):
    """Every way of giving a file a mode with a set-id bit, on paths under `directory`."""
    ways = {
        "chmod": ("chmod", f"@{directory}/a,04755"),
        "chmod_gid": ("chmod", f"@{directory}/a,02755"),
        "fchmodat": ("fchmodat", f"-100,@{directory}/a,06755"),
        "creat": ("creat", f"@{directory}/b,04755"),
        "open": ("open", f"@{directory}/c,0101,02755"),
        "openat": ("openat", f"-100,@{directory}/d,0102,04755"),
        "tmpfile": ("openat", f"-100,@{directory},020200002,04755"),
        "mknod": ("mknod", f"@{directory}/e,0104755,0"),
        "mknodat": ("mknodat", f"-100,@{directory}/f,0102755,0"),
    }
    requests = [f"{label}:{number(call)}:{args}" for label, (call, args) in ways.items()]
    return [*requests, f"fchmodat2:452:-100,@{directory}/a,04755,0"]


def set_id_files(directory):
    return {p.name for p in directory.rglob("*") if p.lstat().st_mode & (stat.S_ISUID | stat.S_ISGID)}


@pytest.mark.parametrize("name", ["default", "strict"])
def test_no_set_id_file_is_left_behind(runtime, tmp_path, probe, name):
    """Asserted from outside: a writable host directory holds no set-id file after all ways were tried."""
    work, control_work = tmp_path / "w", tmp_path / "c"
    for directory in (work, control_work):
        directory.mkdir()
        (directory / "a").touch()
    usual = [
        f"plain:{number('chmod')}:@/work/a,01711",
        f"create:{number('openat')}:-100,@/work/g,0102,0644",
        f"reading:{number('openat')}:-100,@/work/a,0,06777",
        f"fifo:{number('mknod')}:@/work/h,010644,0",
    ]
    seen = inside(runtime, tmp_path, Path(shutil.copy(probe, work / "probe")), modes("/work") + usual, name)
    assert {seen.pop(label) for label in ("plain", "create", "reading", "fifo")} == {"0"}
    assert seen.pop("fchmodat2") in (EPERM, ENOSYS)  # ENOSYS where libseccomp does not know it yet
    assert set(seen.values()) == {EPERM}
    assert set_id_files(work) == set()
    assert set(outside(probe, modes(control_work)).values()) == {"0"}
    assert set_id_files(control_work) == {"a", "b", "c", "d", "e", "f"}


def test_mkdir_needs_no_filter(tmp_path, probe):
    """The kernel itself drops set-id bits from a new directory's mode, which is why mkdir is not judged."""
    made = outside(probe, [f"mkdir:{number('mkdir')}:@{tmp_path}/d,06755"])
    assert made == {"mkdir": "0"}
    assert set_id_files(tmp_path) == set()


@pytest.mark.parametrize("name", ["default", "strict"])
def test_32_bit_and_x32_calls_kill(runtime, tmp_path, probe, name):
    """int 0x80 and x32 numbers would mean other calls than the rules are about."""
    requests = ["i386_getpid:int80:20", f"x32_getpid:{0x40000000 | 39}", f"getpid:{number('getpid')}"]
    seen, control = inside(runtime, tmp_path, probe, requests, name), outside(probe, requests)
    assert seen == {"i386_getpid": f"killed {SIGSYS}", "x32_getpid": f"killed {SIGSYS}", "getpid": "0"}
    assert f"killed {SIGSYS}" not in control.values()


def test_personality_stays_plain(runtime, tmp_path, probe):
    """A job cannot switch off address randomisation; asking and PER_LINUX32 work."""
    personality = number("personality")
    bad = [f"{flag:x}:{personality}:{flag}" for flag in (0x40000, 0x400000, 0x100000, 0x8000000)]
    good = [f"ask:{personality}:0xffffffff", f"linux32:{personality}:8"]
    seen, control = inside(runtime, tmp_path, probe, bad + good), outside(probe, bad + good)
    assert (seen.pop("ask"), seen.pop("linux32")) == ("0", "0")
    assert set(seen.values()) == {EPERM}
    assert set(control.values()) == {"0"}


def test_dockers_profile_runs_and_loses_its_user_namespaces(runtime, tmp_path, probe):
    """Podman's profile is accepted by both runtimes; unshare(CLONE_NEWUSER), which it allows, is gone."""
    shipped = Path("/usr/share/containers/seccomp.json")
    if not shipped.exists():
        pytest.skip("no profile of Podman's on this machine")
    plan = seccomp_for(str(shipped), arch=ARCH, moby=shipped.read_bytes(), kernel=(6, 1))
    requests = [f"unshare:{number('unshare')}:0x10000000", f"clone:{number('clone')}:0x10000011", "getpid:39"]
    seen = outcomes(
        contained(
            runtime, tmp_path, [f"/work/{probe.name}", *requests], plan.oci, bind(probe.parent, "/work", "ro")
        )
    )
    assert seen.pop("getpid") == "0"
    assert set(seen.values()) <= {EPERM, ENOSYS}
    assert set(outside(probe, requests).values()) == {"0"}


PYTHON = """
import asyncio, concurrent.futures, hashlib, json, multiprocessing, os, pathlib, pty, shutil
import signal, socket, sqlite3, subprocess, tempfile, threading, time, uuid

def square(n):
    return n * n

if __name__ == "__main__":
    os.chdir("/tmp")
    threads = [threading.Thread(target=square, args=(2,)) for _ in range(4)]
    [t.start() for t in threads], [t.join() for t in threads]
    assert subprocess.check_output("echo hi | tr h H", shell=True) == b"Hi\\n"
    with tempfile.TemporaryDirectory() as directory:
        path = pathlib.Path(directory, "a")
        path.write_text("x" * 100_000)
        path.chmod(0o640)
        shutil.copy2(path, path.with_name("b"))
        path.rename(path.with_name("c"))
        shutil.copytree(directory, "/tmp/copy")
        db = sqlite3.connect(directory + "/db")
        db.execute("create table t (a)"), db.commit(), db.close()
    async def main():
        process = await asyncio.create_subprocess_exec("true")
        await process.wait()
        await asyncio.gather(*[asyncio.to_thread(square, n) for n in range(3)])
    asyncio.run(main())
    with multiprocessing.Pool(2) as pool:
        assert pool.map(square, [1, 2, 3]) == [1, 4, 9]
    with concurrent.futures.ProcessPoolExecutor(2) as pool:
        assert list(pool.map(square, [2])) == [4]
    child, terminal = pty.fork()
    if not child:
        os.execvp("true", ["true"])
    os.waitpid(child, 0)
    a, b = socket.socketpair()
    socket.send_fds(a, [b"x"], [0]), socket.recv_fds(b, 1, 1)
    signal.signal(signal.SIGALRM, lambda *_: None), signal.setitimer(signal.ITIMER_REAL, 0.01)
    time.sleep(0.02)
    print(json.dumps({"digest": hashlib.sha256(uuid.uuid4().bytes).digest_size}))
"""
SHELL = """
set -e
cd /tmp
mkdir -p a/b && echo hi > a/x && cp -a a c && ls -laR . > list && sort list | uniq | wc -l > count
tar cf t.tar a && tar xf t.tar && gzip -k t.tar && gunzip -c t.tar.gz | cmp - t.tar
find . -type f -exec cat {} + | grep -c hi > found && cat found && sed -i s/hi/ho/ a/x
mv c d && ln -s a e && ln a/x f && chmod 600 f && touch -d yesterday q && stat q > s && rm -rf d
df . > df && du -s . > du && head -c 5 list | od > od && sha256sum t.tar > sum && sleep 0.01 && date > now
(sleep 0.05 & wait) && timeout 5 true && nice true && mkfifo p && mktemp > t && nproc > n && id > i && env > v
cat < a/x
"""


@pytest.mark.parametrize(
    ("args", "expected"),
    [
        (["/usr/bin/python3", "/work/job.py"], '{"digest": 32}\n'),
        (["/bin/sh", "/work/job.sh"], "3\nho\n"),
    ],
)
@pytest.mark.parametrize("name", ["default", "strict"])
def test_real_programs_run(runtime, tmp_path, name, args, expected):
    """Python with threads, processes, sqlite and asyncio; a shell with the coreutils: also under strict."""
    work = tmp_path / "job"
    work.mkdir()
    (work / "job.py").write_text(PYTHON)
    (work / "job.sh").write_text(SHELL)
    if not Path(args[0]).exists():
        pytest.skip(f"no {args[0]} on this machine")
    tmpfs = {
        "destination": "/tmp",
        "type": "tmpfs",
        "source": "tmpfs",
        "options": ["nosuid", "nodev", "mode=1777"],
    }
    oci = seccomp_for(name, arch=ARCH).oci
    finished = contained(
        runtime, tmp_path, args, oci, bind("/usr", "/usr", "ro"), bind(work, "/work", "ro"), tmpfs
    )
    assert (finished.returncode, finished.stdout) == (0, expected), finished.stderr
