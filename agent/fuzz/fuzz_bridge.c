/* libFuzzer harness: the whole bridge with a hostile guest at the other end of its link and a host beside it that
   starts jobs, reads, writes and goes away. What each byte of the input does, `step` says. */
#include "bridge.c"

#include "fuzz/harness.h"

#include <sys/un.h>

enum { HOSTS = 4, TURNS = 256 };

/* A connection of the host's, and its ends of the job's streams. */
struct host {
  int sock;
  int ends[3];
};

static struct host hosts[HOSTS];
static int guest;
static int null_device;
static int log_file;

int LLVMFuzzerInitialize(int *argc, char ***argv) {
  (void)argc;
  (void)argv;
  null_device = begin_harness();
  log_file = memfd_create("log", MFD_CLOEXEC);
  must(log_file >= 0);
  return 0;
}

static void open_all(void) {
  int ends[2];
  memset(&bridge, 0, sizeof bridge);
  must(open_bridge());
  must(socketpair(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC | SOCK_NONBLOCK, 0, ends) == 0);
  bridge.link = ends[0];
  guest = ends[1];
  bridge.setup = mmap(NULL, LINK_SETUP_TEXT_BYTES, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  must(bridge.setup != MAP_FAILED);
  bridge.setup_bytes = 1;
  bridge.words = (struct drain){.from = -1, .to = null_device, .left = MOST_WORDS_BYTES};
  bridge.log_bytes = 100;
  bridge.vmm = 1; /* nobody is reaped here */
  bridge.signals = -1;
  bridge.listener = socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC | SOCK_NONBLOCK, 0);
  const struct sockaddr_un nameless = {.sun_family = AF_UNIX}; /* the kernel finds a name */
  must(bind(bridge.listener, (const struct sockaddr *)&nameless, sizeof nameless.sun_family) == 0);
  must(listen(bridge.listener, HOSTS) == 0);
  for (int i = 0; i < HOSTS; i++) hosts[i] = (struct host){.sock = -1, .ends = {-1, -1, -1}};
  must(socketpair(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC | SOCK_NONBLOCK, 0, ends) == 0);
  wire_open(&main_peer->wire, ends[0]);
  hosts[0].sock = ends[1];
}

static void close_all(void) {
  for (int i = 0; i < HOSTS; i++) {
    shut(&hosts[i].sock);
    for (int end = 0; end < 3; end++) shut(&hosts[i].ends[end]);
  }
  for (struct peer *peer = main_peer; peer < no_peer; peer++) {
    wire_release(&peer->wire);
    shut(&peer->wire.sock);
    for (int i = 0; i < LINK_STREAMS; i++) flow_drop(&peer->line.flows[i]);
  }
  shut(&guest);
  shut(&bridge.link);
  shut(&bridge.listener);
  link_close(&bridge.in);
  link_close(&bridge.out);
  munmap(bridge.windows, (size_t)WINDOWS * LINK_WINDOW_BYTES);
  if (bridge.setup) munmap(bridge.setup, LINK_SETUP_TEXT_BYTES);
}

/* What LINK.md promises of memory. */
static void check(void) {
  must(bridge.out.end - bridge.out.begin <= bridge.out.room && bridge.in.end <= bridge.in.room);
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
  for (int turns = 0; !bridge.over; turns++) {
    must(turns < TURNS);
    turn(0);
    check();
    if (!bridge.over && poll(bridge.watched, bridge.watched_count, 0) == 0) return;
  }
}

static void say(const struct host *host, uint8_t type, uint8_t flags, const int *descriptors, int count) {
  uint8_t frame[HEADER_BYTES + START_HEAD_BYTES + 4] = {0};
  uint32_t length = type == START ? START_HEAD_BYTES + 4 : type == SIGNAL ? 4 : 0;
  put_u32(frame, length);
  frame[4] = type;
  frame[5] = flags;
  union {
    struct cmsghdr align;
    uint8_t bytes[CMSG_SPACE(3 * sizeof(int))];
  } rights = {.bytes = {0}};
  struct iovec part = {.iov_base = frame, .iov_len = HEADER_BYTES + length};
  struct msghdr message = {.msg_iov = &part, .msg_iovlen = 1};
  size_t size = (size_t)count * sizeof(int);
  if (count > 0) {
    message.msg_control = rights.bytes;
    message.msg_controllen = CMSG_SPACE(size);
    struct cmsghdr *header = CMSG_FIRSTHDR(&message);
    header->cmsg_level = SOL_SOCKET;
    header->cmsg_type = SCM_RIGHTS;
    header->cmsg_len = CMSG_LEN(size);
    memcpy(CMSG_DATA(header), descriptors, size);
  }
  sendmsg(host->sock, &message, MSG_DONTWAIT | MSG_NOSIGNAL);
}

