/* Source: https://github.com/firecracker-microvm/firecracker/blob/main/docs/vsock.md, "Host-Initiated Connections".

   The socket is there once the VMM has made its devices. It takes connections then, but the guest refuses them until
   its init listens, and the VMM closes them: that is no failure, and is tried again until the guest is there. A guest
   that never comes is the launcher's business, whose clock does not stop. */
#define _GNU_SOURCE
#include "dial.h"

#include <errno.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/un.h>
#include <unistd.h>

enum { AGAIN_MS = 5 };
static const char request[] = "CONNECT 1\n"; /* the port is LINK.md's */

bool dial_open(struct dial *dial, const char *path) {
  *dial = (struct dial){.path = path, .sock = -1};
  return *path == '/' && strlen(path) < sizeof((struct sockaddr_un *)0)->sun_path;
}

static enum dialled try_later(struct dial *dial, int64_t now) {
  if (dial->sock >= 0) close(dial->sock);
  dial->sock = -1;
  dial->again_at = now + AGAIN_MS;
  return DIAL_WAIT;
}

static enum dialled give_up(struct dial *dial) {
  if (dial->sock >= 0) close(dial->sock);
  dial->sock = -1;
  dial->again_at = INT64_MAX;
  return DIAL_BAD;
}

/* Nobody has made it yet, nobody listens yet, or too many wait already. */
static bool may_come(int error) {
  return error == ENOENT || error == ECONNREFUSED || error == EAGAIN || error == EINTR;
}

static enum dialled call(struct dial *dial, int64_t now) {
  struct sockaddr_un address = {.sun_family = AF_UNIX};
  strcpy(address.sun_path, dial->path); /* dial_open has measured it */
  dial->sock = socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC | SOCK_NONBLOCK, 0);
  if (dial->sock < 0) return give_up(dial);
  if (connect(dial->sock, (const struct sockaddr *)&address, sizeof address) != 0) {
    return may_come(errno) ? try_later(dial, now) : give_up(dial);
  }
  if (send(dial->sock, request, sizeof request - 1, MSG_NOSIGNAL) != (ssize_t)sizeof request - 1) {
    return try_later(dial, now);
  }
  dial->length = 0;
  dial->again_at = INT64_MAX;
  return DIAL_WAIT;
}

/* "OK 1073741824\n" */
static bool is_good(const struct dial *dial) {
  if (dial->length < 5 || memcmp(dial->answer, "OK ", 3) != 0) return false;
  for (size_t i = 3; i < dial->length - 1; i++) {
    if (dial->answer[i] < '0' || dial->answer[i] > '9') return false;
  }
  return true;
}

/* Byte by byte: what follows the line is the guest's. */
static enum dialled hear(struct dial *dial, int64_t now) {
  while (dial->length < DIAL_ANSWER_BYTES) {
    char *at = dial->answer + dial->length;
    ssize_t count = read(dial->sock, at, 1);
    if (count < 0 && errno == EINTR) continue;
    if (count < 0 && errno == EAGAIN) return DIAL_WAIT;
    if (count <= 0) return try_later(dial, now);
    dial->length++;
    if (*at == '\n') return is_good(dial) ? DIAL_DONE : give_up(dial);
  }
  return give_up(dial);
}

enum dialled dial_turn(struct dial *dial, int64_t now) {
  enum dialled result = DIAL_WAIT;
  if (dial->sock < 0 && now >= dial->again_at) result = call(dial, now);
  return result == DIAL_WAIT && dial->sock >= 0 ? hear(dial, now) : result;
}
