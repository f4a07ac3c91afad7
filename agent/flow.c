#define _GNU_SOURCE
#include "flow.h"

#include <errno.h>
#include <fcntl.h>
#include <poll.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/uio.h>
#include <unistd.h>

#include "ring.h"

/* Credit is given back in pieces of at least this, so that it takes few frames. */
enum { GRANT_BYTES = LINK_WINDOW_BYTES / 4 };
enum { NOWAIT = 8 }; /* RWF_NOWAIT, linux/fs.h */

unsigned streams_of(uint8_t start_flags) {
  if (start_flags & START_DETACH) return 1 << 1;
  if (start_flags & START_RELAY) return 1 << 0 | 1 << 1;
  return start_flags & START_TTY ? 0 : 1 << 0 | 1 << 1 | 1 << 2;
}

/* One flow */

void flow_send(struct flow *flow, int fd) {
  *flow = (struct flow){.fd = fd, .made = true, .sends = true, .credit = LINK_WINDOW_BYTES};
}

void flow_receive(struct flow *flow, int fd, uint8_t *window) {
  *flow = (struct flow){.fd = fd, .made = true, .credit = LINK_WINDOW_BYTES, .window = window};
}

void flow_drop(struct flow *flow) {
  if (!flow->made || flow->fd < 0) return;
  /* The other flow has a copy: only this makes the other side see that nothing more comes. */
  if (flow->sock && !flow->sends) shutdown(flow->fd, SHUT_WR);
  close(flow->fd);
  flow->fd = -1;
  flow->held = 0;
}

static bool retry(void) {
  return errno == EAGAIN || errno == EWOULDBLOCK || errno == EINTR;
}

/* Read without waiting, though the descriptor may be a blocking one which somebody else reads from as well: what
   poll(2) has seen may be gone. */
static ssize_t read_shared(int fd, uint8_t *to, size_t size) {
  struct stat about;
  if (fstat(fd, &about) == 0 && (S_ISFIFO(about.st_mode) || S_ISSOCK(about.st_mode))) {
    struct iovec part = {.iov_base = to, .iov_len = size};
    ssize_t count = syscall(SYS_preadv2, (long)fd, &part, 1L, -1L, -1L, (long)NOWAIT);
    if (count >= 0 || (errno != EOPNOTSUPP && errno != ENOSYS && errno != EPERM)) return count;
  }
  /* Pipes of kernels before 6.4, and terminals, have no such way. A regular file is read for certain by this one. */
  return read(fd, to, size);
}

bool flow_pump(struct flow *flow, uint16_t channel, uint8_t stream, struct link_queue *queue) {
  if (!flow->sends || flow->fd < 0 || flow->paused || flow->credit == 0) return false;
  uint32_t most = flow->credit < LINK_DATA_BYTES ? flow->credit : LINK_DATA_BYTES;
  uint8_t *room = link_room(queue, most);
  ssize_t count = flow->shared ? read_shared(flow->fd, room, most) : read(flow->fd, room, most);
  if (count < 0 && retry()) return false;
  if (count <= 0) {
    flow_drop(flow);
    return false;
  }
  const struct link_header header = {(uint32_t)count, LINK_DATA, stream, channel};
  link_put_header(queue, &header);
  flow->credit -= (uint32_t)count;
  return true;
}

static void flow_flush(struct flow *flow) {
  while (flow->fd >= 0 && flow->held > 0) {
    uint32_t first = LINK_WINDOW_BYTES - flow->begin;
    if (first > flow->held) first = flow->held;
    struct iovec parts[] = {{.iov_base = flow->window + flow->begin, .iov_len = first},
                            {.iov_base = flow->window, .iov_len = flow->held - first}};
    ssize_t count = writev(flow->fd, parts, flow->held > first ? 2 : 1);
    if (count < 0 && errno == EINTR) continue;
    if (count < 0 && retry()) return;
    if (count <= 0) {
      flow_drop(flow);
      return;
    }
    flow->begin = (flow->begin + (uint32_t)count) % LINK_WINDOW_BYTES;
    flow->held -= (uint32_t)count;
    flow->due += (uint32_t)count;
  }
  if (flow->ended) flow_drop(flow);
}

/* Never more than the window has room for: what is held, due and granted is the window's size in all. */
static void hold(struct flow *flow, const uint8_t *bytes, uint32_t length) {
  uint32_t at = (flow->begin + flow->held) % LINK_WINDOW_BYTES;
  uint32_t first = LINK_WINDOW_BYTES - at < length ? LINK_WINDOW_BYTES - at : length;
  memcpy(flow->window + at, bytes, first);
  memcpy(flow->window, bytes + first, length - first);
  flow->held += length;
}

