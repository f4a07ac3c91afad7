/*
 * Makes raw system calls and says what the kernel answered, one call per argument and process:
 *
 *     seccomp_probe LABEL:NUMBER:ARG,ARG,... ...     prints "LABEL OUTCOME" for each
 *
 * NUMBER may be "int80:NUMBER" for the 32-bit entry. An ARG is a number or @STRING for a pointer to it.
 * OUTCOME is 0 for success, an errno, or "killed SIGNAL". Static, so that the root needs nothing else.
 */
#include <errno.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/wait.h>
#include <unistd.h>

static long int80(long number)
{
#ifdef __x86_64__
	long result;
	__asm__ volatile("int $0x80" : "=a"(result) : "a"(number), "b"(0), "c"(0), "d"(0) : "memory");
	return result < 0 ? (errno = (int)-result, -1) : result;
#else
	(void)number;
	return 0;
#endif
}

static int perform(char *call)
{
	long args[6] = { 0 };
	int foreign = strncmp(call, "int80:", 6) == 0;
	char *number = strtok(foreign ? call + 6 : call, ":");
	char *list = strtok(NULL, ":");
	char *arg = list ? strtok(list, ",") : NULL;

	for (int i = 0; arg && i < 6; i++, arg = strtok(NULL, ","))
		args[i] = arg[0] == '@' ? (long)(arg + 1) : (long)strtoull(arg, NULL, 0);
	errno = 0;
	long result = foreign ? int80(strtol(number, NULL, 0)) :
				syscall(strtol(number, NULL, 0), args[0], args[1], args[2], args[3], args[4], args[5]);
	return result == -1 ? errno : 0;
}

int main(int argc, char **argv)
{
	for (int i = 1; i < argc; i++) {
		char *call = strchr(argv[i], ':');
		int status;
		if (!call)
			return 2;
		*call++ = '\0';
		fflush(stdout);
		pid_t child = fork();
		if (child < 0)
			return 3;
		if (child == 0)
			_exit(perform(call));
		if (waitpid(child, &status, 0) != child)
			return 4;
		if (WIFSIGNALED(status))
			printf("%s killed %d\n", argv[i], WTERMSIG(status));
		else
			printf("%s %d\n", argv[i], WEXITSTATUS(status));
	}
	return 0;
}
