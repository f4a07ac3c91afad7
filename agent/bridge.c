/* PID 1 of the ring around a microVM, on the host's side of the link; see LINK.md, and PROTOCOL.md, "The bridge".

   It starts the VMM, speaks with the host as an agent does, and carries what both sides say and write. All that comes
   over the link may be the work of whoever has taken the guest over: it is checked first, and one wrong byte is the end
   of the machine. Nothing is allocated at its wish, and nothing here waits for it. */
#define _GNU_SOURCE
#include "bridge.h"

#include <errno.h>
#include <fcntl.h>
#include <poll.h>
#include <signal.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/random.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

#include "dial.h"
#include "flow.h"
#include "ring.h"
#include "signals.h"
#include "system.h"
#include "wire.h"

enum { EXTRA = 8, MOST_EXTRAS = 32, MOST_COMMAND_BYTES = 1 << 16 };
enum { FRAMES_A_TURN = 4, WINDOWS = LINK_CHANNELS * (LINK_STREAMS - 1) };
enum { EXIT_NOT_EXECUTABLE = 126, EXIT_NOT_FOUND = 127 };
/* Of the words; of what comes after these, the last is kept. */
enum { FIRST_WORDS_BYTES = 1 << 15 };
/* The agent in the guest keeps the main job's time, a second later than the host. A guest that has been taken over does
   not: this is how much later it is kept here, for a detached job that nobody else watches. */
enum { LATE_MS = 2000 };
/* After SHUTDOWN; the agent in the guest takes ENDING_MS, and all of it may be emulated. */
enum { SHUTDOWN_MS = 4000 };
/* After the main job's end no process is left to write. This is what its pipes and the link can still hold, at the
   most, and how long the guest may take to send it while nobody on the host keeps it waiting. */
enum { MOST_LAST_BYTES = 2 * ((1 << 20) + LINK_WINDOW_BYTES), LAST_MS = 5000 };

enum phase { PHASE_HELLO, PHASE_SETUP, PHASE_OPEN, PHASE_OFF };

/* A connection of the host's and its channel. */
struct peer {
  struct wire wire;
  struct line line;
  uint8_t flags;  /* of START */
  bool ready;     /* READY was passed on: the agent reads what is sent to it */
  bool started;   /* START was passed on */
  bool prepared;  /* PREPARED was heard */
  bool go;        /* GO was passed on */
  bool reporting; /* a REPORT waits for its answer */
  bool over;      /* FAILED or EXITED was heard */
};

enum about { ABOUT_SIGNALS, ABOUT_LINK, ABOUT_DIAL, ABOUT_WORDS, ABOUT_LISTENER, ABOUT_HOST, ABOUT_FLOW };
enum { MAX_WATCHED = 5 + LINK_CHANNELS * (1 + LINK_STREAMS) };

static struct {
  struct peer peers[LINK_CHANNELS]; /* the first is the launcher's */
  struct link_queue in;
  struct link_queue out;
  uint8_t *windows;
  int link; /* -1: not there yet */
  struct dial dial;
  bool dialling; /* the link is still to be had by vsock */
  int listener;
  int signals;
  struct drain words;
  struct tail tail; /* of the words */
  uint64_t log_bytes;
  uint8_t *setup; /* its text, until it is sent */
  size_t setup_bytes;
  enum phase phase;
  pid_t vmm; /* 0: it is dead */
  bool reap_again;
  bool deaf; /* nobody reads the link any more */
  bool gone; /* nobody writes to it any more */
  bool main_over;
  bool over; /* nothing is left to do */
  int status;
  int64_t accept_after; /* something was short */
  int64_t end_by;       /* whatever happens */
  uint32_t deadline_ms; /* of the main job's START; 0: none */
  int64_t deadline_at;  /* its time is up, and that of the guest to say so */
  bool late;            /* which is why this ends */
  int64_t vmm_by;       /* the VMM has this long to end */
  int64_t hung_by;      /* the launcher has gone, but had something to say to a guest that does not read */
  int64_t last_by;      /* the guest has this long to send the last of the main job's output */
  uint32_t last_bytes;  /* which is so much by now */
  int64_t linger_by;    /* slow readers of others than the launcher have this long */

  struct pollfd watched[MAX_WATCHED];
  struct {
    enum about about;
    uint8_t peer;
    uint8_t stream;
  } meant[MAX_WATCHED];
  nfds_t watched_count;
} bridge;

static struct peer *const main_peer = &bridge.peers[0];
static struct peer *const no_peer = &bridge.peers[LINK_CHANNELS];

/* Words */

static void say_word(const char *text) {
  drain_keep(&bridge.words, (const uint8_t *)text, strlen(text));
}

