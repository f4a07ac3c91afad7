#define _GNU_SOURCE
#include "link.h"

#include <errno.h>
#include <poll.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

enum { READ_BYTES = 1 << 16 };
/* How long a virtio port that has nobody at its other end, as after a restore, is left alone. */
enum { ABSENT_MS = 10 };

/* What may be said */

enum place { MACHINE, FURTHER, ANY, SENT, RECEIVED }; /* SENT, RECEIVED: about a stream, by its sender or its receiver */

struct rule {
  uint8_t type;
  uint8_t from; /* 1 << LINK_HOST | 1 << LINK_GUEST */
  uint8_t place;
  uint32_t least;
  uint32_t most;
};

enum { BY_HOST = 1 << LINK_HOST, BY_GUEST = 1 << LINK_GUEST, BY_BOTH = BY_HOST | BY_GUEST };

static const struct rule rules[] = {
    {LINK_HELLO, BY_GUEST, MACHINE, 8 + 2, LINK_WORDS_BYTES},
    {LINK_SETUP, BY_HOST, MACHINE, LINK_SETUP_HEAD_BYTES, LINK_SETUP_BYTES},
    {LINK_SETUP_DONE, BY_GUEST, MACHINE, 0, 0},
    {LINK_SETUP_FAILED, BY_GUEST, MACHINE, 4 + 1, LINK_WORDS_BYTES},
    {LINK_OPEN, BY_HOST, FURTHER, 0, 0},
    {LINK_CLOSE, BY_HOST, FURTHER, 0, 0},
    {LINK_CLOSE, BY_GUEST, ANY, 0, 0},
    {LINK_CONTROL, BY_HOST, ANY, HEADER_BYTES, LINK_FROM_HOST_BYTES},
    {LINK_CONTROL, BY_GUEST, ANY, HEADER_BYTES, LINK_FROM_GUEST_BYTES},
    {LINK_DATA, BY_BOTH, SENT, 1, LINK_DATA_BYTES},
    {LINK_END, BY_BOTH, SENT, 0, 0},
    {LINK_CREDIT, BY_BOTH, RECEIVED, 4, 4},
    {LINK_STOP, BY_BOTH, RECEIVED, 0, 0},
    {LINK_POWEROFF, BY_HOST, MACHINE, 0, 0},
};

static bool is_place(enum place place, enum link_end from, const struct link_header *header) {
  if (place == MACHINE) return header->channel == LINK_MACHINE && header->stream == 0;
  if (header->channel >= LINK_CHANNELS) return false;
  if (place == FURTHER) return header->channel > 0 && header->stream == 0;
  if (place == ANY) return header->stream == 0;
  /* Stream 0 goes to the guest, the others come from it. */
  bool to_guest = header->stream == 0;
  return header->stream < LINK_STREAMS && to_guest == ((from == LINK_HOST) == (place == SENT));
}

bool link_allows(enum link_end from, const struct link_header *header) {
  for (size_t i = 0; i < sizeof rules / sizeof *rules; i++) {
    const struct rule *rule = &rules[i];
    if (rule->type != header->type || !(rule->from & 1 << from)) continue;
    return header->length >= rule->least && header->length <= rule->most && is_place(rule->place, from, header);
  }
  return false;
}

bool is_answer(const uint8_t *frame, size_t length) {
  if (length < HEADER_BYTES || get_u32(frame) != length - HEADER_BYTES || frame[5] != 0 || get_u16(frame + 6) != 0) {
    return false;
  }
  length -= HEADER_BYTES;
  switch (frame[4]) {
    case READY:
    case PREPARED:
    case FAILED: return length == 8;
    case EXITED: return length == 12;
    case REPORTED: return length <= MAX_REPORT_BYTES;
    default: return false;
  }
}

struct link_header get_link_header(const uint8_t bytes[LINK_HEADER_BYTES]) {
  return (struct link_header){get_u32(bytes), bytes[4], bytes[5], get_u16(bytes + 6)};
}

void put_link_header(uint8_t bytes[LINK_HEADER_BYTES], const struct link_header *header) {
  put_u32(bytes, header->length);
  put_u32(bytes + 4, (uint32_t)header->type | (uint32_t)header->stream << 8 | (uint32_t)header->channel << 16);
}

/* Queues */

