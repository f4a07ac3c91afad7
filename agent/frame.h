/* Frames of agent/PROTOCOL.md: bytes in, checked structures out. Pure: no system calls, no memory of its own. */
#ifndef RINGFENCE_FRAME_H
#define RINGFENCE_FRAME_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

enum { PROTOCOL_VERSION = 1 };
enum { HEADER_BYTES = 8, START_HEAD_BYTES = 28, RECORD_HEADER_BYTES = 16, END_RECORD_BYTES = 24 };
enum { MAX_PAYLOAD_BYTES = 4 << 20, MAX_SMALL_BYTES = 4, MAX_ANSWER_BYTES = 12, MAX_STRINGS = 1 << 18 };
enum { MAX_REPORT_BYTES = 1 << 18 };

enum host_frame { START = 1, GO = 2, SIGNAL = 3, RESIZE = 4, SHUTDOWN = 5, REPORT = 6 };
enum agent_frame { READY = 65, PREPARED = 66, FAILED = 67, EXITED = 68, REPORTED = 69 };
enum start_flag { START_TTY = 1, START_DETACH = 2, START_HOLD = 4, START_RELAY = 8 };
enum end_flag { TIMED_OUT = 1, OUTPUT_TRUNCATED = 2, OUT_OF_MEMORY = 4 }; /* the last by the back alone: LINK.md */
enum stage { STAGE_FORK = 1, STAGE_DESCRIPTORS = 2, STAGE_CWD = 3, STAGE_EXEC = 4 };
enum stream { STREAM_END = 0, STREAM_OUT = 1, STREAM_ERR = 2 };

struct header {
  uint32_t length;
  uint8_t type;
  uint8_t flags;
};

/* A checked START; the strings lie in the payload that it was parsed from. */
struct start {
  uint32_t deadline_ms;
  uint64_t output_limit;
  uint16_t cols;
  uint16_t rows;
  uint32_t argc;
  uint32_t envc;
  char *cwd;
  char *strings; /* argv[argc], then env[envc], one after the other */
};

/* Header of a frame from the host. False unless type, flags, length and the reserved field agree with each other. */
bool parse_header(const uint8_t bytes[HEADER_BYTES], struct header *header);

/* How many descriptors must come with a frame from the host. */
int descriptors_of(const struct header *header);

/* START's payload. False unless it is exactly what its counts say. `start` points into `payload` afterwards. */
bool parse_start(uint8_t flags, uint8_t *payload, size_t length, struct start *start);

/* Lay out argv and env as execve wants them in `vectors`, which has room for argc + envc + 2; returns env. */
char **fill_vectors(const struct start *start, char **vectors);

uint16_t get_u16(const uint8_t *bytes);
uint32_t get_u32(const uint8_t *bytes);
uint64_t get_u64(const uint8_t *bytes);
void put_header(uint8_t *bytes, uint8_t type, uint32_t length);
void put_u32(uint8_t *bytes, uint32_t value);
void put_u64(uint8_t *bytes, uint64_t value);

#endif
