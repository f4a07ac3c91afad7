#include "frame.h"

#include <string.h>

uint16_t get_u16(const uint8_t *bytes) {
  return (uint16_t)(bytes[0] | bytes[1] << 8);
}

uint32_t get_u32(const uint8_t *bytes) {
  return (uint32_t)get_u16(bytes) | (uint32_t)get_u16(bytes + 2) << 16;
}

uint64_t get_u64(const uint8_t *bytes) {
  return (uint64_t)get_u32(bytes) | (uint64_t)get_u32(bytes + 4) << 32;
}

void put_u32(uint8_t *bytes, uint32_t value) {
  for (int i = 0; i < 4; i++) bytes[i] = (uint8_t)(value >> 8 * i);
}

void put_u64(uint8_t *bytes, uint64_t value) {
  put_u32(bytes, (uint32_t)value);
  put_u32(bytes + 4, (uint32_t)(value >> 32));
}

void put_header(uint8_t *bytes, uint8_t type, uint32_t length) {
  put_u32(bytes, length);
  put_u32(bytes + 4, type);
}

/* Unknown flags, and a relay for what is no terminal or has nobody at its other end, are refused. */
static bool are_flags_of_start(uint8_t flags) {
  if (flags & ~(START_TTY | START_DETACH | START_HOLD | START_RELAY)) return false;
  return !(flags & START_RELAY) || (flags & (START_TTY | START_DETACH)) == START_TTY;
}

bool parse_header(const uint8_t bytes[HEADER_BYTES], struct header *header) {
  header->length = get_u32(bytes);
  header->type = bytes[4];
  header->flags = bytes[5];
  if (get_u16(bytes + 6) != 0) return false;
  switch (header->type) {
    case START:
      return header->length >= START_HEAD_BYTES && header->length <= MAX_PAYLOAD_BYTES &&
             are_flags_of_start(header->flags);
    case SIGNAL:
    case RESIZE: return header->length == 4 && header->flags == 0;
    case GO:
    case SHUTDOWN:
    case REPORT: return header->length == 0 && header->flags == 0;
    default: return false;
  }
}

int descriptors_of(const struct header *header) {
  if (header->type != START) return 0;
  if (header->flags & (START_DETACH | START_RELAY)) return 1;
  return header->flags & START_TTY ? 0 : 3;
}

/* The string after `string`, or NULL if `string` does not end before `end`. */
static char *next_string(char *string, const char *end) {
  char *nul = string < end ? memchr(string, 0, (size_t)(end - string)) : NULL;
  return nul ? nul + 1 : NULL;
}

bool parse_start(uint8_t flags, uint8_t *payload, size_t length, struct start *start) {
  if (length < START_HEAD_BYTES) return false;
  start->deadline_ms = get_u32(payload);
  start->output_limit = get_u64(payload + 8);
  start->cols = get_u16(payload + 16);
  start->rows = get_u16(payload + 18);
  start->argc = get_u32(payload + 20);
  start->envc = get_u32(payload + 24);
  if (get_u32(payload + 4) != 0) return false;
  if (start->output_limit != 0 && !(flags & START_DETACH)) return false;
  if (start->argc < 1 || start->argc >= MAX_STRINGS || start->envc >= MAX_STRINGS - start->argc) return false;

  char *end = (char *)payload + length;
  start->cwd = (char *)payload + START_HEAD_BYTES;
  start->strings = next_string(start->cwd, end);
  if (!start->strings || start->cwd[0] != '/') return false;
  char *string = start->strings;
  for (uint32_t left = start->argc + start->envc; left > 0; left--) {
    string = next_string(string, end);
    if (!string) return false;
  }
  return string == end;
}

static char *fill(char **vector, uint32_t count, char *string) {
  for (uint32_t i = 0; i < count; i++) {
    vector[i] = string;
    string += strlen(string) + 1;
  }
  vector[count] = NULL;
  return string;
}

char **fill_vectors(const struct start *start, char **vectors) {
  char **env = vectors + start->argc + 1;
  fill(env, start->envc, fill(vectors, start->argc, start->strings));
  return env;
}
