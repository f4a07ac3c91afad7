/* The guest's end of the link, see LINK.md: as root of the guest it stands between the bridge and the agent.

   Neither is believed. What comes from the bridge is checked as the bridge checks what comes from here. The agent is
   what a job may have got hold of: its frames are checked for their form, and what they may mean, the bridge sees to. */
#define _GNU_SOURCE
#include "back.h"

#include <errno.h>
#include <fcntl.h>
#include <poll.h>
#include <sched.h>
#include <signal.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/utsname.h>
#include <sys/wait.h>
#include <unistd.h>

#include "flow.h"
#include "ring.h"
#include "signals.h"
#include "system.h"
#include "wire.h"

enum { ANSWER_BYTES = HEADER_BYTES + MAX_ANSWER_BYTES };
enum { EVENTS_BYTES = 512, LAST_PIECES = 3 };

/* A connection of the agent's and its channel. */
struct peer {
  struct line line;
  int sock;      /* -1: closed */
  bool ready;    /* READY was passed on */
  bool started;  /* START was heard */
  bool ending;   /* the last answer waits for the job's last output */
  uint32_t got;  /* of the answer that is being read */
  uint64_t killed; /* for want of memory, before START */
  uint8_t answer[ANSWER_BYTES];
};

enum about { ABOUT_LINK, ABOUT_AGENT, ABOUT_ORDER, ABOUT_FLOW };
enum { MAX_WATCHED = 2 + LINK_CHANNELS * (1 + LINK_STREAMS) };

static struct {
  struct peer peers[LINK_CHANNELS]; /* the first has the main job */
  struct link_queue in;
  struct link_queue out;
  uint8_t *windows;
  int link;
  int feed;
  int memory_events;

  /* A frame for an agent that has not taken all of it yet: the one at the beginning of `in`. */
  struct peer *orders;
  uint8_t *order;
  uint32_t order_bytes;
  uint32_t order_sent;
  int descriptors[MAX_DESCRIPTORS];
  int descriptor_count;

  /* A report that is being read; there is room for one. */
  struct peer *reports;
  uint8_t *report;

  bool over;
  int status;
  struct pollfd watched[MAX_WATCHED];
  struct {
    enum about about;
    uint8_t peer;
    uint8_t stream;
  } meant[MAX_WATCHED];
  nfds_t watched_count;
} back;

static struct peer *const main_peer = &back.peers[0];
static struct peer *const no_peer = &back.peers[LINK_CHANNELS];

static void end_now(int status) {
  if (!back.over) back.status = status;
  back.over = true;
}

/* Out of memory */

/* How often the kernel has killed in the job's cgroup for want of memory. */
static uint64_t killed_for_memory(void) {
  static const char name[] = "oom_kill ";
  char text[EVENTS_BYTES];
  uint64_t count = 0;
  if (back.memory_events < 0) return 0;
  ssize_t length = pread(back.memory_events, text, sizeof text - 1, 0);
  text[length < 0 ? 0 : length] = '\0';
  const char *at = text;
  while (at && strncmp(at, name, sizeof name - 1) != 0) {
    at = strchr(at, '\n');
    if (at) at++;
  }
  for (at = at ? at + sizeof name - 1 : ""; *at >= '0' && *at <= '9'; at++) count = count * 10 + (uint64_t)(*at - '0');
  return count;
}

/* Orders for the agent */

static void forget_order(void) {
  for (int i = 0; i < back.descriptor_count; i++) close(back.descriptors[i]);
  back.descriptor_count = 0;
  back.orders = NULL;
}

static void close_agent(struct peer *peer) {
  if (peer->sock < 0) return;
  close(peer->sock);
  peer->sock = -1;
  peer->line.lost = true;
  if (back.reports == peer) back.reports = NULL;
}

