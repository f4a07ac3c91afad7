#define _GNU_SOURCE
#include "wire.h"

#include <errno.h>
#include <poll.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/socket.h>
#include <unistd.h>

#include "system.h"

/* What all connections together may have in flight: one full START and several ordinary ones. */
enum { MAX_IN_FLIGHT_BYTES = 2 * MAX_PAYLOAD_BYTES };
static size_t in_flight_bytes;

/* How long a whole answer, larger than a socket's buffer, may take on its way to a host that reads. */
enum { SEND_MS = 200 };

union rights {
  struct cmsghdr align;
  uint8_t bytes[CMSG_SPACE(MAX_DESCRIPTORS * sizeof(int))];
};

void wire_open(struct wire *wire, int sock) {
  memset(wire, 0, sizeof *wire);
  wire->sock = sock;
}

/* Keep the descriptors of one message; close those that there is no room for. */
static bool take_rights(struct wire *wire, const struct cmsghdr *message) {
  size_t count = (message->cmsg_len - CMSG_LEN(0)) / sizeof(int);
  bool fits = true;
  for (size_t i = 0; i < count; i++) {
    int descriptor;
    memcpy(&descriptor, CMSG_DATA(message) + i * sizeof descriptor, sizeof descriptor);
    if (wire->descriptor_count < MAX_DESCRIPTORS) {
      wire->descriptors[wire->descriptor_count++] = descriptor;
    } else {
      close(descriptor);
      fits = false;
    }
  }
  return fits;
}

static bool take_ancillary(struct wire *wire, struct msghdr *message) {
  bool good = !(message->msg_flags & MSG_CTRUNC);
  /* The buffer has no room for a second part, and no socket option asks for one. */
  struct cmsghdr *part = CMSG_FIRSTHDR(message);
  if (!part || part->cmsg_level != SOL_SOCKET || part->cmsg_type != SCM_RIGHTS) return good && !part;
  /* Descriptors belong to a header; the kernel ends a read after the bytes that they came with. */
  return take_rights(wire, part) && wire->got < HEADER_BYTES && good;
}

/* Read at most `size` bytes to `to`: WIRE_FRAME if something came. */
static enum wire_result receive(struct wire *wire, uint8_t *to, size_t size) {
  union rights rights;
  struct iovec part = {.iov_base = to, .iov_len = size};
  struct msghdr message = {.msg_iov = &part, .msg_iovlen = 1};
  message.msg_control = rights.bytes;
  message.msg_controllen = sizeof rights.bytes;
  ssize_t count;
  do count = recvmsg(wire->sock, &message, MSG_DONTWAIT | MSG_CMSG_CLOEXEC);
  while (count < 0 && errno == EINTR);
  if (count < 0) return errno == EAGAIN || errno == EWOULDBLOCK ? WIRE_WAIT : WIRE_END;
  if (!take_ancillary(wire, &message)) return WIRE_BAD;
  if (count == 0) return WIRE_END;
  wire->got += (uint32_t)count;
  return WIRE_FRAME;
}