/* What a guest says of itself: no control characters reach a file that somebody may look at. */
static void say_foreign(const uint8_t *text, size_t most) {
  char shown[LINK_WORDS_BYTES + 1];
  size_t length = 0;
  for (; length < most && length < LINK_WORDS_BYTES && text[length]; length++) {
    shown[length] = text[length] < ' ' || text[length] > '~' ? '?' : (char)text[length];
  }
  shown[length] = '\0';
  say_word(shown);
}

static void say_number(uint32_t number) {
  char digits[11];
  char *at = digits + sizeof digits - 1;
  for (*at = '\0'; number > 9; number /= 10) *--at = (char)('0' + number % 10);
  *--at = (char)('0' + number);
  say_word(at);
}

static void end_now(int status) {
  if (!bridge.over) bridge.status = status;
  bridge.over = true;
}

/* Connections of the host's */

static bool is_let_go(const struct peer *peer) {
  if (!peer->started) return false;
  return peer->go || (!(peer->flags & START_HOLD) && peer->prepared);
}

static void close_wire(struct peer *peer) {
  if (peer->wire.sock < 0) return;
  wire_release(&peer->wire);
  close(peer->wire.sock);
  peer->wire.sock = -1;
  /* Nobody says CLOSE of channel 0: see lose. */
  if (peer != main_peer) peer->line.lost = true;
}

/* The host has closed the connection, or cannot be spoken with. With the launcher the machine goes, unless a detached
   job was let go; of the others the guest is told. */
static void lose(struct peer *peer) {
  close_wire(peer);
  if (peer != main_peer || peer->over) return;
  bool detached = peer->flags & START_DETACH && (is_let_go(peer) || (peer->started && !(peer->flags & START_HOLD)));
  if (!detached) end_now(peer->started ? EXIT_OWN_FAILURE : 0);
}

static void refuse(struct peer *peer) {
  if (peer == main_peer) end_now(EXIT_OWN_FAILURE);
  lose(peer);
}

static bool is_kind(int descriptor, mode_t kind) {
  struct stat about;
  return fstat(descriptor, &about) == 0 && (about.st_mode & S_IFMT) == kind;
}

static int take(int *descriptor) {
  int taken = *descriptor;
  *descriptor = -1;
  return taken;
}

static uint8_t *window_of(const struct peer *peer, int stream) {
  ptrdiff_t number = (peer - bridge.peers) * (LINK_STREAMS - 1) + stream - 1;
  return bridge.windows + number * LINK_WINDOW_BYTES;
}

static bool receive(struct peer *peer, int stream, int *descriptor) {
  if (fcntl(*descriptor, F_SETFL, O_NONBLOCK) != 0) return false;
  flow_receive(&peer->line.flows[stream], take(descriptor), window_of(peer, stream));
  return true;
}

static bool take_log(struct peer *peer, int *descriptors) {
  struct flow *log = &peer->line.flows[1];
  if (bridge.log_bytes == 0 || !is_kind(descriptors[0], S_IFREG)) return false;
  flow_receive(log, take(descriptors), window_of(peer, 1));
  log->file = true;
  log->left = bridge.log_bytes;
  return true;
}

static bool take_terminal(struct peer *peer, int *descriptors) {
  struct flow *flows = peer->line.flows;
  if (!is_kind(descriptors[0], S_IFSOCK)) return false;
  int copy = fcntl(descriptors[0], F_DUPFD_CLOEXEC, 0);
  if (copy < 0) return false;
  flow_send(&flows[0], copy);
  if (!receive(peer, 1, descriptors)) return false;
  flows[0].sock = flows[1].sock = true;
  peer->line.relay = true;
  return true;
}

static bool take_pipes(struct peer *peer, int *descriptors) {
  flow_send(&peer->line.flows[0], take(descriptors));
  peer->line.flows[0].shared = true;
  return receive(peer, 1, descriptors + 1) && receive(peer, 2, descriptors + 2);
}

static void start_clock(const struct peer *peer) {
  if (peer == main_peer && bridge.deadline_ms > 0) bridge.deadline_at = now_ms() + bridge.deadline_ms + LATE_MS;
}

static bool on_start(struct peer *peer) {
  uint8_t flags = peer->wire.header.flags;
  int *descriptors = peer->wire.descriptors;
  if (peer->started || streams_of(flags) == 0) return false;
  peer->started = true;
  peer->flags = flags;
  if (peer == main_peer) bridge.deadline_ms = get_u32(peer->wire.payload);
  if (!(flags & START_HOLD)) start_clock(peer);
  if (flags & START_DETACH) return take_log(peer, descriptors);
  bool taken = flags & START_RELAY ? take_terminal(peer, descriptors) : take_pipes(peer, descriptors);
  peer->line.flows[0].paused = true;
  return taken;
}

