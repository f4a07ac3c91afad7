/*
 * The first process of the machine that has cgroup v2: loads the modules of its initramfs, goes over to the disk, runs
 * the script there, reaps whatever else ends, says the script's status, and switches the machine off.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mount.h>
#include <sys/reboot.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <unistd.h>

static void off(const char *what)
{
	if (what != NULL)
		printf("init: %s: %s\n", what, strerror(errno));
	sync();
	reboot(RB_AUTOBOOT); /* with reboot=t; QEMU, told not to reboot, ends */
	for (;;)
		pause();
}

static void load_modules(void)
{
	char name[128], path[160];
	FILE *list = fopen("/modules.list", "r");
	while (list != NULL && fgets(name, sizeof name, list) != NULL) {
		name[strcspn(name, "\n")] = 0;
		snprintf(path, sizeof path, "/modules/%s", name);
		int fd = open(path, O_RDONLY | O_CLOEXEC);
		if (fd < 0 || syscall(SYS_finit_module, fd, "", 0) != 0)
			off(name);
		close(fd);
	}
	if (list != NULL)
		fclose(list);
}

/* The console is a device of a module, so that the kernel had none to open for us. */
static void open_console(void)
{
	if (mount("devtmpfs", "/dev", "devtmpfs", MS_NOSUID, NULL) != 0)
		off("/dev");
	int console = open("/dev/hvc0", O_RDWR | O_NOCTTY);
	if (console < 0)
		off("/dev/hvc0");
	for (int fd = 0; fd < 3; fd++)
		dup2(console, fd);
	if (console > 2)
		close(console);
}

static void go_over(const char *disk, const char *source)
{
	if (mkdir("/new", 0755) != 0 || mount(disk, "/new", "ext4", MS_NOATIME, NULL) != 0)
		off(disk);
	if (mkdir("/new/.source", 0755) != 0 && errno != EEXIST)
		off("/.source");
	if (mount(source, "/new/.source", "erofs", MS_RDONLY, NULL) != 0)
		off(source);
	if (mount("/dev", "/new/dev", NULL, MS_MOVE, NULL) != 0)
		off("/dev");
	if (chdir("/new") != 0 || mount(".", "/", NULL, MS_MOVE, NULL) != 0 || chroot(".") != 0 || chdir("/") != 0)
		off("root");
}

int main(void)
{
	setvbuf(stdout, NULL, _IOLBF, 0);
	load_modules();
	open_console();
	go_over("/dev/vda", "/dev/vdb");
	pid_t script = fork();
	if (script == 0) {
		setsid();
		execl("/bin/sh", "sh", "-eu", "/.source/tests/cgroup2/start.sh", (char *)NULL);
		_exit(127);
	}
	for (;;) {
		int status = 0;
		pid_t ended = wait(&status);
		if (ended < 0 && errno == ECHILD)
			off("the script");
		if (ended != script)
			continue;
		printf("machine: status %d\n", WIFEXITED(status) ? WEXITSTATUS(status) : 128 + WTERMSIG(status));
		off(NULL);
	}
}
