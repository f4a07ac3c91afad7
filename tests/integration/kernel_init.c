/*
 * The first process of a guest in which a kernel shows what it is: prints NAME VALUE lines on the machine's console and
 * turns the machine off. Everything is asked of the kernel that runs it.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <sched.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mount.h>
#include <sys/reboot.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/utsname.h>
#include <unistd.h>

static void say_errno(const char *name, long result)
{
	printf("%s %d\n", name, result < 0 ? errno : 0);
}

static void say_file(const char *name, const char *path)
{
	char text[512] = "";
	FILE *file = fopen(path, "r");
	if (file == NULL || fgets(text, sizeof text, file) == NULL)
		snprintf(text, sizeof text, "none\n");
	printf("%s %s", name, text);
	if (file != NULL)
		fclose(file);
}

static void say_there(const char *name, const char *path)
{
	printf("%s %s\n", name, access(path, F_OK) == 0 ? "there" : "none");
}

static void load_modules(void)
{
	char name[128], path[160];
	FILE *list = fopen("/modules.list", "r");
	int loaded = 0;
	while (list != NULL && fgets(name, sizeof name, list) != NULL) {
		name[strcspn(name, "\n")] = 0;
		snprintf(path, sizeof path, "/modules/%s", name);
		int fd = open(path, O_RDONLY | O_CLOEXEC);
		loaded += fd >= 0 && syscall(SYS_finit_module, fd, "", 0) == 0;
		close(fd);
	}
	if (list != NULL)
		fclose(list);
	printf("modules %d\n", loaded);
}

static void filesystems(void)
{
	char line[128];
	FILE *file = fopen("/proc/filesystems", "r");
	printf("filesystems");
	while (file != NULL && fgets(line, sizeof line, file) != NULL) {
		char *name = strrchr(line, '\t');
		name[strcspn(name, "\n")] = 0;
		printf(" %s", name + 1);
	}
	printf("\n");
}

int main(void)
{
	struct utsname self;
	char buffer[16] = {0};

	mkdir("/proc", 0755);
	mkdir("/sys", 0755);
	mkdir("/mnt", 0755);
	mount("proc", "/proc", "proc", 0, NULL);
	mount("sys", "/sys", "sysfs", 0, NULL);
	mount("dev", "/dev", "devtmpfs", 0, NULL);
	mount("security", "/sys/kernel/security", "securityfs", 0, NULL);
	setvbuf(stdout, NULL, _IONBF, 0);
	/* What is said before there is a console goes into a file of this memory, and out later. */
	freopen("/early", "w+", stdout);
	load_modules();
	for (int tries = 0; tries < 500 && access("/dev/hvc0", F_OK) != 0; tries++)
		usleep(10000);
	fflush(stdout);
	FILE *early = fopen("/early", "r");
	freopen("/dev/hvc0", "w", stdout);
	for (int c; early != NULL && (c = fgetc(early)) != EOF;)
		putchar(c);

	uname(&self);
	printf("release %s\n", self.release);
	filesystems();
	say_there("virtio_blk", "/sys/bus/virtio/drivers/virtio_blk");
	say_there("virtio_rng", "/sys/bus/virtio/drivers/virtio_rng");
	say_file("lockdown", "/sys/kernel/security/lockdown");
	say_file("oops", "/proc/sys/kernel/panic_on_oops");
	say_file("controllers", "/proc/cgroups");
	say_there("kcore", "/proc/kcore");
	say_there("kallsyms", "/proc/kallsyms");
	say_there("mem", "/dev/mem");
	say_there("debugfs", "/sys/kernel/debug");
	say_errno("cgroup2", mount("cgroup", "/mnt", "cgroup2", 0, NULL));
	say_file("cgroup2-controllers", "/mnt/cgroup.controllers");
	say_errno("finit_module", syscall(SYS_finit_module, -1, "", 0));
	say_errno("kexec_load", syscall(SYS_kexec_load, 0, 0, NULL, 0));
	say_errno("bpf", syscall(SYS_bpf, 0, buffer, sizeof buffer));
	say_errno("io_uring_setup", syscall(SYS_io_uring_setup, 0, buffer));
	say_errno("userfaultfd", syscall(SYS_userfaultfd, 0));
	say_errno("add_key", syscall(SYS_add_key, NULL, NULL, NULL, 0, 0));
	say_errno("user-namespace", unshare(CLONE_NEWUSER));
	say_errno("pid-namespace", unshare(CLONE_NEWPID));
	printf("end\n");
	reboot(RB_AUTOBOOT);
	return 1;
}
