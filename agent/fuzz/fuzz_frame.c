/* libFuzzer harness: a stream of frames from a hostile host side, as the agent would parse it. */
#include <stdlib.h>
#include <string.h>

#include "frame.h"

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size);

/* A START that was believed: all that execve would read must lie in the payload, and make sense. */
static void check_start(const struct start *start, const uint8_t *payload, size_t length) {
  const char *end = (const char *)payload + length;
  char **vectors = malloc(((size_t)start->argc + start->envc + 2) * sizeof *vectors);
  if (!vectors) abort();
  char **env = fill_vectors(start, vectors);
  if (start->cwd[0] != '/' || vectors[start->argc] || env[start->envc] || env != vectors + start->argc + 1) abort();
  size_t total = START_HEAD_BYTES + strlen(start->cwd) + 1;
  for (uint32_t i = 0; i < start->argc; i++) total += strlen(vectors[i]) + 1;
  for (uint32_t i = 0; i < start->envc; i++) total += strlen(env[i]) + 1;
  if (start->strings + (total - START_HEAD_BYTES - strlen(start->cwd) - 1) != end || total != length) abort();
  free(vectors);
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size) {
  while (size >= HEADER_BYTES) {
    struct header header;
    if (!parse_header(data, &header)) return 0;
    if (header.length > MAX_PAYLOAD_BYTES || descriptors_of(&header) > 3) abort();
    bool relays = header.type == START && header.flags & START_RELAY;
    if (relays && (!(header.flags & START_TTY) || header.flags & START_DETACH || descriptors_of(&header) != 1)) abort();
    data += HEADER_BYTES;
    size -= HEADER_BYTES;
    /* A frame that promises more than there is: parse what there is, as if the header had said so. */
    size_t length = header.length < size ? header.length : size;
    if (header.type == START) {
      /* A copy of exactly that size, so that a read beyond it is seen. */
      uint8_t *payload = malloc(length);
      if (!payload && length > 0) abort();
      if (length > 0) memcpy(payload, data, length);
      struct start start;
      if (parse_start(header.flags, payload, length, &start)) check_start(&start, payload, length);
      free(payload);
    }
    data += length;
    size -= length;
  }
  return 0;
}
