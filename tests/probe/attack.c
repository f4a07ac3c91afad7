/*
 * Small attacks, each tried in a process of its own:
 *
 *     attack [--apart] [--pid PID] NAME...      prints "NAME OUTCOME" for each
 *     attack --list                             prints all names
 *
 * OUTCOME is 0 when the attack worked, the errno when the kernel refused, or "killed SIGNAL". --apart gives each
 * attack mount, uts and ipc namespaces of its own first, so that root can show outside a sandbox that it works
 * without harming the host. --pid is the process that some of them are about. Static, so that any root will do.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <sched.h>
#include <signal.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/klog.h>
#include <sys/mount.h>
#include <sys/prctl.h>
#include <sys/ptrace.h>
#include <sys/resource.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/sysmacros.h>
#include <sys/uio.h>
#include <sys/wait.h>
#include <unistd.h>

/* What older headers lack; the numbers are the same on every architecture since Linux 5.1. */
enum { PIDFD_OPEN = 434, CLONE3 = 435, PIDFD_GETFD = 438, OPEN_TREE = 428, FSOPEN = 430, MOUNT_SETATTR = 442 };
enum { IO_URING_SETUP = 425, FCHMODAT2 = 452 };
enum { X32 = 0x40000000 };

static pid_t target;
static int apart;
static char scratch[64];

static int done(long result) { return result == -1 ? errno : 0; }

/* namespaces */
static int unshare_user(void) { return done(unshare(CLONE_NEWUSER)); }
static int unshare_mount(void) { return done(unshare(CLONE_NEWNS)); }
static int unshare_net(void) { return done(unshare(CLONE_NEWNET)); }
static int clone_user(void)
{
	long pid = syscall(SYS_clone, CLONE_NEWUSER | SIGCHLD, 0, 0, 0, 0);
	if (pid == 0)
		_exit(0);
	return done(pid);
}
static int clone3_user(void)
{
	uint64_t args[8] = { CLONE_NEWUSER, 0, 0, 0, SIGCHLD, 0, 0, 0 };
	long pid = syscall(CLONE3, args, sizeof args);
	if (pid == 0)
		_exit(0);
	return done(pid);
}
static int setns_own(void)
{
	int fd = open("/proc/self/ns/net", O_RDONLY);
	return fd < 0 ? 200 : done(setns(fd, CLONE_NEWNET));
}

/* mounts */
static int mount_tmpfs(void) { return done(mount("none", "/tmp", "tmpfs", 0, NULL)); }
static int mount_proc(void) { return done(mount("none", "/tmp", "proc", 0, NULL)); }
static int mount_bind(void) { return done(mount("/", "/tmp", NULL, MS_BIND, NULL)); }
static int remount_root(void) { return done(mount(NULL, "/", NULL, MS_REMOUNT | MS_BIND, NULL)); }
static int unmount_proc(void) { return done(umount2("/proc", MNT_DETACH)); }
static int new_mount_api(void) { return done(syscall(FSOPEN, "tmpfs", 0)); }
static int clone_tree(void) { return done(syscall(OPEN_TREE, AT_FDCWD, "/", 1)); }
static int mount_attributes(void)
{
	uint64_t attr[4] = { 0, 0, 0, 0 };
	return done(syscall(MOUNT_SETATTR, AT_FDCWD, "/", 0, attr, sizeof attr));
}
static int change_root(void) { return done(chroot("/tmp")); }

/* other processes */
static int trace_me(void) { return done(ptrace(PTRACE_TRACEME, 0, 0, 0)); }
static int trace_target(void)
{
	long result = ptrace(PTRACE_SEIZE, target, 0, 0);
	return done(result);
}
static char victim_bytes[8];
static int vm_read(void)
{
	struct iovec here = { scratch, 8 }, there = { victim_bytes, 8 };
	return done(process_vm_readv(target ? target : getpid(), &here, 1, &there, 1, 0));
}
static int vm_write(void)
{
	struct iovec here = { scratch, 8 }, there = { victim_bytes, 8 };
	return done(process_vm_writev(target ? target : getpid(), &here, 1, &there, 1, 0));
}
static int steal_descriptor(void)
{
	long fd = syscall(PIDFD_OPEN, target ? target : getpid(), 0);
	return fd < 0 ? 200 : done(syscall(PIDFD_GETFD, fd, 0, 0));
}
static int compare_processes(void) { return done(syscall(SYS_kcmp, getpid(), getppid(), 1, 0, 0)); }

