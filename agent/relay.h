/* The relay: bytes between the terminal of a job and a socket of the host's, where the terminal's master cannot be sent
   to the host itself. One piece each way is on its way at a time, so that a side that does not read stops the other,
   and nobody waits. */
#ifndef RINGFENCE_RELAY_H
#define RINGFENCE_RELAY_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

struct piece {
  uint8_t *bytes;
  size_t begin; /* what lies between begin and end is still to be passed on */
  size_t end;
};

struct relay {
  int sock; /* -1: there is none, or it is over */
  struct piece to_job;
  struct piece to_host;
  bool moved;    /* the host took something; for who waits for it */
  bool last;     /* nobody is to write to the terminal any more */
  bool over;     /* nothing more is read from it */
  uint32_t left; /* bytes that are read at most once `last` is set */
};

enum relay_result {
  RELAY_ON,
  RELAY_GONE, /* the host's end is closed: the job's terminal is to be hung up */
  RELAY_DONE, /* all that was written to the terminal has been passed on */
};

void relay_none(struct relay *relay);

/* Take over `sock`. False and errno unless it is a connected socket. */
bool relay_open(struct relay *relay, int sock);

/* Pass on one piece each way, at the end all that the host takes, without waiting. */
enum relay_result relay_turn(struct relay *relay, int master);

/* What is in the terminal now is the last of it. */
void relay_finish(struct relay *relay);

/* What epoll has to watch for on either side, 0 for nothing. */
uint32_t relay_socket_events(const struct relay *relay);
uint32_t relay_master_events(const struct relay *relay);

void relay_close(struct relay *relay);

#endif
