/* Frames of agent/LINK.md: one stream of bytes between the ring (bridge.c) and the guest in it (back.c, guest.c). */
#ifndef RINGFENCE_LINK_H
#define RINGFENCE_LINK_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "frame.h"

enum { LINK_VERSION = 1, LINK_HEADER_BYTES = 8 };
enum { LINK_CHANNELS = 33, LINK_STREAMS = 3, LINK_MACHINE = 0xFFFF };
enum { LINK_DATA_BYTES = 1 << 15, LINK_WINDOW_BYTES = 1 << 16 };
enum { LINK_WORDS_BYTES = 1 << 10, LINK_ENTROPY_BYTES = 64, LINK_SETUP_HEAD_BYTES = 8 + LINK_ENTROPY_BYTES };
enum { LINK_SETUP_TEXT_BYTES = 1 << 20, LINK_SETUP_BYTES = LINK_SETUP_HEAD_BYTES + LINK_SETUP_TEXT_BYTES };
/* The largest payloads either end takes. */
enum { LINK_FROM_GUEST_BYTES = HEADER_BYTES + MAX_REPORT_BYTES, LINK_FROM_HOST_BYTES = HEADER_BYTES + MAX_PAYLOAD_BYTES };

enum link_type {
  LINK_HELLO = 1,
  LINK_SETUP = 2,
  LINK_SETUP_DONE = 3,
  LINK_SETUP_FAILED = 4,
  LINK_OPEN = 8,
  LINK_CLOSE = 9,
  LINK_CONTROL = 10,
  LINK_DATA = 16,
  LINK_END = 17,
  LINK_CREDIT = 18,
  LINK_STOP = 19,
  LINK_POWEROFF = 48,
};

struct link_header {
  uint32_t length; /* of the payload */
  uint8_t type;
  uint8_t stream;
  uint16_t channel;
};

/* Who says something. */
enum link_end { LINK_HOST, LINK_GUEST };

struct link_header get_link_header(const uint8_t bytes[LINK_HEADER_BYTES]);
void put_link_header(uint8_t bytes[LINK_HEADER_BYTES], const struct link_header *header);

/* Whether this end may say it at all: type, direction, channel, stream and length agree with each other. */
bool link_allows(enum link_end from, const struct link_header *header);

/* Whether this is one whole frame from an agent. */
bool is_answer(const uint8_t *frame, size_t length);

/* Frames on their way. Memory for the largest is set aside at once, but taken only while there is one. */

/* With this much to be sent nothing new is put in, so that a queue is never full. */
enum { LINK_BUSY_BYTES = 1 << 16 };

struct link_queue {
  uint8_t *bytes;
  size_t room;
  size_t begin; /* what lies between begin and end is still to be moved */
  size_t end;
};

/* `most`: the largest payload. False and errno: no memory. */
bool link_open_queue(struct link_queue *queue, uint32_t most);
bool link_open_reader(struct link_queue *reader, uint32_t most);
void link_close(struct link_queue *queue);

bool link_is_busy(const struct link_queue *queue);

/* Room for the payload of one frame; link_put or link_put_header then says how much of it was used. */
uint8_t *link_room(struct link_queue *queue, uint32_t most);
void link_put_header(struct link_queue *queue, const struct link_header *header);

/* Put in a whole frame. Only while the queue is not busy. */
void link_put(struct link_queue *queue, const struct link_header *header, const void *payload);

enum link_result { LINK_FRAME, LINK_WAIT, LINK_GONE, LINK_BAD };

/* Write what the link takes now. LINK_WAIT: it takes no more; LINK_FRAME: all is written. */
enum link_result link_flush(struct link_queue *queue, int link);

/* Read once. LINK_FRAME: something came. */
enum link_result link_fill(struct link_queue *reader, int link);

/* The frame at the beginning, checked, if it is whole; its payload stays where it is until link_done. */
enum link_result link_next(struct link_queue *reader, enum link_end from, struct link_header *header, uint8_t **payload);
void link_done(struct link_queue *reader, const struct link_header *header);

/* The guest, before the back takes over; all block. */

/* What SETUP brings. */
struct link_setup {
  uint64_t realtime_ns; /* CLOCK_REALTIME of the host, when it was sent */
  uint8_t entropy[LINK_ENTROPY_BYTES];
  char *text; /* items, each ended by a NUL; mapped for it alone */
  size_t length;
};

/* HELLO, the first frame. `release`: uname(2)'s. False and errno: the link is gone. */
bool link_say_hello(int link, const char *release, uint64_t boot_ms);

/* Wait for SETUP, as long as it takes. False: the link is gone, or something else came (errno EPROTO). */
bool link_read_setup(int link, struct link_setup *setup);

/* Wipe and unmap what link_read_setup gave. */
void link_forget_setup(struct link_setup *setup);

/* The machine is ready: channel 0 is open from here on, so run_back must follow. */
bool link_setup_done(int link);

/* `what` could not be done; all but its first 1000 bytes is left out. The guest is to power off. */
bool link_setup_failed(int link, int error, const char *what);

#endif