static void start(struct host *host, uint8_t flags) {
  int theirs[3] = {-1, -1, -1};
  int count = 0;
  int ends[2];
  for (int i = 0; i < 3; i++) shut(&host->ends[i]);
  if (flags & START_DETACH) {
    theirs[count++] = fcntl(log_file, F_DUPFD_CLOEXEC, 0);
  } else if (flags & START_TTY) {
    must(socketpair(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC | SOCK_NONBLOCK, 0, ends) == 0);
    host->ends[0] = ends[0];
    theirs[count++] = ends[1];
  } else {
    for (; count < 3; count++) {
      must(pipe2(ends, O_CLOEXEC | O_NONBLOCK) == 0);
      host->ends[count] = ends[count == 0 ? 1 : 0];
      theirs[count] = ends[count == 0 ? 0 : 1];
    }
  }
  say(host, START, flags, theirs, count);
  for (int i = 0; i < count; i++) shut(&theirs[i]);
}

static void connect_host(struct host *host) {
  struct sockaddr_un address;
  socklen_t length = sizeof address;
  shut(&host->sock);
  host->sock = socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC | SOCK_NONBLOCK, 0);
  must(host->sock >= 0 && getsockname(bridge.listener, (struct sockaddr *)&address, &length) == 0);
  if (connect(host->sock, (struct sockaddr *)&address, length) != 0) shut(&host->sock);
}

static void hear(int descriptor) {
  uint8_t bytes[4096];
  if (descriptor >= 0) while (read(descriptor, bytes, sizeof bytes) > 0) continue;
}

static const uint8_t flags_of[] = {0, START_HOLD, START_TTY | START_RELAY, START_DETACH, START_DETACH | START_HOLD,
                                   START_TTY, START_TTY | START_RELAY | START_HOLD, START_TTY | START_DETACH};

/* One step of the host's, `what`, with `host`. */
static void host_step(struct host *host, uint8_t what) {
  static const uint8_t bytes[8192];
  ssize_t ignored = 0;
  switch (what % 10) {
    case 0: connect_host(host == hosts ? hosts + 1 : host); break;
    case 1: start(host, flags_of[what / 10 % 8]); break;
    case 2: say(host, GO, 0, NULL, 0); break;
    case 3: say(host, REPORT, 0, NULL, 0); break;
    case 4: say(host, what / 10 % 2 ? SHUTDOWN : SIGNAL, 0, NULL, 0); break;
    case 5: shut(&host->sock); break;
    case 6: shut(&host->ends[what / 10 % 3]); break;
    case 7: hear(host->ends[what / 10 % 3]); break;
    case 8:
      if (host->ends[0] >= 0) ignored = write(host->ends[0], bytes, sizeof bytes);
      break;
    default: hear(host->sock);
  }
  (void)ignored;
}

/* Take one step off the input; returns how long it was. */
static size_t step(const uint8_t *data, size_t size) {
  uint8_t frame[LINK_HEADER_BYTES + 255] = {0};
  uint8_t what = data[0];
  if (what >= 0xC0) { /* the host: which, and what */
    if (size < 2) return 1;
    host_step(&hosts[what % HOSTS], data[1]);
    return 2;
  }
  if (what == 0xBF) { /* the guest reads */
    hear(guest);
    return 1;
  }
  if (what == 0xBE) { /* the guest is gone, the VMM too */
    shut(&guest);
    bridge.vmm = 0;
    return 1;
  }
  if (what >= 0x80) { /* the guest: a frame whose length is right, DATA to be made long */
    if (size < 5 || size - 5 < data[4]) return size;
    const struct link_header header = {data[4], data[1], data[2], (uint16_t)(data[3] == 0xFF ? LINK_MACHINE : data[3])};
    put_link_header(frame, &header);
    memcpy(frame + LINK_HEADER_BYTES, data + 5, data[4]);
    for (int times = 0; times <= what % 8; times++) send(guest, frame, LINK_HEADER_BYTES + header.length, MSG_NOSIGNAL);
    return 5 + (size_t)data[4];
  }
  size_t length = what < size - 1 ? what : size - 1; /* the guest: bytes */
  send(guest, data + 1, length, MSG_NOSIGNAL);
  return 1 + length;
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size) {
  int lowest = fcntl(null_device, F_DUPFD_CLOEXEC, 0);
  close(lowest);
  open_all();
  for (size_t at = 0; at < size && !bridge.over;) {
    at += step(data + at, size - at);
    run();
  }
  close_all();
  int after = fcntl(null_device, F_DUPFD_CLOEXEC, 0);
  close(after);
  must(after == lowest); /* no descriptor stays behind */
  return 0;
}
