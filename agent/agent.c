/* ringfence-agent: PID 1 of a sandbox. What it must do, and withstand, is in PROTOCOL.md. */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <sched.h>
#include <signal.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/prctl.h>
#include <sys/socket.h>
#include <unistd.h>

#include "back.h"
#include "bridge.h"
#include "client.h"
#include "door.h"
#include "guest.h"
#include "pack.h"
#include "signals.h"
#include "system.h"

enum { CONTROL = 3, LISTENER = 4, LOCK = 5, IMAGE = 6 }; /* descriptors that we start with */
enum { MAX_EVENTS = 16, SIGNALS_A_TURN = 8, ACCEPT_AGAIN_MS = 1000 };

static int signals;
static int listener = -1;
static bool fed;             /* it is no listener: the door sends the connections */
static bool listening;       /* it is watched */
static int64_t accept_after; /* descriptors or memory were short */

static bool keep(int descriptor) {
  return fcntl(descriptor, F_SETFD, FD_CLOEXEC) == 0;
}

static bool set_up(void) {
  /* A job has our uid: this keeps /proc/1/{mem,fd,...}, ptrace and pidfd_getfd from it. */
  if (prctl(PR_SET_DUMPABLE, 0, 0, 0, 0) != 0) return false;
  block_signals();
  if (!keep(CONTROL)) return false;
  if (keep(LISTENER) && fcntl(LISTENER, F_SETFL, O_NONBLOCK) == 0) listener = LISTENER;
  keep(LOCK);
  keep(IMAGE);
  if (!close_from(IMAGE + 1)) return false;
  /* Now, before any job could put something else in the place of the null device; 0 is also the stdin of detached jobs. */
  if (!open_null() || !clients_init()) return false;
  sandbox.init = getpid() == 1;
  sandbox.proc = open("/proc", O_RDONLY | O_DIRECTORY | O_CLOEXEC);
  sandbox.epoll = epoll_create1(EPOLL_CLOEXEC);
  signals = open_signals();
  return sandbox.epoll >= 0 && signals >= 0 && watch(signals, 0, ABOUT_SIGNALS);
}

static void set_listening(bool wanted) {
  if (listener < 0 || wanted == listening) return;
  listening = wanted;
  if (!wanted) {
    unwatch(listener);
  } else if (!watch(listener, 0, ABOUT_LISTENER)) {
    close(listener);
    listener = -1;
  }
}

/* In a kernel of its own, where no socket of the host's can be listened on, the door sends the connections over a
   connected one, each with one byte. Which of both we have shows when the first one comes. */
static int next_connection(void) {
  if (!fed) {
    int sock = accept4(listener, NULL, NULL, SOCK_CLOEXEC);
    if (sock >= 0 || (errno != EINVAL && errno != EOPNOTSUPP)) return sock;
    fed = true;
  }
  return wire_take_connection(listener);
}

static void on_listener(void) {
  struct client *client = find_free();
  if (!client) return;
  int sock = next_connection();
  if (sock >= 0) {
    client_open(client, sock);
  } else if (errno == EINVAL || errno == ENOTSOCK) {
    set_listening(false);
    close(listener);
    listener = -1;
  } else if (errno != EAGAIN && errno != EINTR && errno != ECONNABORTED) {
    /* A job may take descriptors away from us with prlimit: do not spin on what stays readable. */
    accept_after = now_ms() + ACCEPT_AGAIN_MS;
  }
}

static void on_signals(void) {
  /* Not until there are none: a job could send them as fast as we read. */
  for (int left = SIGNALS_A_TURN; left > 0; left--) {
    int signo = next_signal(signals);
    if (signo == 0) break;
    if (signo != SIGCHLD) forward(signo);
  }
  reap();
}

static void on_event(uint32_t data, uint32_t events) {
  struct client *client = &sandbox.clients[data / ABOUT_COUNT];
  switch ((enum about)(data % ABOUT_COUNT)) {
    case ABOUT_SOURCE_0: client_output(client, 0); break;
    case ABOUT_SOURCE_1: client_output(client, 1); break;
    case ABOUT_LOG: client_log(client); break;
    case ABOUT_RELAY: client_relay(client, events & (EPOLLHUP | EPOLLERR)); break;
    case ABOUT_MASTER: client_relay(client, false); break;
    case ABOUT_SOCKET: client_readable(client); break;
    case ABOUT_SIGNALS: on_signals(); break;
    case ABOUT_LISTENER: on_listener(); break;
    case ABOUT_COUNT: break;
  }
}

static int timeout_ms(int64_t now) {
  if (sandbox.reap_again) return 0;
  int64_t next = next_tick(now);
  if (accept_after > now && accept_after < next) next = accept_after;
  if (next == INT64_MAX) return -1;
  if (next <= now) return 0;
  return next - now < INT32_MAX ? (int)(next - now) : INT32_MAX;
}

static _Noreturn void serve(void) {
  for (;;) {
    if (sandbox.ending || sandbox.reap_again) reap();
    int64_t now = now_ms();
    tick(now);
    if (has_ended(now)) end();
    set_listening(!sandbox.ending && !main_waits() && now >= accept_after && find_free());
    struct epoll_event events[MAX_EVENTS];
    int count = epoll_wait(sandbox.epoll, events, MAX_EVENTS, timeout_ms(now));
    if (count < 0 && errno != EINTR) _exit(EXIT_OWN_FAILURE);
    for (int i = 0; i < count; i++) on_event(events[i].data.u32, events[i].events);
  }
}

/* On the host: hold a new user namespace open until the launcher, which writes its maps, has done with it. */
static int hold_user_namespace(void) {
  char byte = 'R';
  if (!close_from(3) || unshare(CLONE_NEWUSER) != 0) return EXIT_OWN_FAILURE;
  if (write(1, &byte, 1) != 1) return EXIT_OWN_FAILURE;
  ssize_t count;
  do count = read(0, &byte, 1);
  while (count > 0 || (count < 0 && errno == EINTR));
  return count == 0 ? 0 : EXIT_OWN_FAILURE;
}

static int print_version(void) {
  static const char line[] = {'0' + PROTOCOL_VERSION, '\n'};
  return write(1, line, sizeof line) == sizeof line ? 0 : EXIT_OWN_FAILURE;
}

int main(int argc, char **argv) {
  /* What the kernel starts in an initramfs; a container cannot have PID 1 of that name by its own choice. */
  if (getpid() == 1 && argc > 0 && strcmp(argv[0], "/init") == 0) run_guest();
  if (argc == 2 && strcmp(argv[1], "--userns") == 0) return hold_user_namespace();
  if (argc == 2 && strcmp(argv[1], "--version") == 0) return print_version();
  if (argc > 4 && strcmp(argv[1], "--door") == 0) return keep_door(argv + 2);
  if (argc > 2 && strcmp(argv[1], "--bridge") == 0) return keep_bridge(argv + 2);
  if (argc > 2 && strcmp(argv[1], "--back") == 0) return keep_back(argv + 2);
  if (argc == 4 && strcmp(argv[1], "--pack") == 0) return pack(argv + 2);
  if (argc == 4 && strcmp(argv[1], "--unpack") == 0) return unpack(argv + 2);
  if (argc > 1 || !set_up()) return EXIT_OWN_FAILURE;
  client_open(&sandbox.clients[0], CONTROL);
  serve();
}