static void start_input(struct peer *peer) {
  if (is_let_go(peer)) peer->line.flows[0].paused = false;
}

static bool on_host_frame(struct peer *peer) {
  switch (peer->wire.header.type) {
    case START: return on_start(peer);
    case GO:
      if (!peer->started || peer->go || !(peer->flags & START_HOLD)) return false;
      peer->go = true;
      start_input(peer);
      start_clock(peer);
      return true;
    case REPORT:
      if (!peer->prepared || is_let_go(peer) || peer->reporting) return false;
      peer->reporting = true;
      return true;
    case SHUTDOWN: {
      int64_t by = now_ms() + SHUTDOWN_MS;
      if (by < bridge.end_by) bridge.end_by = by;
      return true;
    }
    default: return true; /* what is wrong with it is the agent's to say */
  }
}

static void pass_to_guest(const struct peer *peer) {
  uint32_t length = peer->wire.header.length;
  uint8_t *room = link_room(&bridge.out, HEADER_BYTES + length);
  memcpy(room, peer->wire.head, HEADER_BYTES);
  memcpy(room + HEADER_BYTES, peer->wire.payload, length);
  const struct link_header header = {HEADER_BYTES + length, LINK_CONTROL, 0, peer->line.channel};
  link_put_header(&bridge.out, &header);
}

static bool is_heard(const struct peer *peer) {
  return peer->wire.sock >= 0 && peer->ready && !peer->over && !link_is_busy(&bridge.out);
}

static void on_host(struct peer *peer) {
  /* Before READY it has nothing to say, but can close. */
  for (int frames = 0; frames < FRAMES_A_TURN && is_heard(peer); frames++) {
    switch (wire_read(&peer->wire)) {
      case WIRE_WAIT: return;
      case WIRE_END: lose(peer); return;
      case WIRE_BAD: refuse(peer); return;
      case WIRE_FRAME: break;
    }
    if (!on_host_frame(peer)) {
      refuse(peer);
      return;
    }
    pass_to_guest(peer);
    wire_release(&peer->wire);
  }
}

/* The other side has closed, but what it said before cannot be read now. */
static void on_hang_up(struct peer *peer) {
  if (!peer->ready) lose(peer);
  else bridge.hung_by = now_ms() + ENDING_MS;
}

static bool is_free(const struct peer *peer) {
  return !peer->line.open && peer->wire.sock < 0;
}

static struct peer *find_free(void) {
  for (struct peer *peer = main_peer + 1; peer < no_peer; peer++) {
    if (is_free(peer)) return peer;
  }
  return NULL;
}

/* As the agent has it: nothing begins before the main job is let go, or beside its end. */
static bool is_listening(int64_t now) {
  if (bridge.phase != PHASE_OPEN || bridge.main_over || bridge.gone || !is_let_go(main_peer)) return false;
  return now >= bridge.accept_after && !link_is_busy(&bridge.out) && find_free();
}

static void on_listener(void) {
  struct peer *peer = find_free();
  if (!peer || link_is_busy(&bridge.out)) return;
  int sock = accept4(bridge.listener, NULL, NULL, SOCK_CLOEXEC);
  if (sock >= 0) {
    uint16_t channel = (uint16_t)(peer - main_peer);
    memset(peer, 0, sizeof *peer);
    wire_open(&peer->wire, sock);
    line_open(&peer->line, channel);
    const struct link_header header = {0, LINK_OPEN, 0, channel};
    link_put(&bridge.out, &header, NULL);
  } else if (errno != EAGAIN && errno != EINTR && errno != ECONNABORTED) {
    bridge.accept_after = now_ms() + ACCEPT_AGAIN_MS; /* do not spin on what stays readable */
  }
}

/* What the guest says */

/* Whether an agent may say this now. */
static bool is_due(struct peer *peer, uint8_t type) {
  if (peer->line.closed_there || peer->over) return false;
  switch (type) {
    case READY: return !peer->ready;
    case PREPARED: return peer->started && !peer->prepared;
    case REPORTED: return peer->reporting;
    default: return peer->started; /* FAILED, EXITED */
  }
}

/* What `ringfence run` exits with; the agent's own rule. */
static int status_of(const uint8_t *frame) {
  uint32_t first = get_u32(frame + HEADER_BYTES);
  uint32_t error = get_u32(frame + HEADER_BYTES + 4);
  if (frame[4] == EXITED) return (int)(first & 0xFF);
  if (first != STAGE_EXEC) return EXIT_OWN_FAILURE;
  return error == ENOENT || error == ENOTDIR ? EXIT_NOT_FOUND : EXIT_NOT_EXECUTABLE;
}