static ssize_t send_order(const struct peer *peer) {
  union {
    struct cmsghdr align;
    uint8_t bytes[CMSG_SPACE(MAX_DESCRIPTORS * sizeof(int))];
  } rights = {.bytes = {0}};
  struct iovec part = {.iov_base = back.order + back.order_sent, .iov_len = back.order_bytes - back.order_sent};
  struct msghdr message = {.msg_iov = &part, .msg_iovlen = 1};
  size_t size = (size_t)back.descriptor_count * sizeof(int);
  if (size > 0) {
    message.msg_control = rights.bytes;
    message.msg_controllen = (socklen_t)CMSG_SPACE(size);
    struct cmsghdr *header = CMSG_FIRSTHDR(&message);
    header->cmsg_level = SOL_SOCKET;
    header->cmsg_type = SCM_RIGHTS;
    header->cmsg_len = (socklen_t)CMSG_LEN(size);
    memcpy(CMSG_DATA(header), back.descriptors, size);
  }
  return sendmsg(peer->sock, &message, MSG_DONTWAIT | MSG_NOSIGNAL);
}

/* Give the agent what it takes. True: it has all of it, or will never have. */
static bool deliver(void) {
  struct peer *peer = back.orders;
  while (peer->sock >= 0 && back.order_sent < back.order_bytes) {
    ssize_t sent = send_order(peer);
    if (sent < 0 && errno == EINTR) continue;
    if (sent < 0 && (errno == EAGAIN || errno == EWOULDBLOCK)) return false;
    if (sent < 0) break; /* it has closed, which is seen when its last words have been read */
    back.order_sent += (uint32_t)sent;
    /* They went with the first byte. */
    for (int i = 0; i < back.descriptor_count; i++) close(back.descriptors[i]);
    back.descriptor_count = 0;
  }
  forget_order();
  return true;
}

/* What a job is given */

static void give(int descriptor) {
  back.descriptors[back.descriptor_count++] = descriptor;
}

static bool open_pipe(struct peer *peer, int stream) {
  int ends[2];
  if (pipe2(ends, O_CLOEXEC) != 0) return false;
  int ours = ends[stream == 0 ? 1 : 0];
  int theirs = ends[stream == 0 ? 0 : 1];
  fcntl(ours, F_SETFL, O_NONBLOCK);
  /* /dev/stdout opens it anew, under the job's uid. Nobody gets at it but through a process that has it. */
  fchmod(theirs, 0666);
  peer->line.flows[stream].fd = ours;
  give(theirs);
  return true;
}

static bool open_terminal(struct peer *peer) {
  struct flow *flows = peer->line.flows;
  int ends[2];
  if (socketpair(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0, ends) != 0) return false;
  give(ends[1]);
  fcntl(ends[0], F_SETFL, O_NONBLOCK);
  flows[0].fd = ends[0];
  flows[1].fd = fcntl(ends[0], F_DUPFD_CLOEXEC, 0);
  flows[0].sock = flows[1].sock = peer->line.relay = true;
  return flows[1].fd >= 0;
}

static bool open_streams(struct peer *peer, uint8_t flags) {
  unsigned streams = streams_of(flags);
  if (flags & START_RELAY) return open_terminal(peer);
  for (int i = 0; i < LINK_STREAMS; i++) {
    if (streams & 1U << i && !open_pipe(peer, i)) return false;
  }
  return true;
}

static void make_flows(struct peer *peer, unsigned streams) {
  ptrdiff_t number = peer - main_peer;
  for (int i = 0; i < LINK_STREAMS; i++) {
    if (!(streams & 1U << i)) continue;
    if (i == 0) flow_receive(&peer->line.flows[i], -1, back.windows + number * LINK_WINDOW_BYTES);
    else flow_send(&peer->line.flows[i], -1);
  }
}

/* Nothing of the job ran, and the agent has not heard of it. */
static void fail(struct peer *peer, int error) {
  put_header(peer->answer, FAILED, 8);
  put_u32(peer->answer + HEADER_BYTES, STAGE_DESCRIPTORS);
  put_u32(peer->answer + HEADER_BYTES + 4, (uint32_t)error);
  for (int i = 0; i < LINK_STREAMS; i++) flow_drop(&peer->line.flows[i]);
  forget_order();
  peer->ending = true;
}

