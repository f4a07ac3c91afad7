/* What the first process of a job does between fork and execve. */
#ifndef RINGFENCE_EXEC_H
#define RINGFENCE_EXEC_H

#include <sys/types.h>

#include "job.h"

struct orders {
  const struct start *start;
  struct gate *gate;
  pid_t agent;
  int stdio[3]; /* what becomes 0, 1, 2; none is another's target; unused with a pty */
  int pty;      /* number of the pty, or -1 */
  bool hold;
};

_Noreturn void become_job(const struct orders *orders);

#endif
