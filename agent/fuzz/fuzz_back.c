/* libFuzzer harness: the whole back with a hostile bridge at one end and a hostile agent at the other. What each byte of
   the input does, `step` says. */
#include "back.c"

#include "fuzz/harness.h"

enum { TURNS = 256, AGENTS = 4 };

static int bridge_end;
static int feed_end;
static int agents[AGENTS]; /* the agent's ends of its connections, the main one first */
static int null_device;
static int given[MAX_DESCRIPTORS]; /* what came with the last START */

int LLVMFuzzerInitialize(int *argc, char ***argv) {
  (void)argc;
  (void)argv;
  null_device = begin_harness();
  return 0;
}

static void open_all(void) {
  int links[2];
  int socks[2];
  int feeds[2];
  const int flags = SOCK_STREAM | SOCK_CLOEXEC | SOCK_NONBLOCK;
  must(socketpair(AF_UNIX, flags, 0, links) == 0 && socketpair(AF_UNIX, flags, 0, socks) == 0);
  must(socketpair(AF_UNIX, flags, 0, feeds) == 0);
  memset(&back, 0, sizeof back);
  must(open_back(links[0], socks[0], feeds[0], -1));
  bridge_end = links[1];
  feed_end = feeds[1];
  for (int i = 0; i < AGENTS; i++) agents[i] = -1;
  for (int i = 0; i < MAX_DESCRIPTORS; i++) given[i] = -1;
  agents[0] = socks[1];
}

static void close_all(void) {
  forget_order();
  for (struct peer *peer = main_peer; peer < no_peer; peer++) {
    shut(&peer->sock);
    for (int i = 0; i < LINK_STREAMS; i++) flow_drop(&peer->line.flows[i]);
  }
  for (int i = 0; i < AGENTS; i++) shut(&agents[i]);
  for (int i = 0; i < MAX_DESCRIPTORS; i++) shut(&given[i]);
  shut(&bridge_end);
  shut(&feed_end);
  shut(&back.link);
  shut(&back.feed);
  link_close(&back.in);
  link_close(&back.out);
  munmap(back.windows, (size_t)LINK_CHANNELS * LINK_WINDOW_BYTES);
  munmap(back.report, HEADER_BYTES + MAX_REPORT_BYTES);
}

static void check(void) {
  must(back.out.end <= back.out.room && back.in.end <= back.in.room);
  for (struct peer *peer = main_peer; peer < no_peer; peer++) {
    for (int i = 0; i < LINK_STREAMS; i++) {
      const struct flow *flow = &peer->line.flows[i];
      if (!flow->made) continue;
      must(flow->credit <= LINK_WINDOW_BYTES && flow->held <= LINK_WINDOW_BYTES);
      uint32_t sum = flow->credit + flow->due + flow->held;
      must(flow->sends || (flow->fd >= 0 ? sum == LINK_WINDOW_BYTES : sum <= LINK_WINDOW_BYTES));
    }
  }
}

/* Until nothing is left to do; there must be an end to it. */
static void run(void) {
  for (int turns = 0; !back.over; turns++) {
    must(turns < TURNS);
    turn(0);
    check();
    if (!back.over && !(back.orders && back.orders->sock < 0) && poll(back.watched, back.watched_count, 0) == 0) return;
  }
}

/* Take all that has come to the agent, and its descriptors. */
static void hear(int descriptor, int *kept, int room) {
  union {
    struct cmsghdr align;
    uint8_t bytes[CMSG_SPACE(MAX_DESCRIPTORS * sizeof(int))];
  } rights;
  static uint8_t bytes[1 << 16];
  for (;;) {
    struct iovec part = {.iov_base = bytes, .iov_len = sizeof bytes};
    struct msghdr message = {.msg_iov = &part, .msg_iovlen = 1, .msg_control = &rights, .msg_controllen = sizeof rights};
    if (descriptor < 0 || recvmsg(descriptor, &message, MSG_DONTWAIT | MSG_CMSG_CLOEXEC) <= 0) return;
    struct cmsghdr *header = CMSG_FIRSTHDR(&message);
    size_t count = header ? (header->cmsg_len - CMSG_LEN(0)) / sizeof(int) : 0;
    for (size_t i = 0; i < count; i++) {
      int got;
      memcpy(&got, CMSG_DATA(header) + i * sizeof got, sizeof got);
      int at = 0;
      while (at < room && kept[at] >= 0) at++;
      if (at < room) kept[at] = got;
      else close(got);
    }
  }
}

static void drink(int descriptor) {
  uint8_t bytes[4096];
  if (descriptor < 0) return;
  fcntl(descriptor, F_SETFL, O_NONBLOCK);
  while (read(descriptor, bytes, sizeof bytes) > 0) continue;
}

static void job_step(int *descriptor, uint8_t what) {
  static const uint8_t bytes[8192];
  if (*descriptor < 0) return;
  if (what % 3 == 0) {
    shut(descriptor);
  } else if (what % 3 == 1) {
    drink(*descriptor);
  } else {
    fcntl(*descriptor, F_SETFL, O_NONBLOCK);
    ssize_t ignored = write(*descriptor, bytes, sizeof bytes);
    (void)ignored;
  }
}

/* A frame whose length is right, of the link or of an agent's, up to eight times. */
static size_t say(int descriptor, bool on_link, const uint8_t *data, size_t size) {
  uint8_t frame[LINK_HEADER_BYTES + 255] = {0};
  if (size < 5 || size - 5 < data[4]) return size;
  if (on_link) {
    const struct link_header header = {data[4], data[1], data[2], (uint16_t)(data[3] == 0xFF ? LINK_MACHINE : data[3])};
    put_link_header(frame, &header);
  } else {
    put_header(frame, data[1], data[4]);
  }
  memcpy(frame + LINK_HEADER_BYTES, data + 5, data[4]);
  for (int times = 0; descriptor >= 0 && times <= data[0] % 8; times++) {
    send(descriptor, frame, LINK_HEADER_BYTES + (size_t)data[4], MSG_NOSIGNAL);
  }
  return 5 + (size_t)data[4];
}

/* Take one step off the input; returns how long it was. */
static size_t step(const uint8_t *data, size_t size) {
  uint8_t what = data[0];
  int *agent = &agents[what / 8 % AGENTS];
  if (what < 0x40) { /* bytes from the bridge */
    size_t length = what < size - 1 ? what : size - 1;
    send(bridge_end, data + 1, length, MSG_NOSIGNAL);
    return 1 + length;
  }
  if (what < 0x80) return say(bridge_end, true, data, size);
  if (what < 0xA0) return say(*agent, false, data, size);
  if (what < 0xC0) { /* bytes from the agent */
    size_t length = size - 1 < 20 ? size - 1 : 20;
    if (*agent >= 0) send(*agent, data + 1, length, MSG_NOSIGNAL);
    return 1 + length;
  }
  switch (what % 8) {
    case 0: hear(feed_end, agents, AGENTS); break;
    case 1: hear(*agent, given, MAX_DESCRIPTORS); break;
    case 2: shut(agent); break;
    case 3: drink(bridge_end); break;
    default: job_step(&given[what % 8 % MAX_DESCRIPTORS], what / 8);
  }
  return 1;
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size) {
  int lowest = fcntl(null_device, F_DUPFD_CLOEXEC, 0);
  close(lowest);
  open_all();
  for (size_t at = 0; at < size && !back.over;) {
    at += step(data + at, size - at);
    run();
  }
  close_all();
  int after = fcntl(null_device, F_DUPFD_CLOEXEC, 0);
  close(after);
  must(after == lowest); /* no descriptor stays behind */
  return 0;
}
