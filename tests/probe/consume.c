/*
 * Takes one resource until there is no more, and says how much that was:
 *
 *     consume processes | threads | files | stack BYTES | inodes DIRECTORY | crash | memfd | whoami | list PATH...
 *
 * `list` says of each path its owner, mode and the first line, or the errno of opening it; one path a line.
 * Static, so that any root will do.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <pthread.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <sys/wait.h>
#include <unistd.h>

enum { MOST = 100000, PAGE = 4096 };

static int say(const char *what, int count, int error)
{
	printf("{\"%s\": %d, \"errno\": %d}\n", what, count, error);
	return 0;
}

/* Every process forks again as often as it can, and stays: a fork bomb. One byte in a pipe counts each. */
static int processes(void)
{
	int count = 1, ends[2], error = 0;
	char byte = 0;
	if (pipe(ends) != 0)
		return 2;
	for (; count < MOST; count++) {
		pid_t pid = fork();
		if (pid < 0) {
			error = errno;
			break;
		}
		if (pid == 0) {
			for (int i = 0; i < 3; i++)
				if (fork() < 0)
					break;
			if (write(ends[1], &byte, 1) != 1)
				_exit(2);
			pause();
		}
	}
	/* Those that the children made are counted by whoever has written its byte; wait until nobody is missing. */
	close(ends[1]);
	fcntl(ends[0], F_SETFL, O_NONBLOCK);
	int written = 0;
	for (int quiet = 0; quiet < 50; quiet++) {
		while (read(ends[0], &byte, 1) == 1) {
			written++;
			quiet = 0;
		}
		usleep(4000);
	}
	return say("count", written + 1, error);
}

static void *wait_for_ever(void *nothing)
{
	for (;;)
		pause();
	return nothing;
}

static int threads(void)
{
	int count = 1, error = 0;
	pthread_attr_t small;
	pthread_attr_init(&small);
	pthread_attr_setstacksize(&small, 4 * PAGE);
	for (; count < MOST; count++) {
		pthread_t thread;
		error = pthread_create(&thread, &small, wait_for_ever, NULL);
		if (error)
			break;
	}
	return say("count", count, error);
}

static int open_files(void)
{
	int highest = -1, count = 3, fd; /* 0, 1 and 2 are open */
	while ((fd = open("/", O_RDONLY)) >= 0 && count < MOST) {
		count++;
		highest = fd;
	}
	int error = errno;
	return say("count", count == highest + 1 ? count : -1, error);
}

static int use_stack(long bytes)
{
	volatile char room[PAGE];
	memset((void *)room, 1, sizeof room);
	return bytes <= PAGE ? room[0] : use_stack(bytes - PAGE) + room[1];
}

static int inodes(const char *directory)
{
	char path[256];
	int count = 0, fd;
	for (; count < MOST; count++) {
		snprintf(path, sizeof path, "%s/%d", directory, count);
		if ((fd = open(path, O_CREAT | O_EXCL | O_WRONLY, 0600)) < 0)
			break;
		close(fd);
	}
	return say("count", count, errno);
}

/* Whether a child that dies of a signal left a core. */
static int crash(void)
{
	int status;
	pid_t pid = fork();
	if (pid == 0)
		abort();
	if (waitpid(pid, &status, 0) != pid)
		return 2;
	return say("core", WIFSIGNALED(status) && WCOREDUMP(status), WTERMSIG(status));
}

/* Run a program that has no path: ourselves, from anonymous memory. */
static int memfd(char **argv)
{
	char piece[65536], *again[] = { argv[0], "whoami", NULL };
	ssize_t got;
	int self = open("/proc/self/exe", O_RDONLY), fd = memfd_create("job", MFD_CLOEXEC);
	while ((got = read(self, piece, sizeof piece)) > 0)
		if (write(fd, piece, (size_t)got) != got)
			return 2;
	fexecve(fd, again, environ);
	return say("exec", 0, errno);
}

static int whoami(void)
{
	char line[256];
	FILE *status = fopen("/proc/self/status", "r");
	printf("uid %d euid %d gid %d egid %d\n", getuid(), geteuid(), getgid(), getegid());
	while (status && fgets(line, sizeof line, status))
		if (strncmp(line, "Cap", 3) == 0 || strncmp(line, "Seccomp", 7) == 0 || strncmp(line, "NoNew", 5) == 0)
			fputs(line, stdout);
	return 0;
}

static int list(char **paths)
{
	for (; *paths; paths++) {
		struct stat found = { 0 };
		char line[64] = "";
		int fd = open(*paths, O_RDONLY | O_NONBLOCK), error = fd < 0 ? errno : 0;
		if (lstat(*paths, &found) == 0 && fd >= 0 && S_ISREG(found.st_mode) && read(fd, line, sizeof line - 1) > 0)
			line[strcspn(line, "\n")] = '\0';
		printf("%s %u:%u %o %d %s\n", *paths, found.st_uid, found.st_gid, found.st_mode & 07777, error, line);
	}
	return 0;
}

int main(int argc, char **argv)
{
	const char *what = argc > 1 ? argv[1] : "";
	setvbuf(stdout, NULL, _IONBF, 0);
	if (strcmp(what, "processes") == 0)
		return processes();
	if (strcmp(what, "threads") == 0)
		return threads();
	if (strcmp(what, "files") == 0)
		return open_files();
	if (strcmp(what, "stack") == 0 && argc == 3)
		return use_stack(atol(argv[2])) == 0;
	if (strcmp(what, "inodes") == 0 && argc == 3)
		return inodes(argv[2]);
	if (strcmp(what, "crash") == 0)
		return crash();
	if (strcmp(what, "memfd") == 0)
		return memfd(argv);
	if (strcmp(what, "whoami") == 0)
		return whoami();
	if (strcmp(what, "list") == 0)
		return list(argv + 2);
	return 2;
}
