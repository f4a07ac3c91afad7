#define _GNU_SOURCE
#include "ring.h"

#include <errno.h>
#include <fcntl.h>
#include <string.h>
#include <sys/prctl.h>
#include <sys/socket.h>
#include <sys/syscall.h>
#include <unistd.h>

#include "signals.h"
#include "system.h"

enum { PIECE_BYTES = 1 << 14, LAST_PIECES = 4096 };

void store(int file, uint64_t *left, const uint8_t *bytes, size_t length) {
  if (length > *left) length = (size_t)*left;
  *left -= length;
  while (length > 0) {
    ssize_t written = write(file, bytes, length);
    if (written < 0 && errno == EINTR) continue;
    if (written <= 0) {
      *left = 0;
      return;
    }
    bytes += written;
    length -= (size_t)written;
  }
}

static void tail_add(struct tail *tail, const uint8_t *bytes, size_t length) {
  while (length > 0) {
    size_t at = (size_t)(tail->seen % TAIL_BYTES);
    size_t part = length < TAIL_BYTES - at ? length : TAIL_BYTES - at;
    memcpy(tail->bytes + at, bytes, part);
    tail->seen += part;
    bytes += part;
    length -= part;
  }
}

void drain_keep(struct drain *drain, const uint8_t *bytes, size_t length) {
  size_t first = length < drain->left ? length : (size_t)drain->left;
  store(drain->to, &drain->left, bytes, first);
  if (drain->tail) tail_add(drain->tail, bytes + first, length - first);
}

bool drain_open(struct drain *drain, int from, int to, uint64_t bytes) {
  *drain = (struct drain){.from = from, .to = to, .left = bytes};
  return fcntl(from, F_SETFL, O_NONBLOCK) == 0;
}

enum moved drain_move(struct drain *drain) {
  static uint8_t piece[PIECE_BYTES];
  if (drain->from < 0) return OVER;
  ssize_t count = read(drain->from, piece, sizeof piece);
  if (count < 0 && errno == EINTR) return MOVED;
  if (count < 0 && errno == EAGAIN) return EMPTY;
  if (count <= 0) return OVER;
  drain_keep(drain, piece, (size_t)count);
  return MOVED;
}

void drain_last(struct drain *drain) {
  for (int i = 0; i < LAST_PIECES && (drain->left > 0 || drain->tail); i++) {
    if (drain_move(drain) != MOVED) return;
  }
}

void drain_end(struct drain *drain) {
  static const uint8_t gap[] = "\n[some is left out here]\n";
  struct tail *tail = drain->tail;
  uint64_t room = TAIL_BYTES + sizeof gap;
  drain->left = 0;
  drain->tail = NULL;
  if (!tail) return;
  if (tail->seen <= TAIL_BYTES) {
    store(drain->to, &room, tail->bytes, (size_t)tail->seen);
    return;
  }
  size_t at = (size_t)(tail->seen % TAIL_BYTES);
  store(drain->to, &room, gap, sizeof gap - 1);
  store(drain->to, &room, tail->bytes + at, TAIL_BYTES - at);
  store(drain->to, &room, tail->bytes, at);
}

void say_late(void) {
  static const uint8_t mark[] = "\ndeadline\n";
  uint64_t room = sizeof mark - 1;
  store(WORDS, &room, mark, sizeof mark - 1);
}

void hand_on(int feed, int sock) {
  union {
    struct cmsghdr align;
    uint8_t bytes[CMSG_SPACE(sizeof(int))];
  } rights = {.bytes = {0}};
  char byte = 'C';
  struct iovec part = {.iov_base = &byte, .iov_len = 1};
  struct msghdr message = {.msg_iov = &part, .msg_iovlen = 1};
  message.msg_control = rights.bytes;
  message.msg_controllen = sizeof rights.bytes;
  struct cmsghdr *header = CMSG_FIRSTHDR(&message);
  header->cmsg_level = SOL_SOCKET;
  header->cmsg_type = SCM_RIGHTS;
  header->cmsg_len = CMSG_LEN(sizeof(int));
  memcpy(CMSG_DATA(header), &sock, sizeof sock);
  sendmsg(feed, &message, MSG_DONTWAIT | MSG_NOSIGNAL);
}

bool give_up_privileges(void) {
  const struct {
    uint32_t version;
    int pid;
  } header = {.version = 0x20080522}; /* capset(2): version 3 */
  static const uint32_t none[2][3];
  if (prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) != 0) return false;
  for (unsigned long capability = 0; prctl(PR_CAPBSET_READ, capability, 0, 0, 0) >= 0; capability++) {
    /* Without CAP_SETPCAP the bounding set stays; with no new privileges nothing can be had from it. */
    if (prctl(PR_CAPBSET_DROP, capability, 0, 0, 0) != 0 && errno != EPERM) return false;
  }
  return syscall(SYS_capset, &header, none) == 0; /* the ambient ones go along */
}

bool keep_open(int descriptor) {
  return fcntl(descriptor, F_SETFD, FD_CLOEXEC) == 0;
}

/* Give every number up to `last` something, so that nothing of ours gets one of those that are passed on or closed. */
static bool fill_gaps(int last) {
  int null;
  do null = open("/dev/null", O_RDWR | O_NOCTTY | O_CLOEXEC);
  while (null >= 0 && null <= last);
  if (null < 0) return false;
  close(null);
  return true;
}

bool ring_set_up(int last) {
  if (prctl(PR_SET_DUMPABLE, 0, 0, 0, 0) != 0) return false;
  block_signals();
  if (!keep_open(CONTROL) || !keep_open(LISTENER) || !keep_open(WORDS)) return false;
  for (int descriptor = LOCK; descriptor <= last; descriptor++) keep_open(descriptor);
  if (!close_from(last + 1) || !open_null() || !fill_gaps(last)) return false;
  return fcntl(LISTENER, F_SETFL, O_NONBLOCK) == 0;
}

bool parse_bytes(const char *text, uint64_t *bytes) {
  if (*text == '\0') return false;
  for (*bytes = 0; *text != '\0'; text++) {
    if (*text < '0' || *text > '9' || *bytes > (UINT64_MAX - 9) / 10) return false;
    *bytes = *bytes * 10 + (uint64_t)(*text - '0');
  }
  return true;
}
