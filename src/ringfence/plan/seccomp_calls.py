"""Which system calls the profiles allow and deny, group by group, with the reason of each group. Data only.

Names are those of 64-bit x86 and ARM. A call in no group does not exist as far as a sandbox can tell: ENOSYS.
"""

Group = tuple[str, str, str]  # (title, why, names separated by blanks)

ALLOWED: tuple[Group, ...] = (
    (
        "file contents",
        "A job reads and writes files; which ones is decided by mounts, owners and modes.",
        (
            "read readv pread64 preadv preadv2 write writev pwrite64 pwritev pwritev2 lseek close"
            " close_range dup dup2 dup3 fcntl flock fsync fdatasync sync syncfs sync_file_range fallocate"
            " ftruncate truncate fadvise64 readahead copy_file_range sendfile splice tee vmsplice pipe"
            " pipe2 memfd_create"
        ),
    ),
    (
        "file names and attributes",
        "Looking up, listing, linking, renaming, removing and describing files.",
        (
            "access faccessat faccessat2 stat lstat fstat newfstatat statx statfs fstatfs getcwd chdir"
            " fchdir getdents getdents64 mkdir mkdirat rmdir link linkat symlink symlinkat readlink"
            " readlinkat rename renameat renameat2 unlink unlinkat chown fchown lchown fchownat umask"
            " utime utimes utimensat futimesat getxattr lgetxattr fgetxattr getxattrat listxattr"
            " llistxattr flistxattr listxattrat setxattr lsetxattr fsetxattr setxattrat removexattr"
            " lremovexattr fremovexattr removexattrat inotify_init inotify_init1 inotify_add_watch"
            " inotify_rm_watch"
        ),
    ),
    (
        "memory",
        ("Mapping, protecting and locking the job's own memory; limits come from the cgroup and rlimits."),
        (
            "brk mmap munmap mremap mprotect madvise mincore msync mlock mlock2 mlockall munlock"
            " munlockall mseal pkey_alloc pkey_free pkey_mprotect remap_file_pages map_shadow_stack"
            " membarrier"
        ),
    ),
    (
        "processes and threads",
        "Starting, naming, waiting for and ending processes; how many is decided by pids.max.",
        (
            "fork vfork execve execveat exit exit_group wait4 waitid getpid getppid gettid getpgid"
            " getpgrp getsid setpgid setsid set_tid_address set_robust_list get_robust_list rseq"
            " arch_prctl uname sysinfo getrusage times getrlimit setrlimit getpriority"
            " ioprio_get pidfd_open pidfd_send_signal process_mrelease prctl"
            " restart_syscall uretprobe"
        ),
    ),
    (
        "users and groups",
        (
            "Asking is free; changing needs capabilities that the kernel checks, and no policy grants by"
            " default."
        ),
        (
            "getuid geteuid getgid getegid getgroups getresuid getresgid setuid setgid setreuid setregid"
            " setresuid setresgid setfsuid setfsgid setgroups capget capset"
        ),
    ),
    (
        "signals",
        "Only the sandbox's own process namespace can be reached.",
        (
            "kill tkill tgkill rt_sigaction rt_sigpending rt_sigprocmask rt_sigqueueinfo"
            " rt_tgsigqueueinfo rt_sigreturn rt_sigsuspend rt_sigtimedwait sigaltstack pause signalfd"
            " signalfd4"
        ),
    ),
    (
        "scheduling",
        "Threads place and rank themselves; the cgroup's cpu share holds whatever they choose.",
        (
            "sched_yield sched_getaffinity sched_setaffinity sched_getattr sched_getparam"
            " sched_getscheduler sched_get_priority_max"
            " sched_get_priority_min sched_rr_get_interval getcpu"
        ),
    ),
    (
        "time and randomness",
        "Reading clocks, sleeping, timers, random bytes.",
        (
            "time gettimeofday clock_gettime clock_getres clock_nanosleep nanosleep alarm getitimer"
            " setitimer timer_create timer_delete timer_getoverrun timer_gettime timer_settime"
            " timerfd_create timerfd_gettime timerfd_settime getrandom"
        ),
    ),
    (
        "waiting and locks",
        "Futexes and the three generations of polling.",
        (
            "futex futex_wait futex_waitv futex_wake futex_requeue select pselect6 poll ppoll"
            " epoll_create epoll_create1 epoll_ctl epoll_wait epoll_pwait epoll_pwait2 eventfd eventfd2"
        ),
    ),
    (
        "sockets that exist",
        "Using a socket; which kinds can be made is decided by the arguments of socket, below.",
        (
            "bind connect listen accept accept4 getsockname getpeername getsockopt setsockopt shutdown"
            " sendto sendmsg sendmmsg recvfrom recvmsg recvmmsg"
        ),
    ),
    (
        "System V and POSIX IPC",
        "Confined to the sandbox's own IPC namespace.",
        (
            "msgctl msgget msgrcv msgsnd semctl semget semop semtimedop shmat shmctl shmdt shmget"
            " mq_getsetattr mq_notify mq_open mq_timedreceive mq_timedsend mq_unlink"
        ),
    ),
    (
        "older asynchronous I/O",
        "Databases use it; unlike io_uring it starts no work that a filter cannot see.",
        "io_setup io_destroy io_submit io_cancel io_getevents io_pgetevents",
    ),
    (
        "restricting oneself further",
        "A job may build a smaller sandbox within ours; neither can take a restriction away.",
        "seccomp landlock_create_ruleset landlock_add_rule landlock_restrict_self",
    ),
)

