/* A job: one first process, its gate, its pty, its output. */
#ifndef RINGFENCE_JOB_H
#define RINGFENCE_JOB_H

#include <sys/types.h>

#include "output.h"
#include "relay.h"

enum job_state {
  JOB_NONE,
  JOB_PREPARING, /* forked, not ready */
  JOB_HELD,      /* ready, waits for GO */
  JOB_RUNNING,   /* has executed, or is about to */
  JOB_ENDING,    /* first process gone; the rest of its output is read */
};

/* Between the agent and a first process before execve, in a shared page: no descriptor, and out of a job's reach. */
struct gate {
  uint32_t go;          /* the agent: execute */
  uint32_t prepared;    /* the process: ready */
  uint32_t descriptors; /* the process: how many it has */
  uint32_t stage;       /* the process: where it failed, or 0 */
  uint32_t error;
};

struct job {
  enum job_state state;
  uint8_t flags; /* of START */
  pid_t pid;     /* first process; 0: none or reaped */
  pid_t session; /* which it leads, and its group; may outlive it */
  int master;    /* pty, or -1 */
  struct gate *gate;
  struct output output;
  struct relay relay;
  uint32_t stage; /* of a job that never ran, or 0 */
  uint32_t error;
  uint32_t exit_code;
  uint32_t signal;
  uint32_t end_flags;
  uint32_t deadline_ms;
  int64_t deadline_at; /* 0: none */
  int64_t drain_by; /* what is left of its output has this long */
};

void job_none(struct job *job, struct gate *gate);

/* Fork the first process; `descriptors` as PROTOCOL.md has them, that of a log or a relay is taken. False: stage and
   error say why. */
bool job_start(struct job *job, uint8_t flags, const struct start *start, int *descriptors);

/* Let the first process execute. */
void job_go(struct job *job);

/* Take the pieces of a wait status apart. */
void job_ended(struct job *job, int status);

bool job_resize(const struct job *job, uint16_t cols, uint16_t rows);

/* SIGWINCH to what is in the foreground: a plain kernel sends it by itself when the size changes, gVisor's does not. */
void job_tell_size(const struct job *job);
void job_signal(const struct job *job, int signo);

/* SIGKILL for the first process and all of its session; `proc` is /proc opened, or -1. */
void job_kill(const struct job *job, int proc);

#endif