/* False: the frame must not have come. */
static bool on_start(struct peer *peer, uint8_t flags) {
  unsigned streams = streams_of(flags);
  if (peer->started || streams == 0) return false;
  peer->started = true;
  peer->killed = killed_for_memory();
  make_flows(peer, streams);
  /* When the agent has just closed, the streams end as they begin. */
  if (peer->sock >= 0 && !open_streams(peer, flags)) fail(peer, errno);
  return true;
}

static bool on_control(struct peer *peer, uint8_t *frame, uint32_t length) {
  struct header header;
  if (!peer->line.open || peer->line.closed_there || !peer->ready) return false;
  if (!parse_header(frame, &header) || header.length != length - HEADER_BYTES) return false;
  if (header.type == START && !on_start(peer, header.flags)) return false;
  if (peer->sock < 0 || peer->ending) return true;
  back.orders = peer;
  back.order = frame;
  back.order_bytes = length;
  back.order_sent = 0;
  return true;
}

static bool on_open(struct peer *peer) {
  int ends[2];
  if (peer->line.open && !line_is_over(&peer->line)) return false;
  memset(peer, 0, sizeof *peer);
  line_open(&peer->line, (uint16_t)(peer - main_peer));
  peer->sock = -1;
  peer->line.lost = true;
  if (socketpair(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0, ends) != 0) return true;
  hand_on(back.feed, ends[1]);
  close(ends[1]);
  peer->sock = ends[0];
  peer->line.lost = false;
  return true;
}

static bool on_close(struct peer *peer) {
  if (!peer->line.open || peer->line.closed_there) return false;
  peer->line.closed_there = true;
  peer->line.lost = true;
  peer->ending = false;
  close_agent(peer);
  return true;
}

static bool on_frame(const struct link_header *header, uint8_t *payload) {
  if (header->type == LINK_POWEROFF) {
    end_now(0);
    return true;
  }
  if (header->channel >= LINK_CHANNELS) return false; /* a second SETUP */
  struct peer *peer = &back.peers[header->channel];
  switch (header->type) {
    case LINK_OPEN: return on_open(peer);
    case LINK_CLOSE: return on_close(peer);
    case LINK_CONTROL: return on_control(peer, payload, header->length);
    default: return line_hear(&peer->line, header, payload);
  }
}

/* Handle what has come, up to an order that the agent has not taken yet. */
static void on_frames(void) {
  struct link_header header;
  uint8_t *payload;
  enum link_result result = LINK_WAIT;
  while (!back.over && (result = link_next(&back.in, LINK_HOST, &header, &payload)) == LINK_FRAME) {
    if (!back.orders && !on_frame(&header, payload)) {
      result = LINK_BAD;
      break;
    }
    if (back.orders && !deliver()) return;
    link_done(&back.in, &header);
  }
  if (result == LINK_BAD) end_now(1);
}

static void on_link(void) {
  switch (link_fill(&back.in, back.link)) {
    case LINK_FRAME: on_frames(); break;
    case LINK_WAIT: break;
    default: end_now(1);
  }
}

/* Answers of the agent */

static void pass_on(struct peer *peer, const uint8_t *frame) {
  const struct link_header header = {HEADER_BYTES + get_u32(frame), LINK_CONTROL, 0, peer->line.channel};
  link_put(&back.out, &header, frame);
}

/* The last answer, after all that the job has written by now, as far as there is credit for it. The queue has room
   for a job's two windows beside what makes it busy. */
static void conclude(struct peer *peer) {
  if (!peer->ending || link_is_busy(&back.out)) return;
  for (uint8_t i = 1; i < LINK_STREAMS; i++) {
    for (int piece = 0; piece < LAST_PIECES; piece++) {
      if (!flow_pump(&peer->line.flows[i], peer->line.channel, i, &back.out)) break;
    }
  }
  pass_on(peer, peer->answer);
  peer->ending = false;
  peer->got = 0;
  close_agent(peer);
}

static void note_end(struct peer *peer) {
  uint8_t *flags = peer->answer + HEADER_BYTES + 8;
  peer->ending = true;
  if (peer->answer[4] != EXITED) return;
  uint32_t others = get_u32(flags) & ~(uint32_t)OUT_OF_MEMORY;
  put_u32(flags, others | (killed_for_memory() > peer->killed ? OUT_OF_MEMORY : 0));
}