static bool open_room(struct link_queue *queue, size_t room) {
  void *bytes = mmap(NULL, room, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  *queue = (struct link_queue){.bytes = bytes == MAP_FAILED ? NULL : bytes, .room = room};
  return queue->bytes;
}

bool link_open_queue(struct link_queue *queue, uint32_t most) {
  /* What is busy already, a frame, and once more the last of a job's streams: see back.c. */
  size_t last = 2 * (LINK_WINDOW_BYTES + 3 * LINK_HEADER_BYTES);
  return open_room(queue, 2 * (size_t)LINK_BUSY_BYTES + LINK_HEADER_BYTES + most + last + LINK_DATA_BYTES);
}

bool link_open_reader(struct link_queue *reader, uint32_t most) {
  return open_room(reader, (size_t)LINK_HEADER_BYTES + most + READ_BYTES);
}

void link_close(struct link_queue *queue) {
  if (queue->bytes) munmap(queue->bytes, queue->room);
  queue->bytes = NULL;
}

static size_t pending(const struct link_queue *queue) {
  return queue->end - queue->begin;
}

bool link_is_busy(const struct link_queue *queue) {
  return pending(queue) >= LINK_BUSY_BYTES;
}

/* What has been moved gives its place back, and that of a large frame, which may hold secrets, its memory too. */
static void tidy(struct link_queue *queue) {
  if (queue->begin < queue->end) return;
  if (queue->end > 4 * (size_t)READ_BYTES) madvise(queue->bytes, queue->room, MADV_DONTNEED);
  queue->begin = queue->end = 0;
}

static void move_to_front(struct link_queue *queue) {
  memmove(queue->bytes, queue->bytes + queue->begin, pending(queue));
  queue->end = pending(queue);
  queue->begin = 0;
}

uint8_t *link_room(struct link_queue *queue, uint32_t most) {
  if (queue->begin >= LINK_BUSY_BYTES) move_to_front(queue);
  size_t wanted = LINK_HEADER_BYTES + (size_t)most;
  /* Nothing is put into a busy queue, so this never happens; and would not go unnoticed. */
  if (queue->room - queue->end < wanted) __builtin_trap();
  return queue->bytes + queue->end + LINK_HEADER_BYTES;
}

void link_put_header(struct link_queue *queue, const struct link_header *header) {
  put_link_header(queue->bytes + queue->end, header);
  queue->end += LINK_HEADER_BYTES + (size_t)header->length;
}

void link_put(struct link_queue *queue, const struct link_header *header, const void *payload) {
  uint8_t *room = link_room(queue, header->length);
  if (header->length > 0) memcpy(room, payload, header->length);
  link_put_header(queue, header);
}

enum link_result link_flush(struct link_queue *queue, int link) {
  while (queue->begin < queue->end) {
    ssize_t count = write(link, queue->bytes + queue->begin, pending(queue));
    if (count < 0 && errno == EINTR) continue;
    if (count < 0) return errno == EAGAIN || errno == EWOULDBLOCK ? LINK_WAIT : LINK_GONE;
    queue->begin += (size_t)count;
  }
  tidy(queue);
  return LINK_FRAME;
}

enum link_result link_fill(struct link_queue *reader, int link) {
  if (reader->begin > 0) move_to_front(reader);
  size_t size = reader->room - reader->end < READ_BYTES ? reader->room - reader->end : READ_BYTES;
  ssize_t count;
  do count = read(link, reader->bytes + reader->end, size);
  while (count < 0 && errno == EINTR);
  if (count < 0) return errno == EAGAIN || errno == EWOULDBLOCK ? LINK_WAIT : LINK_GONE;
  if (count == 0) return LINK_GONE;
  reader->end += (size_t)count;
  return LINK_FRAME;
}

enum link_result link_next(struct link_queue *reader, enum link_end from, struct link_header *header, uint8_t **payload) {
  if (pending(reader) < LINK_HEADER_BYTES) return LINK_WAIT;
  *header = get_link_header(reader->bytes + reader->begin);
  if (!link_allows(from, header)) return LINK_BAD;
  if (pending(reader) - LINK_HEADER_BYTES < header->length) return LINK_WAIT;
  *payload = reader->bytes + reader->begin + LINK_HEADER_BYTES;
  return LINK_FRAME;
}

void link_done(struct link_queue *reader, const struct link_header *header) {
  reader->begin += LINK_HEADER_BYTES + (size_t)header->length;
  tidy(reader);
}

/* The guest before the back: one frame after the other, waiting for each */

static bool wait_for(int link, short events) {
  struct pollfd wanted = {.fd = link, .events = events};
  return poll(&wanted, 1, -1) >= 0 || errno == EINTR;
}

static bool write_all(int link, const uint8_t *bytes, size_t length) {
  while (length > 0) {
    ssize_t count = write(link, bytes, length);
    if (count < 0) {
      if (errno != EINTR && (errno != EAGAIN || !wait_for(link, POLLOUT))) return false;
      continue;
    }
    bytes += count;
    length -= (size_t)count;
  }
  return true;
}

/* A virtio port says that it has ended while nobody is at its other end, who may yet come. */
static bool is_port(int link) {
  struct stat about;
  return fstat(link, &about) == 0 && S_ISCHR(about.st_mode);
}

static bool read_all(int link, void *to, size_t length) {
  uint8_t *bytes = to;
  while (length > 0) {
    ssize_t count = read(link, bytes, length);
    if (count < 0) {
      if (errno != EINTR && (errno != EAGAIN || !wait_for(link, POLLIN))) return false;
      continue;
    }
    if (count == 0) {
      errno = EPIPE;
      if (!is_port(link)) return false;
      poll(NULL, 0, ABSENT_MS);
    }
    bytes += count;
    length -= (size_t)count;
  }
  return true;
}

static bool say(int link, uint8_t type, const uint8_t *payload, size_t length) {
  uint8_t frame[LINK_HEADER_BYTES + LINK_WORDS_BYTES];
  const struct link_header header = {(uint32_t)length, type, 0, LINK_MACHINE};
  put_link_header(frame, &header);
  if (length > 0) memcpy(frame + LINK_HEADER_BYTES, payload, length);
  return write_all(link, frame, LINK_HEADER_BYTES + length);
}

/* `text`, cut short if need be, and its NUL. Returns where the next one goes. */
static size_t put_text(uint8_t *payload, size_t at, const char *text, size_t most) {
  size_t length = strlen(text);
  if (length > most) length = most;
  memcpy(payload + at, text, length);
  payload[at + length] = 0;
  return at + length + 1;
}

static const char *decimal(uint64_t number, char digits[21]) {
  char *at = digits + 20;
  for (*at = '\0'; number > 9; number /= 10) *--at = (char)('0' + number % 10);
  *--at = (char)('0' + number);
  return at;
}

bool link_say_hello(int link, const char *release, uint64_t boot_ms) {
  uint8_t payload[LINK_WORDS_BYTES];
  char digits[21];
  put_u32(payload, LINK_VERSION);
  put_u32(payload + 4, 0);
  size_t length = put_text(payload, 8, release, 256);
  return say(link, LINK_HELLO, payload, put_text(payload, length, decimal(boot_ms, digits), sizeof digits));
}

bool link_read_setup(int link, struct link_setup *setup) {
  uint8_t head[LINK_HEADER_BYTES + LINK_SETUP_HEAD_BYTES];
  if (!read_all(link, head, LINK_HEADER_BYTES)) return false;
  const struct link_header header = get_link_header(head);
  errno = EPROTO;
  if (header.type != LINK_SETUP || !link_allows(LINK_HOST, &header)) return false;
  if (!read_all(link, head + LINK_HEADER_BYTES, LINK_SETUP_HEAD_BYTES)) return false;
  setup->realtime_ns = get_u64(head + LINK_HEADER_BYTES);
  memcpy(setup->entropy, head + LINK_HEADER_BYTES + 8, LINK_ENTROPY_BYTES);
  setup->length = header.length - LINK_SETUP_HEAD_BYTES;
  /* One byte more, so that there is always a NUL. */
  setup->text = mmap(NULL, setup->length + 1, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  if (setup->text == MAP_FAILED) return false;
  bool good = read_all(link, setup->text, setup->length);
  if (good && (setup->length == 0 || setup->text[setup->length - 1] == '\0')) return true;
  if (good) errno = EPROTO;
  link_forget_setup(setup);
  return false;
}

void link_forget_setup(struct link_setup *setup) {
  int error = errno;
  explicit_bzero(setup->entropy, sizeof setup->entropy);
  munmap(setup->text, setup->length + 1);
  setup->text = NULL;
  setup->length = 0;
  errno = error;
}

bool link_setup_done(int link) {
  return say(link, LINK_SETUP_DONE, NULL, 0);
}

bool link_setup_failed(int link, int error, const char *what) {
  uint8_t payload[LINK_WORDS_BYTES];
  put_u32(payload, (uint32_t)error);
  return say(link, LINK_SETUP_FAILED, payload, put_text(payload, 4, what, 1000));
}