# Conditional calls: what is allowed of them is in seccomp_rules.py; the words here are for people.
CONDITIONAL: tuple[Group, ...] = (
    (
        "sockets",
        (
            "AF_UNIX; AF_INET and AF_INET6 with ICMP, TCP or UDP; AF_NETLINK with NETLINK_ROUTE. The"
            " other families and protocols (ALG, VSOCK, PACKET, RXRPC, TIPC, SMC, SCTP, MPTCP ...) are"
            " rarely used kernel code with a record of holes."
        ),
        "socket",
    ),
    ("socket pairs", "AF_UNIX, the one family that needs them.", "socketpair"),
    (
        "device control",
        (
            "Everything but TIOCSTI and TIOCLINUX, which type into the terminal of whoever started the"
            " job. The upper half of the register, which the kernel ignores, is ignored here too"
            " (CVE-2019-10063, CVE-2023-28100)."
        ),
        "ioctl",
    ),
    (
        "modes of files",
        (
            "No set-user-id and no set-group-id bit: a file left in a writable mount must not carry the"
            " job's uid to whoever runs it on the host."
        ),
        "chmod fchmod fchmodat fchmodat2 creat mknod mknodat open openat",
    ),
    ("new processes", "No CLONE_NEW* flag: no new namespaces.", "clone"),
    (
        "limits of resources",
        "The caller's own alone (pid 0): the agent has the job's uid, and the job must not lower its limits.",
        "prlimit64",
    ),
    (
        "priorities",
        (
            "The caller's own alone (pid 0): with the agent at the lowest one, a job that keeps its CPU busy"
            " would stretch the time limit."
        ),
        "setpriority ioprio_set sched_setscheduler sched_setparam sched_setattr",
    ),
    (
        "execution domain",
        (
            "PER_LINUX and PER_LINUX32, with or without UNAME26, and the question what it is. Not"
            " ADDR_NO_RANDOMIZE, READ_IMPLIES_EXEC and the like, which weaken a program against its own"
            " input."
        ),
        "personality",
    ),
)

