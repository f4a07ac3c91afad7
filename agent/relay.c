#define _GNU_SOURCE
#include "relay.h"

#include <errno.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/mman.h>
#include <sys/socket.h>
#include <termios.h>
#include <unistd.h>

enum { PIECE_BYTES = 1 << 14 };
/* More than any kernel keeps of a terminal's output. Somebody may still write to it: a process of another session. */
enum { MOST_LAST_BYTES = 1 << 18 };

void relay_none(struct relay *relay) {
  *relay = (struct relay){.sock = -1};
}

static bool retry(void) {
  return errno == EAGAIN || errno == EWOULDBLOCK || errno == EINTR;
}

static bool is_empty(const struct piece *piece) {
  return piece->begin == piece->end;
}

static struct msghdr message_of(struct iovec *part) {
  return (struct msghdr){.msg_iov = part, .msg_iovlen = 1};
}

/* Whether something that is connected is there, by asking for a byte that stays where it is. */
static bool is_connected(int sock) {
  uint8_t byte;
  struct iovec part = {.iov_base = &byte, .iov_len = 1};
  struct msghdr message = message_of(&part);
  return recvmsg(sock, &message, MSG_DONTWAIT | MSG_PEEK) >= 0 || retry();
}

bool relay_open(struct relay *relay, int sock) {
  relay_none(relay);
  if (!is_connected(sock)) return false;
  size_t bytes = (size_t)2 * PIECE_BYTES;
  uint8_t *room = mmap(NULL, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  if (room == MAP_FAILED) return false;
  relay->to_job.bytes = room;
  relay->to_host.bytes = room + PIECE_BYTES;
  relay->sock = sock;
  return true;
}

/* The next piece of the job's input. False: no more will come. Descriptors that come along have no room and are
   closed by the kernel. */
static bool hear_host(struct relay *relay) {
  struct piece *piece = &relay->to_job;
  if (!is_empty(piece) || relay->last) return true;
  struct iovec part = {.iov_base = piece->bytes, .iov_len = PIECE_BYTES};
  struct msghdr message = message_of(&part);
  ssize_t count = recvmsg(relay->sock, &message, MSG_DONTWAIT);
  if (count <= 0) return count < 0 && retry();
  piece->begin = 0;
  piece->end = (size_t)count;
  return true;
}

/* gVisor's terminal makes a signal of a key also without ISIG, as in an editor. So while such a key is written, none
   stands for a signal. */
static const int signal_keys[] = {VINTR, VQUIT, VSUSP};
enum { SIGNAL_KEYS = sizeof signal_keys / sizeof signal_keys[0] };

static bool has_signal_key(const struct termios *settings, const uint8_t *bytes, size_t length) {
  for (int i = 0; i < SIGNAL_KEYS; i++) {
    cc_t key = settings->c_cc[signal_keys[i]];
    if (key != _POSIX_VDISABLE && memchr(bytes, key, length)) return true;
  }
  return false;
}

/* Set the signal keys to those of `keys`, or to none, and leave everything else as the job has it by now. */
static bool set_signal_keys(int master, const cc_t *keys) {
  struct termios settings;
  if (tcgetattr(master, &settings) != 0) return false;
  for (int i = 0; i < SIGNAL_KEYS; i++) {
    cc_t *key = &settings.c_cc[signal_keys[i]];
    if (!keys) *key = _POSIX_VDISABLE;
    else if (*key == _POSIX_VDISABLE) *key = keys[signal_keys[i]];
  }
  return tcsetattr(master, TCSANOW, &settings) == 0;
}

static ssize_t type(int master, const uint8_t *bytes, size_t length) {
  struct termios settings;
  bool muted = tcgetattr(master, &settings) == 0 && !(settings.c_lflag & ISIG) &&
               has_signal_key(&settings, bytes, length) && set_signal_keys(master, NULL);
  ssize_t count = write(master, bytes, length);
  int error = errno;
  if (muted) set_signal_keys(master, settings.c_cc);
  errno = error;
  return count;
}

static void tell_job(struct relay *relay, int master) {
  struct piece *piece = &relay->to_job;
  if (is_empty(piece)) return;
  ssize_t count = type(master, piece->bytes + piece->begin, piece->end - piece->begin);
  if (count > 0) piece->begin += (size_t)count;
  else if (count < 0 && !retry()) piece->begin = piece->end; /* nobody has the terminal open: it goes nowhere */
}

static void hear_job(struct relay *relay, int master) {
  struct piece *piece = &relay->to_host;
  if (!is_empty(piece) || relay->over) return;
  size_t most = relay->last && relay->left < PIECE_BYTES ? relay->left : PIECE_BYTES;
  ssize_t count = read(master, piece->bytes, most);
  if (count <= 0) {
    bool more = count < 0 && (errno == EINTR || (retry() && !relay->last));
    relay->over = !more; /* EIO: its last user is gone */
    return;
  }
  piece->begin = 0;
  piece->end = (size_t)count;
  if (!relay->last) return;
  relay->left -= (uint32_t)count;
  if (relay->left == 0) relay->over = true;
}

/* False: nobody will ever read it. */
static bool tell_host(struct relay *relay) {
  struct piece *piece = &relay->to_host;
  if (is_empty(piece)) return true;
  struct iovec part = {.iov_base = piece->bytes + piece->begin, .iov_len = piece->end - piece->begin};
  struct msghdr message = message_of(&part);
  ssize_t count = sendmsg(relay->sock, &message, MSG_DONTWAIT | MSG_NOSIGNAL);
  if (count < 0) return retry();
  piece->begin += (size_t)count;
  relay->moved = true;
  return true;
}

enum relay_result relay_turn(struct relay *relay, int master) {
  if (!hear_host(relay)) return RELAY_GONE;
  tell_job(relay, master);
  do {
    hear_job(relay, master);
    if (!tell_host(relay)) return RELAY_GONE;
    /* No event tells that a terminal is empty: the last of it is read until it has no more. */
  } while (relay->last && !relay->over && is_empty(&relay->to_host));
  return relay->over && is_empty(&relay->to_host) ? RELAY_DONE : RELAY_ON;
}

void relay_finish(struct relay *relay) {
  if (relay->last) return;
  relay->last = true;
  relay->left = MOST_LAST_BYTES;
}

uint32_t relay_socket_events(const struct relay *relay) {
  uint32_t events = 0;
  if (is_empty(&relay->to_job) && !relay->last) events |= EPOLLIN;
  if (!is_empty(&relay->to_host)) events |= EPOLLOUT;
  return events;
}

uint32_t relay_master_events(const struct relay *relay) {
  uint32_t events = 0;
  if (!is_empty(&relay->to_job)) events |= EPOLLOUT;
  if (is_empty(&relay->to_host) && !relay->over) events |= EPOLLIN;
  return events;
}

void relay_close(struct relay *relay) {
  if (relay->sock < 0) return;
  close(relay->sock);
  munmap(relay->to_job.bytes, (size_t)2 * PIECE_BYTES);
  relay_none(relay);
}
