/* PID 1 of the ring around a sandboxed kernel (gVisor's sentry), on the host's side of it; see PROTOCOL.md, "The door".

   It starts the runtime, which stays no longer than it takes to start the sandbox, hands every connection from the
   host on to the agent inside, keeps what the runtime and the kernel inside say, and the time limit when nobody else
   does. It parses nothing that comes from inside, and gives up all of its privileges as soon as the runtime has got
   them. */
#define _GNU_SOURCE
#include "door.h"

#include <errno.h>
#include <fcntl.h>
#include <signal.h>
#include <sys/epoll.h>
#include <sys/socket.h>
#include <sys/wait.h>
#include <unistd.h>

#include "ring.h"
#include "signals.h"
#include "system.h"

enum { LOG = 8, LOG_FILE = 9, TRACE = 10 };
enum { FEED = 4 }; /* what the agent inside has in the listener's place */
enum { MAX_EVENTS = 8 };
#define MOST_DEADLINE_MS (INT64_MAX / 2)
enum about { ABOUT_SIGNALS, ABOUT_LISTENER, ABOUT_FEED, ABOUT_WORDS, ABOUT_LOG };

static int events = -1;
static int signals = -1;
static int feed = -1; /* connections go in here */
static struct drain words = {.from = -1, .to = -1};
static struct drain log_drain = {.from = -1, .to = -1};
static pid_t starter;        /* the runtime; 0 once it has started the sandbox */
static bool closed;          /* nobody holds the feed's other end */
static bool reap_again;      /* stopped reaping to see to other things */
static int64_t end_by = INT64_MAX;
static int64_t accept_after; /* something was short; 0: the listener is watched */
static int64_t deadline_ms;  /* how long the sandbox may live once SIGUSR1 has come; 0: for ever */
static int64_t deadline_at = INT64_MAX;

static bool watch(int operation, int descriptor, enum about about, uint32_t wanted) {
  struct epoll_event event = {.events = wanted};
  event.data.u32 = about;
  return epoll_ctl(events, operation, descriptor, &event) == 0;
}

/* Pipes into files */

static void on_drain(struct drain *drain) {
  if (drain_move(drain) != OVER || drain->from < 0) return;
  epoll_ctl(events, EPOLL_CTL_DEL, drain->from, NULL);
  close(drain->from);
  drain->from = -1;
}

static bool open_drain(struct drain *drain, int from, int to, uint64_t bytes, enum about about) {
  return drain_open(drain, from, to, bytes) && watch(EPOLL_CTL_ADD, from, about, EPOLLIN);
}

/* Keep what the pipes still hold. */
static _Noreturn void leave(int status) {
  drain_last(&words);
  drain_last(&log_drain);
  _exit(status);
}

/* Time is up and the sandbox still there: whoever had to keep the time inside does not, or cannot. What is left dies
   with PID 1. The mark tells the host, which finds no end in the log. */
static _Noreturn void leave_late(void) {
  drain_last(&words);
  words.left = 0; /* nothing that is still said comes after the mark */
  say_late();
  leave(0);
}

/* Connections */

static void on_listener(void) {
  int sock = accept4(LISTENER, NULL, NULL, SOCK_CLOEXEC);
  if (sock >= 0) {
    hand_on(feed, sock);
    close(sock);
  } else if (errno != EAGAIN && errno != EINTR && errno != ECONNABORTED) {
    /* The sandbox may have used up the memory of its group: do not spin on what stays readable. */
    accept_after = now_ms() + ACCEPT_AGAIN_MS;
    watch(EPOLL_CTL_MOD, LISTENER, ABOUT_LISTENER, 0);
  }
}

static void listen_again(int64_t now) {
  if (accept_after == 0 || now < accept_after) return;
  accept_after = 0;
  watch(EPOLL_CTL_MOD, LISTENER, ABOUT_LISTENER, EPOLLIN);
}

/* The start */

/* The runtime and what it leaves behind have nothing of ours but the agent's two sockets and pipes to be read. */
static _Noreturn void become_runtime(char **argv, int feed_end, int words_end) {
  static char *const environment[] = {"PATH=/usr/bin:/bin", NULL};
  static const char words_of_ours[] = "the runtime cannot be executed\n";
  if (dup2(words_end, 1) != 1 || dup2(words_end, 2) != 2 || dup2(feed_end, FEED) != FEED) _exit(EXIT_OWN_FAILURE);
  if (fcntl(CONTROL, F_SETFD, 0) != 0 || fcntl(TRACE, F_SETFD, 0) != 0) _exit(EXIT_OWN_FAILURE);
  unblock_signals();
  execve(argv[0], argv, environment);
  if (write(2, words_of_ours, sizeof words_of_ours - 1) < 0) _exit(EXIT_OWN_FAILURE);
  _exit(EXIT_OWN_FAILURE);
}