static void note_answer(struct peer *peer, const uint8_t *frame) {
  switch (frame[4]) {
    case READY: peer->ready = true; break;
    case PREPARED:
      peer->prepared = true;
      start_input(peer);
      break;
    case REPORTED: peer->reporting = false; break;
    default:
      peer->over = true;
      if (peer != main_peer) break;
      bridge.main_over = true;
      bridge.status = status_of(frame);
  }
}

static bool on_control(struct peer *peer, uint8_t *frame, uint32_t length) {
  if (!peer->line.open || !is_answer(frame, length) || !is_due(peer, frame[4])) return false;
  note_answer(peer, frame);
  bool lives = peer->wire.sock >= 0;
  if (lives) lives = wire_send_large(&peer->wire, frame[4], frame, length - HEADER_BYTES);
  if (peer->over) close_wire(peer);
  else if (!lives && peer->wire.sock >= 0) lose(peer);
  return true;
}

static bool on_close(struct peer *peer) {
  if (!peer->line.open || peer->line.closed_there) return false;
  peer->line.closed_there = true;
  close_wire(peer);
  if (peer == main_peer && !bridge.main_over) {
    bridge.main_over = true; /* without a word: the agent was killed, or was sent what it does not know */
    bridge.status = EXIT_OWN_FAILURE;
  }
  return true;
}

static void send_setup(void) {
  struct timespec now;
  uint8_t *room = link_room(&bridge.out, LINK_SETUP_BYTES);
  clock_gettime(CLOCK_REALTIME, &now);
  put_u64(room, (uint64_t)now.tv_sec * 1000000000U + (uint64_t)now.tv_nsec);
  if (getrandom(room + 8, LINK_ENTROPY_BYTES, 0) != LINK_ENTROPY_BYTES) {
    end_now(EXIT_OWN_FAILURE); /* a guest without it would share its secrets with others */
    return;
  }
  memcpy(room + LINK_SETUP_HEAD_BYTES, bridge.setup, bridge.setup_bytes);
  uint32_t length = LINK_SETUP_HEAD_BYTES + (uint32_t)bridge.setup_bytes;
  const struct link_header header = {length, LINK_SETUP, 0, LINK_MACHINE};
  link_put_header(&bridge.out, &header);
  munmap(bridge.setup, LINK_SETUP_TEXT_BYTES);
  bridge.setup = NULL;
  bridge.phase = PHASE_SETUP;
}

static bool on_hello(const uint8_t *payload, uint32_t length) {
  if (bridge.phase != PHASE_HELLO || payload[length - 1] != 0) return false;
  if (get_u32(payload) != LINK_VERSION || get_u32(payload + 4) != 0) {
    say_word("the guest's agent is of another version\n");
    return false;
  }
  const uint8_t *release = payload + 8;
  const uint8_t *boot = (const uint8_t *)memchr(release, 0, length - 8) + 1;
  if (boot == payload + length) return false;
  say_word("guest kernel ");
  say_foreign(release, (size_t)(boot - release));
  say_word(", booted in ");
  say_foreign(boot, (size_t)(payload + length - boot));
  say_word(" ms\n");
  send_setup();
  return true;
}

static bool on_setup_done(void) {
  if (bridge.phase != PHASE_SETUP) return false;
  bridge.phase = PHASE_OPEN;
  line_open(&main_peer->line, 0);
  return true;
}

static bool on_setup_failed(const uint8_t *payload, uint32_t length) {
  if (bridge.phase != PHASE_SETUP || payload[length - 1] != 0) return false;
  say_word("the guest cannot be set up: ");
  say_foreign(payload + 4, length - 4);
  say_word(": errno ");
  say_number(get_u32(payload));
  say_word("\n");
  bridge.phase = PHASE_OFF;
  bridge.status = EXIT_OWN_FAILURE;
  bridge.main_over = true;
  bridge.vmm_by = now_ms() + ENDING_MS;
  close_wire(main_peer);
  return true;
}

static bool on_frame(const struct link_header *header, uint8_t *payload) {
  switch (header->type) {
    case LINK_HELLO: return on_hello(payload, header->length);
    case LINK_SETUP_DONE: return on_setup_done();
    case LINK_SETUP_FAILED: return on_setup_failed(payload, header->length);
    default: break;
  }
  /* link_allows has seen to it that the rest has a channel. */
  struct peer *peer = &bridge.peers[header->channel];
  if (header->type == LINK_DATA && peer == main_peer && bridge.main_over) {
    bridge.last_bytes += header->length;
    if (bridge.last_bytes > MOST_LAST_BYTES) return false;
  }
  switch (header->type) {
    case LINK_CONTROL: return on_control(peer, payload, header->length);
    case LINK_CLOSE: return on_close(peer);
    default: return line_hear(&peer->line, header, payload);
  }
}

