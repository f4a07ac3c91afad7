/*
 * Makes every system call that has a number, each once in a process of its own, with arguments that are no use:
 *
 *     everycall [ARGUMENT]
 *
 * all six are ARGUMENT (default 0). Whoever does not come back in time, or stops, is killed. Prints how many calls
 * returned, were ended by a signal, and answered ENOSYS or EPERM. Only for a sandbox: some would do harm outside.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

enum { MOST = 470, PATIENCE_MS = 50, SAID_NOTHING = 255 };

static int call(long number, long argument)
{
	long result = syscall(number, argument, argument, argument, argument, argument, argument);
	_exit(result >= 0 ? 0 : errno);
}

/* The exit status of `pid`, or -1 for one that had to be killed. */
static int outcome(pid_t pid)
{
	const struct timespec moment = { 0, 1000000 };
	int status;
	for (int waited = 0; waited < PATIENCE_MS; waited++) {
		if (waitpid(pid, &status, WNOHANG) == pid)
			return WIFEXITED(status) ? WEXITSTATUS(status) : -1;
		nanosleep(&moment, NULL);
	}
	kill(pid, SIGKILL);
	waitpid(pid, &status, 0);
	return -1;
}

int main(int argc, char **argv)
{
	long argument = argc > 1 ? atol(argv[1]) : 0;
	int returned = 0, ended = 0, absent = 0, denied = 0;
	for (long number = 0; number < MOST; number++) {
		pid_t pid = fork();
		if (pid < 0)
			return 2;
		if (pid == 0) {
			setpgid(0, 0);
			call(number, argument);
		}
		int error = outcome(pid);
		ended += error < 0;
		absent += error == ENOSYS;
		denied += error == EPERM;
		returned += error == 0 || (error > 0 && error < SAID_NOTHING && error != ENOSYS && error != EPERM);
	}
	printf("{\"returned\": %d, \"ended\": %d, \"absent\": %d, \"denied\": %d}\n", returned, ended, absent, denied);
	return 0;
}
