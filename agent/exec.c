#define _GNU_SOURCE
#include "exec.h"

#include <errno.h>
#include <fcntl.h>
#include <signal.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <unistd.h>

#include "signals.h"
#include "system.h"

enum { FUTEX_WAIT = 0 }; /* linux/futex.h; shared, not private: it spans two processes */
enum { PATH_BYTES = 4096, TERMINAL_PATH_BYTES = 24 };
static const char default_path[] = "/usr/local/bin:/usr/bin:/bin";

static _Noreturn void fail(struct gate *gate, enum stage stage, int error) {
  gate->error = (uint32_t)error;
  __atomic_store_n(&gate->stage, stage, __ATOMIC_RELEASE);
  _exit(127);
}

/* "/dev/pts/<number>", written from its end; returns where it begins. */
static char *terminal_path(char path[TERMINAL_PATH_BYTES], uint32_t number) {
  static const char directory[] = "/dev/pts/";
  char *at = path + TERMINAL_PATH_BYTES - 1;
  *at = '\0';
  do *--at = (char)('0' + number % 10);
  while (number /= 10);
  return memcpy(at - (sizeof directory - 1), directory, sizeof directory - 1);
}

static int open_terminal(int number) {
  char room[TERMINAL_PATH_BYTES];
  const char *path = terminal_path(room, (uint32_t)number);
  int slave = open(path, O_RDWR | O_NOCTTY | O_NOFOLLOW | O_CLOEXEC);
  if (slave < 0 || ioctl(slave, TIOCSCTTY, 0) != 0) return -1;
  return slave;
}

static bool set_descriptors(const struct orders *orders) {
  int terminal = -1;
  if (orders->pty >= 0) {
    terminal = open_terminal(orders->pty);
    if (terminal < 0) return false;
  }
  for (int i = 0; i < 3; i++) {
    if (dup2(terminal >= 0 ? terminal : orders->stdio[i], i) < 0) return false;
  }
  return close_from(3);
}

static uint32_t count_descriptors(void) {
  uint32_t count = 0;
  for (int i = 0; i < 8; i++) count += fcntl(i, F_GETFD) >= 0;
  return count;
}

/* Say that all is ready; the agent looks at its gates when SIGCHLD comes, whoever sent it. */
static void announce(const struct orders *orders) {
  orders->gate->descriptors = count_descriptors();
  __atomic_store_n(&orders->gate->prepared, 1, __ATOMIC_RELEASE);
  kill(orders->agent, SIGCHLD);
}

/* A futex leaves nothing to undo: no descriptor, no blocked signal, no handler. Signals cannot open it. */
static void wait_for_go(struct gate *gate) {
  while (!__atomic_load_n(&gate->go, __ATOMIC_ACQUIRE)) {
    if (syscall(SYS_futex, &gate->go, FUTEX_WAIT, 0, NULL) == 0 || errno == EAGAIN || errno == EINTR) continue;
    fail(gate, STAGE_FORK, errno);
  }
}

static const char *path_of(char *const *env) {
  for (; *env; env++) {
    if (strncmp(*env, "PATH=", 5) == 0) return *env + 5;
  }
  return default_path;
}

/* `directory`/`name`; an empty directory is the current one, as POSIX has it. False: too long to exist. */
static bool join(char *path, const char *directory, size_t length, const char *name, size_t name_length) {
  if (length + 1 + name_length + 1 > PATH_BYTES) return false;
  memcpy(path, directory, length);
  if (length > 0) path[length++] = '/';
  memcpy(path + length, name, name_length + 1);
  return true;
}

/* execve, searched for as execvp(3) does, but in the PATH of the job and never through a shell. Returns errno. */
static int execute(char *const *argv, char *const *env) {
  const char *name = argv[0];
  size_t name_length = strlen(name);
  if (name_length == 0) return ENOENT;
  if (memchr(name, '/', name_length)) {
    execve(name, argv, env);
    return errno;
  }
  int result = ENOENT;
  char path[PATH_BYTES];
  for (const char *directory = path_of(env);;) {
    size_t length = strcspn(directory, ":");
    if (join(path, directory, length, name, name_length)) {
      execve(path, argv, env);
      if (errno == EACCES) result = EACCES;
      else if (errno != ENOENT && errno != ENOTDIR) return errno;
    }
    if (directory[length] == '\0') return result;
    directory += length + 1;
  }
}

_Noreturn void become_job(const struct orders *orders) {
  const struct start *start = orders->start;
  size_t vectors_bytes = ((size_t)start->argc + start->envc + 2) * sizeof(char *);
  char **argv = mmap(NULL, vectors_bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  if (argv == MAP_FAILED) fail(orders->gate, STAGE_FORK, errno);
  char **env = fill_vectors(start, argv);

  setsid();
  if (!set_descriptors(orders)) fail(orders->gate, STAGE_DESCRIPTORS, errno);
  if (chdir(start->cwd) != 0) fail(orders->gate, STAGE_CWD, errno);
  unblock_signals();
  announce(orders);
  if (orders->hold) wait_for_go(orders->gate);
  fail(orders->gate, STAGE_EXEC, execute(argv, env));
}