static bool is_end(uint8_t type) {
  return type == FAILED || type == EXITED;
}

/* A whole frame. False: no agent says that. */
static bool on_answer(struct peer *peer) {
  bool large = back.reports == peer;
  const uint8_t *frame = large ? back.report : peer->answer;
  back.reports = large ? NULL : back.reports;
  if (!is_answer(frame, peer->got)) return false;
  if (is_end(frame[4])) {
    note_end(peer);
    return true;
  }
  if (frame[4] == READY) peer->ready = true;
  pass_on(peer, frame);
  peer->got = 0;
  return true;
}

/* How many bytes the frame that is being read has, or its header; 0: none that there is room for. */
static size_t size_of_answer(struct peer *peer) {
  if (peer->got < HEADER_BYTES) return HEADER_BYTES;
  size_t size = HEADER_BYTES + (size_t)get_u32(peer->answer);
  if (peer->answer[4] != REPORTED) return size <= ANSWER_BYTES ? size : 0;
  if (size > HEADER_BYTES + MAX_REPORT_BYTES) return 0;
  if (back.reports != peer) {
    back.reports = peer; /* nobody else's is being read: see is_heard */
    memcpy(back.report, peer->answer, HEADER_BYTES);
  }
  return size;
}

static bool is_heard(const struct peer *peer) {
  if (peer->sock < 0 || peer->ending || link_is_busy(&back.out)) return false;
  return !back.reports || back.reports == peer;
}

/* Read once. False: it has closed, or says what no agent does. */
static bool read_answer(struct peer *peer) {
  size_t size = size_of_answer(peer);
  if (size == 0) return false;
  uint8_t *to = back.reports == peer ? back.report : peer->answer;
  ssize_t count = recv(peer->sock, to + peer->got, size - peer->got, MSG_DONTWAIT);
  if (count < 0) return errno == EAGAIN || errno == EWOULDBLOCK || errno == EINTR;
  if (count == 0) return false;
  peer->got += (uint32_t)count;
  size = size_of_answer(peer);
  if (size == 0) return false;
  return peer->got < size || on_answer(peer);
}

static void on_agent(struct peer *peer) {
  if (is_heard(peer) && !read_answer(peer)) close_agent(peer);
}

/* Turns */

static void look_at(int descriptor, int events, enum about about, const struct peer *peer, int stream) {
  if (descriptor < 0 || events < 0) return;
  nfds_t at = back.watched_count++;
  back.watched[at] = (struct pollfd){.fd = descriptor, .events = (short)events};
  back.meant[at].about = about;
  back.meant[at].peer = (uint8_t)(peer - main_peer);
  back.meant[at].stream = (uint8_t)stream;
}

static void look_at_all(void) {
  back.watched_count = 0;
  bool busy = link_is_busy(&back.out);
  int wanted = (back.orders ? 0 : POLLIN) | (back.out.begin < back.out.end ? POLLOUT : 0);
  look_at(back.link, wanted, ABOUT_LINK, main_peer, 0);
  if (back.orders) look_at(back.orders->sock, POLLOUT, ABOUT_ORDER, back.orders, 0);
  for (const struct peer *peer = main_peer; peer < no_peer; peer++) {
    if (is_heard(peer)) look_at(peer->sock, POLLIN, ABOUT_AGENT, peer, 0);
    for (int i = 0; i < LINK_STREAMS; i++) {
      const struct flow *flow = &peer->line.flows[i];
      if (flow->made) look_at(flow->fd, flow_events(flow, busy), ABOUT_FLOW, peer, i);
    }
  }
}

static void on_event(nfds_t at) {
  short found = back.watched[at].revents;
  struct peer *peer = &back.peers[back.meant[at].peer];
  switch (back.meant[at].about) {
    case ABOUT_LINK:
      if (!(found & ~POLLOUT)) break;
      if (back.orders) end_now(1);
      else on_link();
      break;
    case ABOUT_ORDER: on_frames(); break;
    case ABOUT_AGENT: on_agent(peer); break;
    case ABOUT_FLOW: line_turn(&peer->line, back.meant[at].stream, found, &back.out); break;
  }
}