static bool start_runtime(char **argv) {
  int ends[2];
  int pipes[2];
  if (socketpair(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0, ends) != 0 || pipe2(pipes, O_CLOEXEC) != 0) return false;
  feed = ends[0];
  if (!watch(EPOLL_CTL_ADD, feed, ABOUT_FEED, 0)) return false; /* for its hang-up alone: nothing is read from it */
  if (!open_drain(&words, pipes[0], WORDS, MOST_WORDS_BYTES, ABOUT_WORDS)) return false;
  starter = fork();
  if (starter == 0) become_runtime(argv, ends[1], pipes[1]);
  /* With an end of the sandbox's own kept here, we would never see that it has closed its. */
  close(ends[1]);
  close(pipes[1]);
  close(CONTROL);
  close(TRACE);
  if (starter < 0) return false;
  if (give_up_privileges()) return true;
  kill(starter, SIGKILL);
  return false;
}

static bool set_up(uint64_t log_bytes) {
  if (log_bytes > 0 && (!keep_open(LOG) || !keep_open(LOG_FILE))) return false;
  if (!ring_set_up(TRACE)) return false;
  events = epoll_create1(EPOLL_CLOEXEC);
  signals = open_signals();
  if (events < 0 || signals < 0 || !watch(EPOLL_CTL_ADD, signals, ABOUT_SIGNALS, EPOLLIN)) return false;
  if (!watch(EPOLL_CTL_ADD, LISTENER, ABOUT_LISTENER, EPOLLIN)) return false;
  if (log_bytes > 0) return open_drain(&log_drain, LOG, LOG_FILE, log_bytes, ABOUT_LOG);
  close(LOG);
  close(LOG_FILE);
  return true;
}

/* The end */

/* Of other processes nothing is known: helpers of the runtime's, or what a hostile kernel has made. */
static void note_death(pid_t pid, int status) {
  if (pid != starter) return;
  starter = 0;
  if (!WIFEXITED(status)) leave(EXIT_OWN_FAILURE);
  if (WEXITSTATUS(status) != 0) leave(WEXITSTATUS(status));
}

/* The kernel inside is gone. What is left of the sandbox follows by itself, but must not take for ever. */
static void on_feed(void) {
  closed = true;
  epoll_ctl(events, EPOLL_CTL_DEL, feed, NULL);
}

static void note_end(int64_t now) {
  if (!closed || starter != 0 || end_by != INT64_MAX) return;
  end_by = now + ENDING_MS;
  deadline_at = INT64_MAX; /* it has ended before, if only just */
}

static void reap_all(void) {
  reap_again = false;
  for (int reaped = 0; reaped < REAPED_A_TURN; reaped++) {
    int status;
    pid_t pid = waitpid(-1, &status, WNOHANG);
    if (pid < 0 && errno == ECHILD) leave(0);
    if (pid <= 0) return;
    note_death(pid, status);
  }
  reap_again = true;
}

/* From the launcher, as it lets the job go. Whoever else may send it can only make the end come earlier. */
static void start_clock(void) {
  if (deadline_ms > 0 && deadline_at == INT64_MAX && !closed) deadline_at = now_ms() + deadline_ms;
}

static void on_signals(void) {
  for (int left = SIGNALS_A_TURN; left > 0; left--) {
    int signo = next_signal(signals);
    if (signo == 0) break;
    /* Whatever else comes is not for us: the job is signalled by frames. */
    if (signo == SIGUSR1) start_clock();
  }
  reap_all();
}

static int timeout_ms(int64_t now) {
  if (reap_again) return 0;
  int64_t next = end_by < deadline_at ? end_by : deadline_at;
  if (accept_after > 0 && accept_after < next) next = accept_after;
  if (next == INT64_MAX) return -1;
  if (next <= now) return 0;
  return next - now < INT32_MAX ? (int)(next - now) : INT32_MAX;
}

static void on_event(enum about about) {
  switch (about) {
    case ABOUT_SIGNALS: on_signals(); break;
    case ABOUT_LISTENER: on_listener(); break;
    case ABOUT_FEED: on_feed(); break;
    case ABOUT_WORDS: on_drain(&words); break;
    case ABOUT_LOG: on_drain(&log_drain); break;
  }
}

static _Noreturn void serve(void) {
  for (;;) {
    if (reap_again) reap_all();
    int64_t now = now_ms();
    note_end(now);
    if (now >= end_by) leave(0); /* what is left dies with PID 1 */
    if (now >= deadline_at) leave_late();
    listen_again(now);
    struct epoll_event found[MAX_EVENTS];
    int count = epoll_wait(events, found, MAX_EVENTS, timeout_ms(now));
    if (count < 0 && errno != EINTR) _exit(EXIT_OWN_FAILURE);
    for (int i = 0; i < count; i++) on_event((enum about)found[i].data.u32);
  }
}

static bool parse_deadline(const char *text) {
  uint64_t given;
  if (!parse_bytes(text, &given) || given > MOST_DEADLINE_MS) return false;
  deadline_ms = (int64_t)given;
  return true;
}

int keep_door(char **argv) {
  uint64_t log_bytes;
  if (!argv[0] || !argv[1] || !argv[2]) return EXIT_OWN_FAILURE;
  if (!parse_bytes(argv[0], &log_bytes) || !parse_deadline(argv[1])) return EXIT_OWN_FAILURE;
  if (!set_up(log_bytes) || !start_runtime(argv + 2)) return EXIT_OWN_FAILURE;
  serve();
}