/* keyrings, eBPF, io_uring and the like */
static int keyring(void) { return done(syscall(SYS_keyctl, 0, -2, 1)); } /* GET_KEYRING_ID of the process's own */
static int key_add(void) { return done(syscall(SYS_add_key, "user", "attack", "x", 1, -2)); }
static int bpf_map(void)
{
	uint32_t attr[32] = { 2, 4, 4, 1 }; /* BPF_MAP_TYPE_ARRAY */
	return done(syscall(SYS_bpf, 0, attr, sizeof attr));
}
static int user_faults(void) { return done(syscall(SYS_userfaultfd, 0)); }
static int io_ring(void)
{
	uint32_t params[30] = { 0 };
	return done(syscall(IO_URING_SETUP, 1, params));
}
static int counters(void)
{
	uint32_t attr[32] = { 1, sizeof attr }; /* PERF_TYPE_SOFTWARE, PERF_COUNT_SW_CPU_CLOCK */
	return done(syscall(SYS_perf_event_open, attr, 0, -1, -1, 0));
}
static int by_handle(void)
{
	struct {
		struct file_handle head;
		char rest[128];
	} handle = { .head.handle_bytes = 128 };
	int mount_id, root = open("/", O_RDONLY | O_DIRECTORY);
	/* Even where this much is refused: a handle can be guessed, as in 2014. */
	name_to_handle_at(AT_FDCWD, "/", &handle.head, &mount_id, 0);
	return done(open_by_handle_at(root, &handle.head, O_RDONLY));
}
static int watch_everything(void) { return done(syscall(SYS_fanotify_init, 0, O_RDONLY)); }
static int kernel_log(void)
{
	char text[256];
	return done(klogctl(3, text, sizeof text));
}
static int no_randomness(void) { return done(syscall(SYS_personality, 0x0040000)); }
static int set_clock(void) { return done(syscall(SYS_settimeofday, NULL, NULL)); } /* changes nothing */
static int load_module(void) { return done(syscall(SYS_init_module, NULL, 0, "")); }
static int reboot_badly(void) { return done(syscall(SYS_reboot, 0, 0, 0, 0)); }
static int swap_on(void) { return done(syscall(SYS_swapon, "/nonexistent", 0)); }
static int accounting(void) { return done(syscall(SYS_acct, "/nonexistent")); }
static int host_name(void) { return done(sethostname("attacked", 8)); }
static int real_time(void)
{
	struct sched_param param = { .sched_priority = 1 };
	return done(syscall(SYS_sched_setscheduler, 0, SCHED_FIFO, &param)); /* musl has a stub only */
}
static int negative_nice(void) { return done(setpriority(PRIO_PROCESS, 0, -20)); }

/* sockets */
static int sock(int family, int type, int protocol) { return done(socket(family, type, protocol)); }
static int socket_alg(void) { return sock(38, SOCK_SEQPACKET, 0); }
static int socket_vsock(void) { return sock(40, SOCK_STREAM, 0); }
static int socket_packet(void) { return sock(17, SOCK_RAW, 0); }
static int socket_rxrpc(void) { return sock(33, SOCK_DGRAM, 2); }
static int socket_xdp(void) { return sock(44, SOCK_RAW, 0); }
static int socket_raw(void) { return sock(2, SOCK_RAW, 1); }
static int netlink_audit(void) { return sock(16, SOCK_RAW, 9); }
static int netlink_netfilter(void) { return sock(16, SOCK_RAW, 12); }
static int netlink_generic(void) { return sock(16, SOCK_RAW, 16); }

/* terminals */
static int type_into(unsigned long request)
{
	int master = posix_openpt(O_RDWR | O_NOCTTY), slave;
	if (master < 0 || grantpt(master) || unlockpt(master))
		return 200;
	setsid();
	slave = open(ptsname(master), O_RDWR);
	return slave < 0 ? 201 : done(syscall(SYS_ioctl, slave, request, "\n"));
}
static int tiocsti(void) { return type_into(TIOCSTI); }
static int tiocsti_high_bits(void) { return type_into(TIOCSTI | 1UL << 32); }
static int tioclinux(void) { return type_into(TIOCLINUX); }

/* other ways into the kernel */
static int int80(void)
{
#ifdef __x86_64__
	long result;
	__asm__ volatile("int $0x80" : "=a"(result) : "a"(20), "b"(0), "c"(0), "d"(0) : "memory");
	return result < 0 ? (int)-result : 0;
#else
	return ENOSYS;
#endif
}
static int x32(void) { return done(syscall(X32 | SYS_getpid)); }

