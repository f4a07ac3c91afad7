#define _GNU_SOURCE
#include "output.h"

#include <errno.h>
#include <time.h>
#include <unistd.h>

enum { PIECE_BYTES = 1 << 16 };

static uint8_t record[RECORD_HEADER_BYTES + PIECE_BYTES];

void output_none(struct output *output) {
  *output = (struct output){.log = -1, .sources = {-1, -1}};
}

bool output_open(struct output *output, int log, uint64_t limit) {
  output_none(output);
  output->end = lseek(log, 0, SEEK_END);
  if (output->end < 0) return false;
  output->last_record = output->end;
  output->log = log;
  output->limit = limit;
  return true;
}

static uint64_t now_ns(void) {
  struct timespec now;
  clock_gettime(CLOCK_REALTIME, &now);
  return (uint64_t)now.tv_sec * 1000000000U + (uint64_t)now.tv_nsec;
}

static bool write_all(int log, const uint8_t *bytes, size_t length) {
  while (length > 0) {
    ssize_t count = write(log, bytes, length);
    if (count < 0 && errno == EINTR) continue;
    if (count <= 0) return false;
    bytes += count;
    length -= (size_t)count;
  }
  return true;
}

/* Write the record whose payload stands in the buffer: whole, or not at all. */
static bool append(struct output *output, enum stream stream, uint32_t length) {
  put_u64(record, now_ns());
  put_u32(record + 8, length);
  put_u32(record + 12, stream);
  if (output->torn) return false;
  if (!write_all(output->log, record, RECORD_HEADER_BYTES + (size_t)length)) {
    /* Half a record would make what follows unreadable; if it cannot be undone, the log stays without an end. */
    output->torn = ftruncate(output->log, output->end) != 0;
    return false;
  }
  output->last_record = output->end;
  output->last_bytes = length;
  output->end += RECORD_HEADER_BYTES + (int64_t)length;
  return true;
}

/* How much of `length` the limit still admits; once something was dropped, nothing: a log has no holes. */
static uint32_t admitted(const struct output *output, uint32_t length) {
  if (output->truncated) return 0;
  if (output->limit == 0) return length;
  uint64_t left = output->limit - output->used;
  if (left <= RECORD_HEADER_BYTES) return 0;
  left -= RECORD_HEADER_BYTES;
  return left < length ? (uint32_t)left : length;
}

static void keep(struct output *output, enum stream stream, uint32_t length) {
  uint32_t kept = admitted(output, length);
  if (kept > 0 && append(output, stream, kept)) {
    output->used += RECORD_HEADER_BYTES + (uint64_t)kept;
  } else {
    kept = 0;
  }
  if (kept < length) output->truncated = true;
  output->dropped += length - kept;
}

bool output_pump(struct output *output, int source) {
  ssize_t count = read(output->sources[source], record + RECORD_HEADER_BYTES, PIECE_BYTES);
  if (count < 0) return errno == EINTR || errno == EAGAIN || errno == EWOULDBLOCK;
  if (count == 0) return false;
  keep(output, source == 0 ? STREAM_OUT : STREAM_ERR, (uint32_t)count);
  return true;
}

/* A full disk or file: give the last record's room to the end record. */
static bool drop_last_record(struct output *output) {
  if (output->last_record == output->end || ftruncate(output->log, output->last_record) != 0) return false;
  output->end = output->last_record;
  output->dropped += output->last_bytes;
  output->truncated = true;
  return true;
}

static bool append_end(struct output *output, uint32_t exit_code, uint32_t signal, uint32_t flags) {
  uint8_t *payload = record + RECORD_HEADER_BYTES;
  put_u32(payload, exit_code);
  put_u32(payload + 4, signal);
  put_u32(payload + 8, flags | (output->truncated ? OUTPUT_TRUNCATED : 0));
  put_u32(payload + 12, 0);
  put_u64(payload + 16, output->dropped);
  return append(output, STREAM_END, END_RECORD_BYTES);
}

void output_close(struct output *output, uint32_t exit_code, uint32_t signal, uint32_t flags) {
  if (output->log < 0) return;
  if (!append_end(output, exit_code, signal, flags) && drop_last_record(output)) {
    append_end(output, exit_code, signal, flags);
  }
  close(output->log);
  output->log = -1;
}