static void break_off(const struct link_header *header) {
  say_word("the guest has broken the protocol of the link: type ");
  say_number(header->type);
  say_word(", channel ");
  say_number(header->channel);
  say_word("\n");
  end_now(EXIT_OWN_FAILURE);
}

/* Nothing more comes. What did come is still passed on. */
static void note_gone(void) {
  bridge.gone = bridge.deaf = true;
  if (!bridge.main_over) bridge.status = EXIT_OWN_FAILURE;
  for (struct peer *peer = main_peer; peer < no_peer; peer++) {
    close_wire(peer);
    for (int i = 0; i < LINK_STREAMS; i++) {
      struct flow *flow = &peer->line.flows[i];
      if (flow->made && flow->sends) flow_drop(flow);
      else if (flow->made) flow_finish(flow);
    }
  }
  int64_t by = now_ms() + ENDING_MS;
  if (by < bridge.linger_by) bridge.linger_by = by;
  if (by < bridge.vmm_by) bridge.vmm_by = by;
}

static void on_link(void) {
  enum link_result result = link_fill(&bridge.in, bridge.link);
  if (result == LINK_GONE || (result == LINK_WAIT && bridge.vmm == 0)) note_gone();
  if (result != LINK_FRAME) return;
  struct link_header header;
  uint8_t *payload;
  while (!bridge.over && (result = link_next(&bridge.in, LINK_GUEST, &header, &payload)) == LINK_FRAME) {
    if (!on_frame(&header, payload)) {
      result = LINK_BAD;
      break;
    }
    link_done(&bridge.in, &header);
  }
  if (result == LINK_BAD) break_off(&header);
}

static void flush(void) {
  if (!bridge.deaf && link_flush(&bridge.out, bridge.link) != LINK_GONE) return;
  /* What was said before may still be read. */
  bridge.deaf = true;
  bridge.out.begin = bridge.out.end = 0;
}

/* The link by vsock, at the time `now` of this turn: one that is later would let the next attempt slip by. */
static void dial_link(int64_t now) {
  if (!bridge.dialling || bridge.gone || bridge.over) return;
  switch (dial_turn(&bridge.dial, now)) {
    case DIAL_WAIT: return;
    case DIAL_DONE: bridge.link = take(&bridge.dial.sock); break;
    case DIAL_BAD:
      say_word("the VMM's socket does not answer as vsock does\n");
      end_now(EXIT_OWN_FAILURE);
  }
  bridge.dialling = false;
  bridge.dial.again_at = INT64_MAX;
}

/* The end */

/* All that the guest has of this job's output has come, or nobody wants it. */
static bool is_delivered(const struct peer *peer) {
  for (int i = 1; i < LINK_STREAMS; i++) {
    const struct flow *flow = &peer->line.flows[i];
    if (flow->made && !flow->ended && flow->fd >= 0) return false;
  }
  return true;
}

static bool is_written(const struct peer *peer) {
  for (int i = 1; i < LINK_STREAMS; i++) {
    if (flow_holds(&peer->line.flows[i])) return false;
  }
  return true;
}

/* The launcher's readers are waited for as long as the launcher has them open, others not for ever. */
static bool all(bool (*is_so)(const struct peer *), int64_t now) {
  if (!is_so(main_peer) && (bridge.main_over || now < bridge.linger_by)) return false;
  for (const struct peer *peer = main_peer + 1; peer < no_peer && now < bridge.linger_by; peer++) {
    if (!is_so(peer)) return false;
  }
  return true;
}

static void switch_off(int64_t now) {
  if (bridge.phase != PHASE_OPEN || !bridge.main_over || bridge.gone) return;
  if (bridge.linger_by == INT64_MAX) bridge.linger_by = now + ENDING_MS;
  /* Only the host's readers may take their time: the launcher, whose clock ends with the job, must not be kept by a
     guest that goes on after it. */
  if (bridge.last_by == INT64_MAX || !is_written(main_peer)) bridge.last_by = now + LAST_MS;
  if (!all(is_delivered, now) && now < bridge.last_by) return;
  /* The one frame that goes into a busy queue, which has room for it. */
  const struct link_header header = {0, LINK_POWEROFF, 0, LINK_MACHINE};
  link_put(&bridge.out, &header, NULL);
  bridge.phase = PHASE_OFF;
  bridge.vmm_by = now + ENDING_MS;
}

static void keep_time(int64_t now) {
  if (bridge.main_over) bridge.deadline_at = INT64_MAX; /* it has ended before, if only just */
  if (now < bridge.deadline_at) return;
  bridge.late = true;
  end_now(EXIT_OWN_FAILURE);
}

