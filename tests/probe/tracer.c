/*
 * Lets a child of its own make a call that a seccomp filter denies: the child asks for its own pid, and its tracer
 * changes that into unshare(CLONE_NEWUSER) between the entry and the call.
 *
 *     tracer
 *
 * prints "unshare 0" where the call was made after all, "unshare ERRNO" where the filter was asked about the changed
 * call, and "trace ERRNO" where nothing may be traced. Static, so that any root will do.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <sched.h>
#include <signal.h>
#include <stddef.h>
#include <stdio.h>
#include <sys/ptrace.h>
#ifdef __x86_64__
#include <sys/reg.h>
#else /* registers are read in another way there; the tests are for x86-64 */
enum { ORIG_RAX, RDI, RAX };
#endif
#include <sys/syscall.h>
#include <sys/types.h>
#include <sys/wait.h>
#include <unistd.h>

static int traced(void)
{
	if (ptrace(PTRACE_TRACEME, 0, 0, 0) != 0)
		return errno;
	raise(SIGSTOP);
	syscall(SYS_getpid, CLONE_NEWUSER);
	return 0;
}

static long word(pid_t child, int which) { return ptrace(PTRACE_PEEKUSER, child, sizeof(long) * which, 0); }

static int next_stop(pid_t child)
{
	int status;
	if (ptrace(PTRACE_SYSCALL, child, 0, 0) != 0 || waitpid(child, &status, 0) != child)
		return 0;
	return WIFSTOPPED(status);
}

static int change(pid_t child)
{
	while (next_stop(child)) {
		if (word(child, ORIG_RAX) != SYS_getpid || word(child, RDI) != CLONE_NEWUSER)
			continue;
		ptrace(PTRACE_POKEUSER, child, sizeof(long) * ORIG_RAX, SYS_unshare);
		if (!next_stop(child))
			break;
		printf("unshare %ld\n", -word(child, RAX));
		ptrace(PTRACE_DETACH, child, 0, 0);
		return 0;
	}
	return 1;
}

int main(void)
{
	int status;
	pid_t child = fork();
	if (child == 0)
		_exit(traced());
	if (waitpid(child, &status, 0) != child)
		return 2;
	if (WIFSTOPPED(status))
		return change(child);
	printf("trace %d\n", WEXITSTATUS(status));
	return 0;
}
