/* Output of a detached job: pumped from its pipes or pty into the log, as records, up to a limit. */
#ifndef RINGFENCE_OUTPUT_H
#define RINGFENCE_OUTPUT_H

#include "frame.h"

enum { SOURCES = 2 };

struct output {
  int log;              /* -1: not detached */
  int sources[SOURCES]; /* what the job's stdout and stderr are read from; -1: ended */
  bool truncated;       /* something was dropped */
  bool torn;            /* half a record stands at the end of the log */
  uint64_t limit;
  uint64_t used;
  uint64_t dropped;
  int64_t end;          /* size of the log after the last whole record */
  int64_t last_record;  /* where that record begins */
  uint32_t last_bytes;  /* its payload */
};

void output_none(struct output *output);

/* Take over `log`. False unless it is seekable, as a regular file is: other kinds could block the agent. */
bool output_open(struct output *output, int log, uint64_t limit);

/* Move what is there, one piece at most, from a source to the log. False: the source has ended. */
bool output_pump(struct output *output, int source);

/* Write the end record and close the log. */
void output_close(struct output *output, uint32_t exit_code, uint32_t signal, uint32_t flags);

#endif