static void see_to_end(int64_t now) {
  keep_time(now);
  switch_off(now);
  if (now >= bridge.end_by) end_now(bridge.status);
  if (now >= bridge.hung_by && main_peer->wire.sock >= 0) end_now(EXIT_OWN_FAILURE);
  bool too_late = now >= bridge.vmm_by;
  if (too_late && !bridge.gone) note_gone();
  if (bridge.gone && (bridge.vmm == 0 || too_late) && all(is_written, now)) end_now(bridge.status);
}

/* A VMM says by its status why it gave up, when it had no time for words. */
static void note_vmm(int status) {
  bridge.vmm = 0;
  if (status == 0 || bridge.main_over) return;
  bool killed = WIFSIGNALED(status);
  drain_last(&bridge.words); /* its own come first */
  say_word(killed ? "the VMM was killed by signal " : "the VMM exited with status ");
  say_number((uint32_t)(killed ? WTERMSIG(status) : WEXITSTATUS(status)));
  say_word("\n");
}

static void reap_all(void) {
  bridge.reap_again = false;
  for (int reaped = 0; reaped < REAPED_A_TURN; reaped++) {
    int status;
    pid_t pid = waitpid(-1, &status, WNOHANG);
    if (pid <= 0) return;
    if (pid == bridge.vmm) note_vmm(status);
  }
  bridge.reap_again = true;
}

static void on_signals(void) {
  /* Whatever else comes is not for us: the job is signalled by frames. */
  for (int left = SIGNALS_A_TURN; left > 0 && next_signal(bridge.signals) != 0; left--) continue;
  reap_all();
}

static void on_words(void) {
  if (drain_move(&bridge.words) != OVER || bridge.words.from < 0) return;
  close(bridge.words.from);
  bridge.words.from = -1;
}

/* Turns */

static void look_at(int descriptor, int events, enum about about, const struct peer *peer, int stream) {
  if (descriptor < 0 || events < 0) return;
  nfds_t at = bridge.watched_count++;
  bridge.watched[at] = (struct pollfd){.fd = descriptor, .events = (short)events};
  bridge.meant[at].about = about;
  bridge.meant[at].peer = (uint8_t)(peer - main_peer);
  bridge.meant[at].stream = (uint8_t)stream;
}

static void look_at_peer(const struct peer *peer) {
  /* Where nothing can be read yet, that the other side has closed is seen all the same. */
  bool waits = !peer->ready || (peer == main_peer && bridge.hung_by == INT64_MAX);
  if (is_heard(peer)) look_at(peer->wire.sock, POLLIN, ABOUT_HOST, peer, 0);
  else if (waits) look_at(peer->wire.sock, 0, ABOUT_HOST, peer, 0);
  bool busy = link_is_busy(&bridge.out);
  for (int i = 0; i < LINK_STREAMS; i++) {
    const struct flow *flow = &peer->line.flows[i];
    if (flow->made) look_at(flow->fd, flow_events(flow, busy), ABOUT_FLOW, peer, i);
  }
}

static void look_at_all(int64_t now) {
  bridge.watched_count = 0;
  look_at(bridge.signals, POLLIN, ABOUT_SIGNALS, main_peer, 0);
  bool writes = !bridge.deaf && bridge.out.begin < bridge.out.end;
  if (!bridge.gone) look_at(bridge.link, POLLIN | (writes ? POLLOUT : 0), ABOUT_LINK, main_peer, 0);
  if (bridge.dialling) look_at(bridge.dial.sock, POLLIN, ABOUT_DIAL, main_peer, 0);
  look_at(bridge.words.from, POLLIN, ABOUT_WORDS, main_peer, 0);
  if (is_listening(now)) look_at(bridge.listener, POLLIN, ABOUT_LISTENER, main_peer, 0);
  for (const struct peer *peer = main_peer; peer < no_peer; peer++) look_at_peer(peer);
}

static void on_event(nfds_t at) {
  short found = bridge.watched[at].revents;
  struct peer *peer = &bridge.peers[bridge.meant[at].peer];
  switch (bridge.meant[at].about) {
    case ABOUT_SIGNALS: on_signals(); break;
    case ABOUT_LINK:
      if (found & ~POLLOUT) on_link();
      break;
    case ABOUT_DIAL: break; /* the next turn begins with it */
    case ABOUT_WORDS: on_words(); break;
    case ABOUT_LISTENER: on_listener(); break;
    case ABOUT_HOST:
      if (bridge.watched[at].events) on_host(peer);
      else on_hang_up(peer);
      break;
    case ABOUT_FLOW: line_turn(&peer->line, bridge.meant[at].stream, found, &bridge.out); break;
  }
}

