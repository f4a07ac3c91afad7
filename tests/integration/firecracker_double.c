/* In Firecracker's place in its ring: says what it finds there, and has an ordinary agent behind a vsock's socket.

   It makes no machine: what it shows is that the ring has all that the machine's document names, for whom it is, and no
   more. With STATUS it says a line of a log and exits so. */
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/un.h>
#include <unistd.h>

#ifndef STATUS
#define STATUS 0
#endif

static char document[1 << 16];

/* The text after `"name":"`, copied; NULL: there is no more. */
static const char *value(const char **at, const char *name, char *copy) {
  const char *found = strstr(*at, name);
  if (!found) return NULL;
  found += strlen(name) + 3;
  size_t length = strcspn(found, "\"");
  memcpy(copy, found, length);
  copy[length] = '\0';
  *at = found + length;
  return copy;
}

static void can(const char *what, const char *path, int flags) {
  int file = open(path, flags | O_CLOEXEC, 0600);
  printf("%s %s: %s\n", what, path, file < 0 ? "no" : "yes");
  if (file >= 0) close(file);
}

static void look(void) {
  char path[256];
  const char *at = document;
  while (value(&at, "path_on_host", path)) {
    can("read", path, O_RDONLY);
    can("write", path, O_RDWR);
  }
  can("read", "/kernel", O_RDONLY);
  can("read", "/initrd", O_RDONLY);
  can("write", "/kernel", O_RDWR);
  can("write", "/machine.json", O_RDWR);
  can("write", "/run/metrics", O_RDWR);
  can("make", "/new", O_RDWR | O_CREAT);
  can("make", "/disks/new", O_RDWR | O_CREAT);
  can("open", "/dev/kvm", O_RDWR);
}

static int accepted(int listener) {
  int sock = accept(listener, NULL, NULL);
  char line[32] = "";
  for (size_t i = 0; i < sizeof line - 1 && read(sock, line + i, 1) == 1 && line[i] != '\n'; i++) continue;
  printf("asked: %s", line);
  fflush(stdout);
  return sock;
}

int main(int argc, char **argv) {
  if (STATUS) {
    printf("2026-01-31T12:00:00.0 [anonymous-instance:main:ERROR] the disk is of glass\n");
    fflush(stdout);
    return STATUS;
  }
  int file = open(argc == 4 ? argv[3] : "", O_RDONLY | O_CLOEXEC);
  if (file < 0 || read(file, document, sizeof document - 1) <= 0) return 1;
  for (int i = 1; i < argc; i++) printf("word %s\n", argv[i]);
  look();
  struct sockaddr_un address = {.sun_family = AF_UNIX};
  const char *at = document;
  value(&at, "uds_path", address.sun_path);
  int listener = socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0);
  if (bind(listener, (const struct sockaddr *)&address, sizeof address) != 0 || listen(listener, 8) != 0) return 2;
  close(accepted(listener)); /* as long as nobody in the guest listens */
  int sock = accepted(listener);
  static const char answer[] = "OK 1073741824\n";
  char number[16];
  if (write(sock, answer, sizeof answer - 1) < 0) return 3;
  snprintf(number, sizeof number, "%d", sock);
  char *back[] = {"/.ringfence", "--back", number, NULL};
  execv(back[0], back);
  return 4;
}
