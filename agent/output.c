#define _GNU_SOURCE
#include "output.h"

#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <poll.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <time.h>
#include <unistd.h>

#include "system.h"

enum { PIECE_BYTES = 1 << 16 };
/* How long the last records may wait for room in a pipe that its reader is behind with. */
enum { LAST_MS = 500 };

static uint8_t record[RECORD_HEADER_BYTES + PIECE_BYTES];

void output_none(struct output *output) {
  *output = (struct output){.log = -1, .sources = {-1, -1}};
}

/* Out of a kernel of its own no file of the host's may be written: there the log is a pipe, which somebody on the host
   copies into one. A pipe differs in two ways. It can be full: then the sources wait, as they would if the job wrote
   to it itself. And what is in it cannot be cut back: so a record has PIPE_BUF bytes at most, which go in whole or not
   at all (pipe(7)), and there is never half of one at the end. */
static bool open_pipe(struct output *output, int log) {
  struct stat about;
  if (fstat(log, &about) != 0) return false;
  if (!S_ISFIFO(about.st_mode)) {
    errno = EINVAL;
    return false;
  }
  if (fcntl(log, F_SETFL, O_NONBLOCK) != 0) return false;
  void *room = mmap(NULL, PIPE_BUF, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  if (room == MAP_FAILED) return false;
  output->held = room;
  return true;
}

bool output_open(struct output *output, int log, uint64_t limit) {
  output_none(output);
  output->end = lseek(log, 0, SEEK_END);
  if (output->end < 0) {
    if (errno != ESPIPE || !open_pipe(output, log)) return false;
    output->end = 0;
  }
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

/* Write `bytes` to the pipe, and hold what has no room. False: nobody reads it any more. */
static bool put_in_pipe(struct output *output, const uint8_t *bytes, uint32_t length) {
  ssize_t count;
  do count = write(output->log, bytes, length);
  while (count < 0 && errno == EINTR);
  if (count < 0 && errno != EAGAIN && errno != EWOULDBLOCK) return false;
  uint32_t written = count < 0 ? 0 : (uint32_t)count;
  output->held_bytes = length - written;
  memmove(output->held, bytes + written, output->held_bytes);
  return true;
}

static bool wait_for_room(const struct output *output, int64_t until) {
  int64_t left = until - now_ms();
  struct pollfd wanted = {.fd = output->log, .events = POLLOUT};
  return left > 0 && poll(&wanted, 1, (int)left) > 0;
}

bool output_is_stuck(const struct output *output) {
  return output->held_bytes > 0;
}

void output_flush(struct output *output) {
  if (!output_is_stuck(output) || put_in_pipe(output, output->held, output->held_bytes)) return;
  output->held_bytes = 0;
  output->torn = output->truncated = true;
}

/* Write the record whose payload stands in the buffer: whole, or not at all. */
static bool append(struct output *output, enum stream stream, uint32_t length) {
  put_u64(record, now_ns());
  put_u32(record + 8, length);
  put_u32(record + 12, stream);
  if (output->torn) return false;
  if (output->held) {
    output->torn = !put_in_pipe(output, record, RECORD_HEADER_BYTES + length);
    return !output->torn;
  }
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
  if (output_is_stuck(output)) return true;
  size_t most = output->held ? PIPE_BUF - RECORD_HEADER_BYTES : PIECE_BYTES;
  ssize_t count = read(output->sources[source], record + RECORD_HEADER_BYTES, most);
  if (count < 0) return errno == EINTR || errno == EAGAIN || errno == EWOULDBLOCK;
  if (count == 0) return false;
  keep(output, source == 0 ? STREAM_OUT : STREAM_ERR, (uint32_t)count);
  return true;
}

/* A full disk or file: give the last record's room to the end record. */
static bool drop_last_record(struct output *output) {
  if (output->held || output->last_record == output->end) return false;
  if (ftruncate(output->log, output->last_record) != 0) return false;
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

static void wait_until_flushed(struct output *output, int64_t until) {
  while (output_is_stuck(output) && wait_for_room(output, until)) output_flush(output);
}

void output_close(struct output *output, uint32_t exit_code, uint32_t signal, uint32_t flags) {
  if (output->log < 0) return;
  int64_t until = now_ms() + LAST_MS;
  wait_until_flushed(output, until);
  if (output_is_stuck(output)) output->torn = true;
  if (!append_end(output, exit_code, signal, flags) && drop_last_record(output)) {
    append_end(output, exit_code, signal, flags);
  }
  wait_until_flushed(output, until);
  close(output->log);
  output->log = -1;
  if (output->held) munmap(output->held, PIPE_BUF);
  output->held = NULL;
}