static bool hear_data(struct flow *flow, const uint8_t *bytes, uint32_t length) {
  if (flow->ended || length > flow->credit) return false;
  flow->credit -= length;
  if (flow->fd < 0) return true; /* the sender does not know yet */
  if (flow->file) {
    store(flow->fd, &flow->left, bytes, length);
    flow->due += length;
  } else {
    hold(flow, bytes, length);
    flow_flush(flow);
  }
  return true;
}

static bool hear_credit(struct flow *flow, uint32_t bytes) {
  if (flow->stopped || bytes == 0 || bytes > LINK_WINDOW_BYTES - flow->credit) return false;
  flow->credit += bytes;
  return true;
}

void flow_finish(struct flow *flow) {
  flow->ended = true;
  flow_flush(flow);
}

bool flow_holds(const struct flow *flow) {
  return flow->made && !flow->sends && flow->fd >= 0 && flow->held > 0;
}

int flow_events(const struct flow *flow, bool busy) {
  if (!flow->made || flow->fd < 0 || flow->file) return -1;
  if (flow->sends) return busy || flow->paused || flow->credit == 0 ? -1 : POLLIN;
  return flow->held > 0 ? POLLOUT : 0; /* that nobody reads any more shows without being asked for */
}

/* Lines */

void line_open(struct line *line, uint16_t channel) {
  memset(line, 0, sizeof *line);
  line->channel = channel;
  line->open = true;
  for (int i = 0; i < LINK_STREAMS; i++) line->flows[i].fd = -1;
}

static void drop_all(struct line *line) {
  for (int i = 0; i < LINK_STREAMS; i++) flow_drop(&line->flows[i]);
}

void line_turn(struct line *line, uint8_t stream, short found, struct link_queue *queue) {
  struct flow *flow = &line->flows[stream];
  if (found == 0 || flow->fd < 0) return;
  if (flow->sends) {
    if (!link_is_busy(queue)) flow_pump(flow, line->channel, stream, queue);
  } else if (found & (POLLERR | POLLNVAL) || (flow->sock && found & POLLHUP)) {
    /* Nobody on the host has the terminal any more: nothing more can be typed, either. */
    if (line->relay && stream == 1) drop_all(line);
    flow_drop(flow);
  } else {
    flow_flush(flow);
  }
}

bool line_hear(struct line *line, const struct link_header *header, const uint8_t *payload) {
  struct flow *flow = &line->flows[header->stream];
  if (!line->open || !flow->made) return false;
  switch (header->type) {
    case LINK_DATA: return hear_data(flow, payload, header->length);
    case LINK_CREDIT: return hear_credit(flow, get_u32(payload));
    case LINK_END:
      if (flow->ended) return false;
      flow_finish(flow);
      return true;
    case LINK_STOP:
      if (flow->stopped) return false;
      flow->stopped = true;
      if (line->relay && header->stream == 1) drop_all(line);
      flow_drop(flow);
      return true;
    default: return false;
  }
}

static bool say(struct link_queue *queue, uint8_t type, uint8_t stream, uint16_t channel) {
  if (link_is_busy(queue)) return false;
  const struct link_header header = {0, type, stream, channel};
  link_put(queue, &header, NULL);
  return true;
}

static void grant(struct flow *flow, uint16_t channel, uint8_t stream, struct link_queue *queue) {
  if (flow->ended || flow->due < GRANT_BYTES || link_is_busy(queue)) return;
  uint8_t payload[4];
  put_u32(payload, flow->due);
  const struct link_header header = {sizeof payload, LINK_CREDIT, stream, channel};
  link_put(queue, &header, payload);
  flow->credit += flow->due;
  flow->due = 0;
}

void line_owe(struct line *line, struct link_queue *queue) {
  if (!line->open) return;
  for (uint8_t i = 0; i < LINK_STREAMS; i++) {
    struct flow *flow = &line->flows[i];
    if (!flow->made) continue;
    if (flow->sends) {
      if (flow->fd < 0 && !flow->ended) flow->ended = say(queue, LINK_END, i, line->channel);
    } else if (flow->fd >= 0) {
      grant(flow, line->channel, i, queue);
    } else if (!flow->stopped) {
      flow->stopped = say(queue, LINK_STOP, i, line->channel);
    }
  }
  if (line->lost && !line->closed_here) line->closed_here = say(queue, LINK_CLOSE, 0, line->channel);
}

bool line_is_over(const struct line *line) {
  for (int i = 0; i < LINK_STREAMS; i++) {
    const struct flow *flow = &line->flows[i];
    if (flow->made && !(flow->ended && flow->stopped)) return false;
  }
  return line->closed_here && line->closed_there;
}