/* A whole header is there: check it, and make room for the payload. */
static bool begin_payload(struct wire *wire) {
  if (!parse_header(wire->head, &wire->header)) return false;
  if (wire->descriptor_count != descriptors_of(&wire->header)) return false;
  if (wire->header.length <= MAX_SMALL_BYTES) {
    wire->payload = wire->small;
    return true;
  }
  if (in_flight_bytes + wire->header.length > MAX_IN_FLIGHT_BYTES) return false;
  void *room = mmap(NULL, wire->header.length, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  if (room == MAP_FAILED) return false;
  in_flight_bytes += wire->header.length;
  wire->payload = room;
  return true;
}

enum wire_result wire_read(struct wire *wire) {
  while (wire->got < HEADER_BYTES) {
    enum wire_result result = receive(wire, wire->head + wire->got, HEADER_BYTES - wire->got);
    if (result != WIRE_FRAME) return result;
  }
  if (!wire->payload && !begin_payload(wire)) return WIRE_BAD;
  while (wire->got - HEADER_BYTES < wire->header.length) {
    uint32_t have = wire->got - HEADER_BYTES;
    enum wire_result result = receive(wire, wire->payload + have, wire->header.length - have);
    if (result != WIRE_FRAME) return result;
  }
  return WIRE_FRAME;
}

void wire_release(struct wire *wire) {
  for (int i = 0; i < wire->descriptor_count; i++) {
    if (wire->descriptors[i] >= 0) close(wire->descriptors[i]);
  }
  if (wire->payload && wire->payload != wire->small) {
    munmap(wire->payload, wire->header.length);
    in_flight_bytes -= wire->header.length;
  }
  wire_open(wire, wire->sock);
}

static void attach(struct msghdr *message, union rights *rights, int descriptor) {
  memset(rights, 0, sizeof *rights);
  message->msg_control = rights->bytes;
  message->msg_controllen = CMSG_SPACE(sizeof descriptor);
  struct cmsghdr *part = CMSG_FIRSTHDR(message);
  part->cmsg_level = SOL_SOCKET;
  part->cmsg_type = SCM_RIGHTS;
  part->cmsg_len = CMSG_LEN(sizeof descriptor);
  memcpy(CMSG_DATA(part), &descriptor, sizeof descriptor);
}

static ssize_t send_once(int sock, const struct msghdr *message) {
  ssize_t sent;
  do sent = sendmsg(sock, message, MSG_DONTWAIT | MSG_NOSIGNAL);
  while (sent < 0 && errno == EINTR);
  return sent;
}

bool wire_send(const struct wire *wire, uint8_t type, const uint32_t *words, uint32_t count, int descriptor) {
  uint8_t frame[HEADER_BYTES + MAX_ANSWER_BYTES];
  put_header(frame, type, count * 4);
  for (uint32_t i = 0; i < count; i++) put_u32(frame + HEADER_BYTES + i * 4, words[i]);
  struct iovec part = {.iov_base = frame, .iov_len = HEADER_BYTES + count * 4};
  struct msghdr message = {.msg_iov = &part, .msg_iovlen = 1};
  union rights rights;
  if (descriptor >= 0) attach(&message, &rights, descriptor);
  /* A connection gets three small frames in its life, far less than the smallest socket buffer: if they do not fit, the
     peer does not read, and is dropped. So no queue is needed and nothing here can block. */
  return send_once(wire->sock, &message) == (ssize_t)part.iov_len;
}

static bool wait_for_room(int sock, int64_t until) {
  int64_t left = until - now_ms();
  struct pollfd wanted = {.fd = sock, .events = POLLOUT};
  return left > 0 && poll(&wanted, 1, (int)left) > 0;
}

bool wire_send_large(const struct wire *wire, uint8_t type, uint8_t *frame, uint32_t length) {
  put_header(frame, type, length);
  struct iovec part = {.iov_base = frame, .iov_len = HEADER_BYTES + length};
  struct msghdr message = {.msg_iov = &part, .msg_iovlen = 1};
  int64_t until = now_ms() + SEND_MS;
  for (;;) {
    ssize_t sent = send_once(wire->sock, &message);
    if (sent < 0 && errno != EAGAIN && errno != EWOULDBLOCK) return false;
    if (sent > 0) {
      part.iov_base = (uint8_t *)part.iov_base + sent;
      part.iov_len -= (size_t)sent;
    }
    if (part.iov_len == 0) return true;
    if (!wait_for_room(wire->sock, until)) return false;
  }
}

/* What comes without exactly one descriptor is dropped. */
int wire_take_connection(int sock) {
  struct wire wire;
  uint8_t byte;
  wire_open(&wire, sock);
  enum wire_result result = receive(&wire, &byte, sizeof byte);
  if (result == WIRE_FRAME && wire.descriptor_count == 1) return wire.descriptors[0];
  for (int i = 0; i < wire.descriptor_count; i++) close(wire.descriptors[i]);
  errno = result == WIRE_END ? EINVAL : EAGAIN;
  return -1;
}
