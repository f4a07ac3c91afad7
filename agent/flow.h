/* Flows and lines of LINK.md: one stream of a job on one side of the link, and all that a channel has. */
#ifndef RINGFENCE_FLOW_H
#define RINGFENCE_FLOW_H

#include "link.h"

/* One stream at one end: what is read from a descriptor goes to the link, or what comes from there is written to it. */
struct flow {
  int fd;       /* -1: closed */
  bool made;    /* a START has made it */
  bool sends;   /* to the link; else it receives from there */
  bool ended;   /* END was said or heard */
  bool stopped; /* STOP was heard or said */
  bool paused;  /* a sender that is not to read yet */
  bool shared;  /* with processes outside: its O_NONBLOCK is not ours to set */
  bool sock;    /* one end of a terminal's connection, of which the other flow has a copy */
  bool file;    /* a regular file, of which `left` bytes may be written */
  uint64_t left;
  uint32_t credit; /* what the sender may send: ours, or what we have granted */
  uint32_t due;    /* receiver: written out and not granted again yet */
  uint32_t begin;  /* receiver: where in the window, a ring, what is held begins */
  uint32_t held;
  uint8_t *window; /* receiver: LINK_WINDOW_BYTES */
};

/* All of a channel at one end but its connection. */
struct line {
  uint16_t channel;
  bool open;         /* in use, if only for what is left of its streams */
  bool lost;         /* the connection on this side is gone: CLOSE is owed, or was said */
  bool closed_here;  /* CLOSE was said */
  bool closed_there; /* CLOSE was heard */
  bool relay;        /* its streams are a terminal's */
  struct flow flows[LINK_STREAMS];
};

/* Take `fd` over. */
void flow_send(struct flow *flow, int fd);
void flow_receive(struct flow *flow, int fd, uint8_t *window);

/* Close the descriptor; END or STOP is owed. What was held is lost. */
void flow_drop(struct flow *flow);

/* What poll(2) has to look for, or -1: nothing at all. `busy`: nothing can be put into the queue. */
int flow_events(const struct flow *flow, bool busy);

/* Read one piece into the queue. False: there was none. */
bool flow_pump(struct flow *flow, uint16_t channel, uint8_t stream, struct link_queue *queue);

/* Nothing more comes from the link: write out what is held, then close. */
void flow_finish(struct flow *flow);

/* Whether there is a descriptor to which something is still to be written. */
bool flow_holds(const struct flow *flow);

void line_open(struct line *line, uint16_t channel);

/* Do what poll(2) has found. */
void line_turn(struct line *line, uint8_t stream, short found, struct link_queue *queue);

/* A frame about a stream has come. False: it must not have. */
bool line_hear(struct line *line, const struct link_header *header, const uint8_t *payload);

/* Say what is owed, as long as the queue takes it. */
void line_owe(struct line *line, struct link_queue *queue);

/* Both have said CLOSE, and all streams are over. */
bool line_is_over(const struct line *line);

/* Which streams a START makes, a bit for each; 0: it must not be. */
unsigned streams_of(uint8_t start_flags);

#endif