static void say_what_is_owed(void) {
  for (struct peer *peer = main_peer; peer < no_peer; peer++) {
    line_owe(&peer->line, &bridge.out);
    if (peer == main_peer || peer->wire.sock >= 0 || !peer->line.open || !line_is_over(&peer->line)) continue;
    memset(peer, 0, sizeof *peer);
    wire_open(&peer->wire, -1);
  }
}

static int timeout_ms(int64_t now) {
  if (bridge.reap_again || (bridge.vmm == 0 && !bridge.gone)) return 0;
  const int64_t ticks[] = {bridge.end_by,    bridge.deadline_at,  bridge.vmm_by,       bridge.hung_by, bridge.last_by,
                           bridge.linger_by, bridge.accept_after, bridge.dial.again_at};
  int64_t next = INT64_MAX;
  for (size_t i = 0; i < sizeof ticks / sizeof *ticks; i++) {
    if (ticks[i] > now && ticks[i] < next) next = ticks[i]; /* those that have passed were seen to */
  }
  if (next == INT64_MAX) return -1;
  return next - now < INT32_MAX ? (int)(next - now) : INT32_MAX;
}

/* One round; waits `most_ms` at most (-1: until something happens). */
static void turn(int most_ms) {
  if (bridge.reap_again) reap_all();
  if (bridge.vmm == 0 && !bridge.gone) on_link();
  int64_t now = now_ms();
  dial_link(now);
  see_to_end(now);
  say_what_is_owed();
  flush();
  if (bridge.over) return;
  look_at_all(now);
  int wait_ms = timeout_ms(now);
  if (most_ms >= 0 && (wait_ms < 0 || wait_ms > most_ms)) wait_ms = most_ms;
  int count = poll(bridge.watched, bridge.watched_count, wait_ms);
  if (count < 0 && errno != EINTR) end_now(EXIT_OWN_FAILURE);
  for (nfds_t at = 0; count > 0 && at < bridge.watched_count && !bridge.over; at++) {
    if (bridge.watched[at].revents) on_event(at);
  }
}

/* The start */

/* With 0 for a word that is too long. Each `@LINK@` and `@CONSOLE@` in a word becomes a number. */
static size_t substitute(char *to, size_t room, const char *word, const char *const names[2], const int numbers[2]) {
  size_t length = 0;
  while (*word) {
    int which = 0;
    while (which < 2 && strncmp(word, names[which], strlen(names[which])) != 0) which++;
    if (length + 11 >= room) return 0;
    if (which == 2) {
      to[length++] = *word++;
      continue;
    }
    word += strlen(names[which]);
    char digits[11];
    int count = 0;
    for (int left = numbers[which]; count == 0 || left > 0; left /= 10) digits[count++] = (char)('0' + left % 10);
    while (count > 0) to[length++] = digits[--count];
  }
  if (length >= room) return 0;
  to[length] = '\0';
  return length + 1;
}

static bool fill_in(char **argv, int link, int console) {
  static char words[MOST_COMMAND_BYTES];
  static const char *const names[2] = {"@LINK@", "@CONSOLE@"};
  const int numbers[2] = {link, console};
  size_t used = 0;
  for (; *argv; argv++) {
    size_t length = substitute(words + used, sizeof words - used, *argv, names, numbers);
    if (length == 0) return false;
    *argv = words + used;
    used += length;
  }
  return true;
}

/* The VMM has nothing of ours but its end of the link, a pipe to be read, and what it was given. */
static _Noreturn void become_vmm(char **argv, int link, int console, int extras) {
  static char *const environment[] = {"PATH=/usr/bin:/bin", NULL};
  static const char words_of_ours[] = "the VMM cannot be executed\n";
  if (dup2(console, 1) != 1 || dup2(console, 2) != 2) _exit(EXIT_OWN_FAILURE);
  if ((link >= 0 && fcntl(link, F_SETFD, 0) != 0) || fcntl(console, F_SETFD, 0) != 0) _exit(EXIT_OWN_FAILURE);
  for (int i = 0; i < extras; i++) {
    if (fcntl(EXTRA + i, F_SETFD, 0) != 0) _exit(EXIT_OWN_FAILURE);
  }
  if (!fill_in(argv, link, console)) _exit(EXIT_OWN_FAILURE);
  unblock_signals();
  execve(argv[0], argv, environment);
  if (write(2, words_of_ours, sizeof words_of_ours - 1) < 0) _exit(EXIT_OWN_FAILURE);
  _exit(EXIT_OWN_FAILURE);
}

