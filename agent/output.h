/* Output of a detached job: pumped from its pipes or pty into the log, as records, up to a limit. */
#ifndef RINGFENCE_OUTPUT_H
#define RINGFENCE_OUTPUT_H

#include "frame.h"

enum { SOURCES = 2 };

struct output {
  int log;              /* -1: not detached */
  uint8_t *held;        /* where the log is a pipe: a record, or the rest of one, that had no room in it yet */
  uint32_t held_bytes;
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

/* Take over `log`: a regular file, or a pipe, which is made non-blocking. False and errno for any other kind: it could
   block the agent. */
bool output_open(struct output *output, int log, uint64_t limit);

/* Move what is there, one piece at most, from a source to the log. False: the source has ended. */
bool output_pump(struct output *output, int source);

/* Whether the log is a pipe with no room: sources have to wait until it can be written and output_flush was called. */
bool output_is_stuck(const struct output *output);
void output_flush(struct output *output);

/* Write the end record and close the log. For a pipe that is full this waits, but not for long. */
void output_close(struct output *output, uint32_t exit_code, uint32_t signal, uint32_t flags);

#endif