# What no capability and no foreign profile gives back.
NEVER: tuple[Group, ...] = (
    (
        "namespaces",
        "A user namespace of one's own is the way into most kernel holes of the last ten years.",
        "unshare setns",
    ),
    (
        "mounts",
        "The mount table is part of the sandbox's walls.",
        (
            "mount umount2 pivot_root fsopen fsconfig fsmount fspick move_mount open_tree open_tree_attr"
            " mount_setattr"
        ),
    ),
    (
        "code in the kernel",
        "Modules, another kernel, eBPF programs.",
        "init_module finit_module delete_module kexec_load kexec_file_load bpf",
    ),
    (
        "files without a path",
        "A file handle reaches past the root directory (Shocker, 2014).",
        "open_by_handle_at",
    ),
    ("the clock", "Time is the whole host's.", "settimeofday clock_settime"),
    (
        "the host's accounts, swap, log and ports",
        "None of these has a namespace.",
        "acct quotactl quotactl_fd swapon swapoff syslog iopl ioperm lookup_dcookie nfsservctl",
    ),
)

# Denied by our profiles; one's own profile may allow them, and GRANTED_BY gives some back.
DENIED: tuple[Group, ...] = (
    (
        "looking into other processes",
        ("Jobs of one sandbox share a uid; the agent and other jobs are not theirs to read or steer."),
        "ptrace process_vm_readv process_vm_writev process_madvise pidfd_getfd kcmp",
    ),
    (
        "asynchronous work in the kernel",
        ("io_uring does file and network work that no filter sees, and had a hole every few months."),
        "io_uring_setup io_uring_enter io_uring_register",
    ),
    ("stopping the kernel half-way", "userfaultfd makes races in the kernel easy to win.", "userfaultfd"),
    ("performance counters", "Side channels, and a large interface.", "perf_event_open"),
    ("keyrings", "Keys are kept for a uid, not for a sandbox.", "add_key request_key keyctl"),
    (
        "machine-wide acts",
        "They need a capability and are no job's business.",
        "reboot vhangup sethostname setdomainname chroot adjtimex clock_adjtime",
    ),
    ("watching whole file systems", "Meant for virus scanners.", "fanotify_init fanotify_mark"),
    (
        "security module attributes",
        "The label is set from outside.",
        "lsm_get_self_attr lsm_set_self_attr lsm_list_modules",
    ),
    (
        "placing memory on nodes",
        "Moves pages of the whole machine about; without it programs use the node they are on.",
        "get_mempolicy mbind set_mempolicy set_mempolicy_home_node migrate_pages move_pages",
    ),
    ("making file handles", "Of use only with open_by_handle_at.", "name_to_handle_at"),
    ("segment descriptors", "For 16-bit programs, which the native ABI alone excludes anyway.", "modify_ldt"),
    ("long obsolete", "Nothing current calls them.", "uselib ustat sysfs _sysctl"),
)

# Left out although the kernel may have them: ENOSYS makes libraries take the older way, which can be judged.
ABSENT: tuple[Group, ...] = (
    (
        "flags behind a pointer",
        "A filter sees registers only; libraries fall back to clone and openat.",
        "clone3 openat2",
    ),
    ("the page cache of others", "Tells what other tenants read.", "cachestat"),
    ("memory hidden from the kernel", "Locks pages that the host cannot move.", "memfd_secret"),
    ("mounts by number", "/proc/self/mountinfo says what a job may know.", "statmount listmount"),
)