/* Ours of the link, and the VMM's; with a path of a vsock's socket neither is there yet. */
static bool make_link(int *theirs, const char *vsock) {
  int ends[2] = {-1, -1};
  bridge.dialling = vsock;
  if (vsock && !dial_open(&bridge.dial, vsock)) return false;
  if (!vsock && socketpair(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0, ends) != 0) return false;
  bridge.link = ends[0];
  *theirs = ends[1];
  return vsock || fcntl(bridge.link, F_SETFL, O_NONBLOCK) == 0;
}

static bool start_vmm(char **argv, int extras, const char *vsock) {
  int link;
  int pipes[2];
  if (!make_link(&link, vsock) || pipe2(pipes, O_CLOEXEC) != 0) return false;
  if (!drain_open(&bridge.words, pipes[0], WORDS, FIRST_WORDS_BYTES) || !give_up_privileges()) return false;
  bridge.words.tail = &bridge.tail;
  bridge.vmm = fork();
  if (bridge.vmm == 0) become_vmm(argv, link, pipes[1], extras);
  if (link >= 0) close(link);
  close(pipes[1]);
  for (int i = 0; i < extras; i++) close(EXTRA + i);
  return bridge.vmm > 0;
}

/* The setup text, which a file of the ring has. */
static bool read_setup(const char *path) {
  int file = open(path, O_RDONLY | O_CLOEXEC | O_NOFOLLOW | O_NONBLOCK);
  if (file < 0 || !is_kind(file, S_IFREG)) return false;
  void *room = mmap(NULL, LINK_SETUP_TEXT_BYTES, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  if (room == MAP_FAILED) return false;
  bridge.setup = room;
  for (ssize_t count = 1; count > 0;) {
    count = read(file, bridge.setup + bridge.setup_bytes, LINK_SETUP_TEXT_BYTES - bridge.setup_bytes);
    if (count < 0) return false;
    bridge.setup_bytes += (size_t)count;
  }
  uint8_t beyond;
  bool whole = read(file, &beyond, 1) == 0;
  close(file);
  return whole && bridge.setup_bytes > 0 && bridge.setup[bridge.setup_bytes - 1] == 0;
}

/* Everything but descriptors of the ring. */
static bool open_bridge(void) {
  bridge.deadline_at = bridge.end_by = bridge.vmm_by = bridge.hung_by = bridge.last_by = bridge.linger_by = INT64_MAX;
  bridge.dial.again_at = INT64_MAX;
  for (struct peer *peer = main_peer; peer < no_peer; peer++) wire_open(&peer->wire, -1);
  size_t bytes = (size_t)WINDOWS * LINK_WINDOW_BYTES;
  void *windows = mmap(NULL, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (windows == MAP_FAILED) return false;
  bridge.windows = windows;
  return link_open_reader(&bridge.in, LINK_FROM_GUEST_BYTES) && link_open_queue(&bridge.out, LINK_FROM_HOST_BYTES);
}

static bool set_up(int extras) {
  for (int i = 0; i < extras; i++) {
    if (!keep_open(EXTRA + i)) return false;
  }
  if (!ring_set_up(EXTRA + extras - 1) || !open_bridge()) return false;
  bridge.listener = LISTENER;
  wire_open(&main_peer->wire, CONTROL);
  bridge.signals = open_signals();
  return bridge.signals >= 0;
}

/* What still runs dies with PID 1. */
static _Noreturn void leave(void) {
  if (bridge.vmm > 0) kill(bridge.vmm, SIGKILL);
  drain_last(&bridge.words);
  drain_end(&bridge.words);
  if (bridge.late) say_late();
  _exit(bridge.status);
}

/* "vsock:" and the path of a socket: the guest is waited for as with "1", but has to be reached first. */
static const char *vsock_in(const char *word) {
  static const char prefix[] = "vsock:";
  return strncmp(word, prefix, sizeof prefix - 1) == 0 ? word + sizeof prefix - 1 : NULL;
}

int keep_bridge(char **argv) {
  uint64_t extras;
  for (int i = 0; i < 5; i++) {
    if (!argv[i]) return EXIT_OWN_FAILURE;
  }
  const char *vsock = vsock_in(argv[2]);
  bool waits = vsock || strcmp(argv[2], "1") == 0;
  if (!waits && strcmp(argv[2], "0") != 0) return EXIT_OWN_FAILURE;
  if (!parse_bytes(argv[0], &bridge.log_bytes)) return EXIT_OWN_FAILURE;
  if (!parse_bytes(argv[3], &extras) || extras > MOST_EXTRAS) return EXIT_OWN_FAILURE;
  if (!set_up((int)extras) || !read_setup(argv[1]) || !start_vmm(argv + 4, (int)extras, vsock)) return EXIT_OWN_FAILURE;
  bridge.phase = PHASE_HELLO;
  if (!waits) send_setup();
  while (!bridge.over) turn(-1);
  leave();
}
