#define _GNU_SOURCE
#include "job.h"

#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <signal.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <unistd.h>

#include "exec.h"

enum { FUTEX_WAKE = 1 }; /* linux/futex.h */
enum { SESSION_PASSES = 3 };

void job_none(struct job *job, struct gate *gate) {
  memset(job, 0, sizeof *job);
  memset(gate, 0, sizeof *gate);
  job->gate = gate;
  job->master = -1;
  output_none(&job->output);
  relay_none(&job->relay);
}

/* Libraries disagree about the type of a request; the kernel's is unsigned int, and a filter sees all 64 bits. */
static bool control(int terminal, unsigned int request, void *argument) {
  return syscall(SYS_ioctl, terminal, request, argument) == 0;
}

/* Open a pty in the sandbox's own devpts; its number, or -1. */
static int open_pty(struct job *job, const struct start *start) {
  int number;
  int unlock = 0;
  /* Where the agent itself reads the master it must not wait; else the host does, and how is its own business. */
  int waiting = job->flags & (START_DETACH | START_RELAY) ? O_NONBLOCK : 0;
  job->master = open("/dev/ptmx", O_RDWR | O_NOCTTY | O_CLOEXEC | waiting);
  if (job->master < 0) return -1;
  if (!control(job->master, TIOCSPTLCK, &unlock) || !control(job->master, TIOCGPTN, &number)) return -1;
  if (start->cols && start->rows && !job_resize(job, start->cols, start->rows)) return -1;
  return number;
}

/* A pipe whose reading end is the job's output source; returns the writing end, or -1. */
static int open_source(struct job *job, int source) {
  int ends[2];
  if (pipe2(ends, O_CLOEXEC) != 0) return -1;
  job->output.sources[source] = ends[0];
  if (fcntl(ends[0], F_SETFL, O_NONBLOCK) == 0) return ends[1];
  close(ends[1]);
  return -1;
}

static bool prepare_detached(struct job *job, struct orders *orders, int *log, uint64_t limit) {
  if (!output_open(&job->output, *log, limit)) return false;
  *log = -1;
  if (job->flags & START_TTY) return true;
  orders->stdio[0] = STDIN_FILENO; /* our own null device */
  orders->stdio[1] = open_source(job, 0);
  orders->stdio[2] = open_source(job, 1);
  return orders->stdio[1] >= 0 && orders->stdio[2] >= 0;
}

static bool prepare(struct job *job, struct orders *orders, int *descriptors) {
  if (job->flags & START_DETACH) {
    if (!prepare_detached(job, orders, descriptors, orders->start->output_limit)) return false;
  } else if (job->flags & START_RELAY) {
    if (!relay_open(&job->relay, descriptors[0])) return false;
    descriptors[0] = -1;
  } else if (!(job->flags & START_TTY)) {
    memcpy(orders->stdio, descriptors, sizeof orders->stdio);
  }
  if (!(job->flags & START_TTY)) return true;
  orders->pty = open_pty(job, orders->start);
  if (job->flags & START_DETACH) job->output.sources[0] = job->master;
  return orders->pty >= 0;
}

static bool fork_job(struct job *job, const struct orders *orders) {
  pid_t pid = fork();
  if (pid == 0) become_job(orders);
  if (pid < 0) return false;
  job->pid = pid;
  job->session = pid;
  return true;
}

bool job_start(struct job *job, uint8_t flags, const struct start *start, int *descriptors) {
  struct orders orders = {.start = start, .gate = job->gate, .agent = getpid(), .stdio = {-1, -1, -1}, .pty = -1};
  orders.hold = flags & START_HOLD;
  job->flags = flags;
  job->deadline_ms = start->deadline_ms;
  job->state = JOB_PREPARING;
  bool started = false;
  if (!prepare(job, &orders, descriptors)) {
    job->stage = STAGE_DESCRIPTORS;
  } else if (!fork_job(job, &orders)) {
    job->stage = STAGE_FORK;
  } else {
    started = true;
  }
  job->error = started ? 0 : (uint32_t)errno;
  for (int i = 1; flags & START_DETACH && i < 3; i++) {
    if (orders.stdio[i] >= 0) close(orders.stdio[i]); /* the writing ends are the job's */
  }
  return started;
}

void job_go(struct job *job) {
  __atomic_store_n(&job->gate->go, 1, __ATOMIC_RELEASE);
  syscall(SYS_futex, &job->gate->go, FUTEX_WAKE, INT_MAX);
}

void job_ended(struct job *job, int status) {
  job->pid = 0;
  job->signal = WIFSIGNALED(status) ? (uint32_t)WTERMSIG(status) : 0;
  job->exit_code = job->signal ? 128 + job->signal : (uint32_t)WEXITSTATUS(status);
  job->stage = __atomic_load_n(&job->gate->stage, __ATOMIC_ACQUIRE);
  job->error = job->gate->error;
}

bool job_resize(const struct job *job, uint16_t cols, uint16_t rows) {
  struct winsize size = {.ws_col = cols, .ws_row = rows};
  return control(job->master, TIOCSWINSZ, &size);
}

void job_tell_size(const struct job *job) {
  pid_t group = 0;
  if (!control(job->master, TIOCGPGRP, &group) || group <= 1) group = job->pid;
  if (group > 1) kill(-group, SIGWINCH);
}

void job_signal(const struct job *job, int signo) {
  if (job->pid <= 0) return;
  /* It has no group of its own before its setsid. */
  if (kill(-job->pid, signo) != 0) kill(job->pid, signo);
}

static pid_t number_of(const char *name) {
  pid_t number = 0;
  for (; *name >= '0' && *name <= '9' && number < INT_MAX / 16; name++) number = number * 10 + (*name - '0');
  return *name == '\0' ? number : 0;
}

struct entry { /* getdents64(2) */
  uint64_t inode;
  int64_t offset;
  uint16_t length;
  uint8_t type;
  char name[];
};

static void kill_members(pid_t session, int proc) {
  static union {
    struct entry align;
    char bytes[16384];
  } list;
  if (lseek(proc, 0, SEEK_SET) != 0) return;
  for (long count; (count = syscall(SYS_getdents64, proc, &list, sizeof list)) > 0;) {
    for (long at = 0; at < count;) {
      const struct entry *entry = (const void *)(list.bytes + at);
      pid_t pid = number_of(entry->name);
      if (pid > 1 && getsid(pid) == session) kill(pid, SIGKILL);
      at += entry->length;
    }
  }
}

void job_kill(const struct job *job, int proc) {
  if (job->pid > 0) kill(job->pid, SIGKILL);
  if (job->session <= 0) return;
  kill(-job->session, SIGKILL);
  /* A shell gives each pipeline a group of its own, in its session. More passes: a member may fork meanwhile. */
  for (int pass = 0; proc >= 0 && pass < SESSION_PASSES; pass++) kill_members(job->session, proc);
}
