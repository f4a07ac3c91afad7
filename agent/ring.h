/* What the processes that are PID 1 of a ring have in common: the door (door.c) and the bridge (bridge.c). */
#ifndef RINGFENCE_RING_H
#define RINGFENCE_RING_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

/* What both start with; the rest is their own. */
enum { CONTROL = 3, LISTENER = 4, LOCK = 5, IMAGE = 6, WORDS = 7 };
enum { MOST_WORDS_BYTES = 1 << 16 };
/* How long a listener is left alone that no connection can be had from, and what is left of a ring may take to end. */
enum { ACCEPT_AGAIN_MS = 1000, ENDING_MS = 2000 };
enum { SIGNALS_A_TURN = 8, REAPED_A_TURN = 64 };

/* The last of what was beyond a bound. */
enum { TAIL_BYTES = 1 << 14 };
struct tail {
  uint64_t seen; /* all that was beyond */
  uint8_t bytes[TAIL_BYTES];
};

/* Bytes on their way from a pipe into a file, up to a bound; what is beyond is read and dropped. */
struct drain {
  int from; /* -1: nobody can write to it any more */
  int to;
  uint64_t left;
  struct tail *tail; /* or NULL: the last of it is kept here */
};

enum moved { MOVED, EMPTY, OVER };

/* Write to a regular file of the host's, `left` bytes at most. What has no room on a full disk is dropped, as is all
   that follows. */
void store(int file, uint64_t *left, const uint8_t *bytes, size_t length);

/* Bytes that come from elsewhere, as if they were from the pipe. */
void drain_keep(struct drain *drain, const uint8_t *bytes, size_t length);

/* Make `from` non-blocking and drain it into `to`. */
bool drain_open(struct drain *drain, int from, int to, uint64_t bytes);

/* Move what is there, one piece at most. OVER: `from` is to be closed. */
enum moved drain_move(struct drain *drain);

/* Keep what the pipe still holds. Bounded, for whoever has not been killed yet may go on writing. */
void drain_last(struct drain *drain);

/* Write the tail out, with a line in the place of what is missing before it. Nothing is kept after it. */
void drain_end(struct drain *drain);

/* The last of the words of a ring whose time was up, for whoever finds no end in the log: see PROTOCOL.md. */
void say_late(void);

/* Send `sock` over `feed`, to an agent that takes its connections from there. When its queue is full, or nobody at its
   end, nothing is sent: with its last descriptor the connection closes, which its other side sees. Never waits. */
void hand_on(int feed, int sock);

/* Let go of all capabilities, and of the ways to any. */
bool give_up_privileges(void);

/* Not dumpable, no signals; the descriptors that both start with are there, stay ours, and those that may be absent
   have something in their place, as every number up to `last` has; all above are closed, 0 to 2 are the null device. */
bool ring_set_up(int last);

/* The descriptor is open; it will not be inherited. */
bool keep_open(int descriptor);

/* False: not a number of bytes, which this is not to guess at. */
bool parse_bytes(const char *text, uint64_t *bytes);

#endif
