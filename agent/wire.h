/* Frames over a connected socket, with descriptors. Reads never block and never go past the end of a frame. */
#ifndef RINGFENCE_WIRE_H
#define RINGFENCE_WIRE_H

#include "frame.h"

enum { MAX_DESCRIPTORS = 3 };
enum wire_result { WIRE_FRAME, WIRE_WAIT, WIRE_END, WIRE_BAD };

struct wire {
  int sock; /* -1: closed */
  uint32_t got;
  struct header header;
  uint8_t *payload;
  uint8_t head[HEADER_BYTES];
  uint8_t small[MAX_SMALL_BYTES];
  int descriptors[MAX_DESCRIPTORS];
  int descriptor_count;
};

void wire_open(struct wire *wire, int sock);

/* Read until a frame is whole (WIRE_FRAME: handle it, then wire_release), or nothing more is there (WIRE_WAIT). */
enum wire_result wire_read(struct wire *wire);

/* Forget the frame: give its memory back, wiped, and close the descriptors that nobody took (took: set to -1). */
void wire_release(struct wire *wire);

/* Send a whole frame with `descriptor` (-1: none). False: the peer is gone, or does not read. */
bool wire_send(const struct wire *wire, uint8_t type, const uint32_t *words, uint32_t count, int descriptor);

/* The same with a payload of up to MAX_REPORT_BYTES, for which `frame` has its header's bytes of room in front. Waits,
   but not for long, for a peer that has to read before the rest fits. */
bool wire_send_large(const struct wire *wire, uint8_t type, uint8_t *frame, uint32_t length);

/* Receive the one descriptor that comes with a byte on `sock`. -1 and errno: EAGAIN when there is none yet. */
int wire_take_connection(int sock);

#endif
