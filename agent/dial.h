/* A connection to a port of the guest's, by the socket that Firecracker's vsock device has in the ring. */
#ifndef RINGFENCE_DIAL_H
#define RINGFENCE_DIAL_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

/* "OK", a space, the number of a port, and the end of the line. */
enum { DIAL_ANSWER_BYTES = 16 };

struct dial {
  const char *path;
  int sock;         /* -1: between two attempts */
  int64_t again_at; /* when the next one is due; INT64_MAX: one waits for its answer, or there will be none */
  size_t length;
  char answer[DIAL_ANSWER_BYTES];
};

enum dialled { DIAL_WAIT, DIAL_DONE, DIAL_BAD };

/* False: no path of a socket. It must stay where it is. */
bool dial_open(struct dial *dial, const char *path);

/* Go on as far as one can without waiting. DIAL_WAIT: come again when `sock` can be read, or at `again_at`. DIAL_DONE:
   `sock` is the guest's from here on, the caller's to take. DIAL_BAD: this is no vsock. */
enum dialled dial_turn(struct dial *dial, int64_t now);

#endif