/* other users */
static int become_root(void) { return done(syscall(SYS_setuid, 0)); }
static int become_neighbour(void) { return done(syscall(SYS_setresuid, 1001, 1001, 1001)); }
static int become_group(void) { return done(syscall(SYS_setgid, 0)); }
static int become_host_id(void) { return done(syscall(SYS_setresuid, 0x70000000, -1, -1)); }
static int join_groups(void)
{
	gid_t group = 0;
	return done(syscall(SYS_setgroups, 1, &group));
}
static int all_capabilities(void)
{
	uint32_t head[2] = { 0x20080522, 0 }, data[6] = { ~0U, ~0U, 0, 0x1ff, 0x1ff, 0 };
	uint32_t have[6];
	/* Outside root need not have every one of them: all that it has. */
	if (apart && syscall(SYS_capget, head, have) == 0)
		memcpy(data, have, sizeof have);
	return done(syscall(SYS_capset, head, data));
}

/* nodes and modes */
static const char *fresh(void)
{
	snprintf(scratch, sizeof scratch, "/tmp/attack-%d", (int)getpid());
	unlink(scratch);
	return scratch;
}
static int gone(long result)
{
	int error = done(result);
	unlink(scratch);
	return error;
}
static int make_disk(void) { return gone(mknod(fresh(), S_IFBLK | 0600, makedev(254, 0))); }
static int make_memory(void) { return gone(mknod(fresh(), S_IFCHR | 0600, makedev(1, 1))); }
static int chmod_to(mode_t mode)
{
	if (close(open(fresh(), O_CREAT | O_WRONLY, 0755)) != 0)
		return 200;
	return gone(chmod(scratch, mode));
}
static int chmod_suid(void) { return chmod_to(04755); }
static int chmod_sgid(void) { return chmod_to(02755); }
static int fchmodat2_suid(void)
{
	close(open(fresh(), O_CREAT | O_WRONLY, 0755));
	return gone(syscall(FCHMODAT2, AT_FDCWD, scratch, 04755, 0));
}
static int create_suid(void) { return gone(open(fresh(), O_CREAT | O_WRONLY, 04755)); }
static int mknod_suid(void) { return gone(mknod(fresh(), S_IFREG | 04755, 0)); }

static const struct attack {
	const char *name;
	int (*attempt)(void);
} attacks[] = {
#define A(name) { #name, name }
	A(unshare_user), A(unshare_mount), A(unshare_net), A(clone_user), A(clone3_user), A(setns_own),
	A(mount_tmpfs), A(mount_proc), A(mount_bind), A(remount_root), A(unmount_proc), A(new_mount_api),
	A(clone_tree), A(mount_attributes), A(change_root), A(trace_me), A(trace_target), A(vm_read), A(vm_write),
	A(steal_descriptor), A(compare_processes), A(keyring), A(key_add), A(bpf_map), A(user_faults), A(io_ring),
	A(counters), A(by_handle), A(watch_everything), A(kernel_log), A(no_randomness), A(set_clock), A(load_module),
	A(reboot_badly), A(swap_on), A(accounting), A(host_name), A(real_time), A(negative_nice), A(socket_alg),
	A(socket_vsock), A(socket_packet), A(socket_rxrpc), A(socket_xdp), A(socket_raw), A(netlink_audit),
	A(netlink_netfilter), A(netlink_generic), A(tiocsti), A(tiocsti_high_bits), A(tioclinux), A(int80), A(x32),
	A(become_root), A(become_neighbour), A(become_group), A(become_host_id), A(join_groups), A(all_capabilities),
	A(make_disk), A(make_memory), A(chmod_suid), A(chmod_sgid), A(fchmodat2_suid), A(create_suid), A(mknod_suid),
#undef A
};
enum { COUNT = sizeof attacks / sizeof *attacks };

static int step_aside(void)
{
	return unshare(CLONE_NEWNS | CLONE_NEWUTS | CLONE_NEWIPC) ||
	       mount(NULL, "/", NULL, MS_REC | MS_PRIVATE, NULL);
}

static int one(const char *name)
{
	int status, index = 0;
	while (index < COUNT && strcmp(attacks[index].name, name) != 0)
		index++;
	if (index == COUNT)
		return 2;
	fflush(stdout);
	pid_t child = fork();
	if (child < 0)
		return 3;
	if (child == 0)
		_exit(apart && step_aside() ? 255 : attacks[index].attempt());
	if (waitpid(child, &status, 0) != child)
		return 4;
	if (WIFSIGNALED(status))
		printf("%s killed %d\n", name, WTERMSIG(status));
	else
		printf("%s %d\n", name, WEXITSTATUS(status));
	return 0;
}

int main(int argc, char **argv)
{
	int error = 0;
	for (int i = 1; i < argc && !error; i++) {
		if (strcmp(argv[i], "--list") == 0)
			for (int n = 0; n < COUNT; n++)
				printf("%s\n", attacks[n].name);
		else if (strcmp(argv[i], "--apart") == 0)
			apart = 1;
		else if (strcmp(argv[i], "--pid") == 0 && i + 1 < argc)
			target = (pid_t)atoi(argv[++i]);
		else
			error = one(argv[i]);
	}
	return error;
}