static void say_what_is_owed(void) {
  for (struct peer *peer = main_peer; peer < no_peer; peer++) {
    conclude(peer);
    /* CLOSE is the last word. */
    if (!peer->ending) line_owe(&peer->line, &back.out);
  }
}

static void turn(int most_ms) {
  if (back.orders && back.orders->sock < 0) on_frames();
  say_what_is_owed();
  if (link_flush(&back.out, back.link) == LINK_GONE) end_now(1);
  if (back.over) return;
  look_at_all();
  int count = poll(back.watched, back.watched_count, most_ms);
  if (count < 0 && errno != EINTR) end_now(1);
  for (nfds_t at = 0; count > 0 && at < back.watched_count && !back.over; at++) {
    if (back.watched[at].revents) on_event(at);
  }
}

/* The start */

static void *make_room(size_t bytes) {
  void *room = mmap(NULL, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  return room == MAP_FAILED ? NULL : room;
}

static bool open_back(int link, int agent, int feed, int memory_events) {
  back.link = link;
  back.feed = feed;
  back.memory_events = memory_events;
  for (struct peer *peer = main_peer; peer < no_peer; peer++) peer->sock = -1;
  line_open(&main_peer->line, 0);
  main_peer->sock = agent;
  back.windows = make_room((size_t)LINK_CHANNELS * LINK_WINDOW_BYTES);
  back.report = make_room(HEADER_BYTES + MAX_REPORT_BYTES);
  if (!back.windows || !back.report || fcntl(link, F_SETFL, O_NONBLOCK) != 0) return false;
  return link_open_reader(&back.in, LINK_FROM_HOST_BYTES) && link_open_queue(&back.out, LINK_FROM_GUEST_BYTES);
}

int run_back(int link, int agent, int feed, int memory_events) {
  block_signals();
  if (!open_back(link, agent, feed, memory_events)) return 1;
  while (!back.over) turn(-1);
  return back.status;
}

/* For tests: both ends on one kernel */

/* As close as may be to what guest.c does: a pid namespace of its own, where the kernel lets us. */
static _Noreturn void become_agent(int sock, int listener) {
  static char *const command[] = {"agent", NULL};
  if (dup2(sock, CONTROL) != CONTROL || dup2(listener, LISTENER) != LISTENER) _exit(EXIT_OWN_FAILURE);
  execv("/proc/self/exe", command);
  _exit(EXIT_OWN_FAILURE);
}

static pid_t start_agent(int *sock, int *feed) {
  int socks[2];
  int feeds[2];
  if (socketpair(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0, socks) != 0) return -1;
  if (socketpair(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0, feeds) != 0) return -1;
  if (unshare(CLONE_NEWUSER | CLONE_NEWPID) != 0) errno = 0;
  pid_t agent = fork();
  if (agent == 0) become_agent(socks[1], feeds[1]);
  close(socks[1]);
  close(feeds[1]);
  *sock = socks[0];
  *feed = feeds[0];
  return agent;
}

int keep_back(char **argv) {
  uint64_t link;
  int sock;
  int feed;
  struct utsname names;
  struct link_setup setup;
  if (!argv[0] || !parse_bytes(argv[0], &link) || link < 3 || link > INT16_MAX || !keep_open((int)link)) {
    return EXIT_OWN_FAILURE;
  }
  uname(&names);
  if (!link_say_hello((int)link, names.release, 0) || !link_read_setup((int)link, &setup)) return EXIT_OWN_FAILURE;
  link_forget_setup(&setup);
  int memory_events = argv[1] ? open(argv[1], O_RDONLY | O_CLOEXEC) : -1;
  pid_t agent = start_agent(&sock, &feed);
  if (agent < 0 || !link_setup_done((int)link)) return EXIT_OWN_FAILURE;
  int status = run_back((int)link, sock, feed, memory_events);
  kill(agent, SIGKILL);
  waitpid(agent, NULL, 0);
  return status;
}