# The whole of `strict`: Python, a shell, coreutils, a compiled program and our agent need no more. Where a
# library has an older way (instead of clone3, copy_file_range, faccessat2 ...) the newer call is left out.
STRICT: tuple[Group, ...] = (
    (
        "file contents",
        (
            "No splice, sendfile or copy_file_range: page-cache writers (Dirty Pipe, Copy Fail) came"
            " through them."
        ),
        (
            "read readv pread64 write writev pwrite64 lseek close close_range dup dup2 dup3 fcntl flock"
            " fsync fdatasync truncate ftruncate pipe pipe2"
        ),
    ),
    (
        "file names and attributes",
        (
            "cp, tar and shutil fail, rather than fall back, without chown and the reading half of the"
            " xattr calls."
        ),
        (
            "access faccessat stat lstat fstat newfstatat statx statfs fstatfs getcwd chdir fchdir"
            " getdents64 mkdir mkdirat rmdir link linkat symlink symlinkat readlink readlinkat rename"
            " renameat renameat2 unlink unlinkat chown fchown lchown fchownat umask utimensat getxattr"
            " lgetxattr fgetxattr listxattr llistxattr flistxattr"
        ),
    ),
    (
        "files made or changed in mode",
        "As in default.",
        "open openat creat mknod mknodat chmod fchmod fchmodat fchmodat2",
    ),
    ("memory", "What malloc and the loader do.", "brk mmap munmap mremap mprotect madvise msync"),
    (
        "processes and threads",
        "prctl names threads and asks for a signal when the parent dies.",
        (
            "fork vfork clone execve exit exit_group wait4 waitid getpid getppid gettid getpgid getpgrp"
            " getsid setpgid setsid set_tid_address set_robust_list rseq arch_prctl prctl uname sysinfo"
            " getrusage times getrlimit prlimit64 getpriority setpriority sched_yield sched_getaffinity"
            " restart_syscall"
        ),
    ),
    ("users and groups", "Asking only.", "getuid geteuid getgid getegid getgroups getresuid getresgid"),
    (
        "signals",
        "Sending within the sandbox, handling, waiting.",
        (
            "kill tkill tgkill rt_sigaction rt_sigpending rt_sigprocmask rt_sigreturn rt_sigsuspend"
            " rt_sigtimedwait sigaltstack pause signalfd4"
        ),
    ),
    (
        "time and randomness",
        "As in default, without timer objects.",
        (
            "time gettimeofday clock_gettime clock_getres clock_nanosleep nanosleep alarm getitimer"
            " setitimer getrandom"
        ),
    ),
    (
        "waiting and locks",
        "What threads, asyncio and the agent wait with.",
        "futex select pselect6 poll ppoll epoll_create1 epoll_ctl epoll_wait epoll_pwait",
    ),
    (
        "sockets that exist",
        (
            "Standard streams may be sockets, asyncio wakes itself through a pair, the agent takes"
            " connections on a listener it was given. socket itself is denied: nobody can make one that"
            " leads anywhere."
        ),
        ("socketpair accept4 sendto sendmsg recvfrom recvmsg getsockopt getsockname getpeername shutdown"),
    ),
    ("device control", "As in default; terminals need it.", "ioctl"),
)

# What a capability of the policy adds: no more than moby's default gives for it, and nothing of NEVER.
GRANTED_BY = {
    "CAP_PERFMON": "perf_event_open",
    "CAP_SYS_ADMIN": (
        "fanotify_init fanotify_mark lsm_get_self_attr lsm_set_self_attr lsm_list_modules sethostname"
        " setdomainname"
    ),
    "CAP_SYS_BOOT": "reboot",
    "CAP_SYS_CHROOT": "chroot",
    "CAP_SYS_NICE": "get_mempolicy mbind set_mempolicy set_mempolicy_home_node",
    "CAP_SYS_PTRACE": "ptrace process_vm_readv process_vm_writev process_madvise pidfd_getfd kcmp",
    "CAP_SYS_TTY_CONFIG": "vhangup",
}

# Beside the default, for the ring around a kernel of its own.
RING: tuple[Group, ...] = (
    (
        "set-up of a sandboxed kernel",
        (
            "gVisor puts its gofer and its sentry into namespaces and roots of their own before they narrow"
            " themselves down; all of it happens inside the ring's user and mount namespaces."
        ),
        "mount umount2 pivot_root clone ptrace",
    ),
)

X86_64_ONLY: tuple[Group, ...] = (
    (
        "64-bit x86 only",
        "64-bit ARM was born without these; naming them there would only falsify the counts.",
        (
            "access alarm arch_prctl chmod chown creat dup2 epoll_create epoll_wait eventfd fork"
            " futimesat getdents getpgrp inotify_init ioperm iopl lchown link lstat mkdir mknod"
            " modify_ldt open pause pipe poll readlink rename rmdir select signalfd stat symlink sysfs"
            " _sysctl time unlink uretprobe uselib ustat utime utimes vfork"
        ),
    ),
)


def names(groups: tuple[Group, ...]) -> frozenset[str]:
    """Return all the names in `groups`."""
    return frozenset(name for _, _, calls in groups for name in calls.split())
