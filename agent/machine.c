#define _GNU_SOURCE
#include "machine.h"

#include <errno.h>
#include <fcntl.h>
#include <net/if.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/mount.h>
#include <sys/reboot.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>

#include "files.h"
#include "system.h"

#define PORTS "/sys/class/virtio-ports"
#define GROUP "/cgroup/job"

enum { PATH_BYTES = 320, LIST_BYTES = 4096, LINE_BYTES = 4096, VALUE_BYTES = 32 };
/* The port's name comes in a message of its own, some time after the port. */
enum { PORT_MS = 10000, LOOK_AGAIN_NS = 2000000 };
enum { VSOCK_PORT = 1, VSOCK_HOST = 2 };

/* linux/random.h and linux/vm_sockets.h, which musl does not bring */
struct pool_info {
  int entropy_count; /* in bits */
  int size;
  uint8_t bytes[LINK_ENTROPY_BYTES];
};
#define ADD_ENTROPY _IOW('R', 0x03, int[2])
#define RESEED_GENERATOR _IO('R', 0x07)
struct vsock_address {
  uint16_t family;
  uint16_t reserved;
  uint32_t port;
  uint32_t cid;
  uint8_t rest[4];
};

/* getdents64(2) */
struct directory_entry {
  uint64_t inode;
  int64_t offset;
  uint16_t length;
  uint8_t type;
  char name[];
};

static const char *join(char room[PATH_BYTES], const char *a, const char *b, const char *c) {
  struct text text;
  text_begin(&text, room, PATH_BYTES);
  text_add(&text, a);
  text_add(&text, b);
  text_add(&text, c);
  return text.fits ? room : ""; /* which no call finds */
}

static bool mount_at(const char *type, const char *at, unsigned long flags) {
  if (mkdir(at, 0755) != 0 && errno != EEXIST) return false;
  return mount(type, at, type, MS_NOSUID | MS_NOEXEC | flags, NULL) == 0;
}

bool mount_own(void) {
  return mount_at("proc", "/proc", MS_NODEV) && mount_at("sysfs", "/sys", MS_NODEV | MS_RDONLY) &&
         mount_at("devtmpfs", "/dev", 0);
}

/* Modules */

static bool load_module(const char *name) {
  char path[PATH_BYTES];
  int file = open(join(path, "/modules/", name, ""), O_RDONLY | O_CLOEXEC);
  if (file < 0) return false;
  bool good = syscall(SYS_finit_module, file, "", 0) == 0;
  int error = errno;
  close(file);
  unlink(path); /* memory that nobody needs any more */
  errno = error;
  return good;
}

bool load_modules(void) {
  char list[LIST_BYTES];
  ssize_t count = read_file("/modules.list", list, sizeof list);
  if (count < 0) return errno == ENOENT;
  char *rest = list;
  for (char *name = strsep(&rest, "\n"); name; name = strsep(&rest, "\n")) {
    if (*name != '\0' && !load_module(name)) return false;
  }
  unlink("/modules.list");
  rmdir("/modules");
  return write_file("/proc/sys/kernel/modules_disabled", "1");
}

/* The link */

static bool is_link(const char *port) {
  char path[PATH_BYTES];
  char name[VALUE_BYTES];
  return read_file(join(path, PORTS "/", port, "/name"), name, sizeof name) > 0 && strcmp(name, "link\n") == 0;
}

/* Open the link if it is among these entries of the directory of ports. */
static int open_port(const char *entries, size_t length) {
  for (size_t at = 0; at < length;) {
    const struct directory_entry *entry = (const struct directory_entry *)(entries + at);
    char path[PATH_BYTES];
    if (entry->name[0] != '.' && is_link(entry->name)) {
      return open(join(path, "/dev/", entry->name, ""), O_RDWR | O_CLOEXEC);
    }
    at += entry->length;
  }
  errno = ENOENT;
  return -1;
}

/* -1 with ENOENT: it is not there yet. No readdir, for the sake of which libc would bring its heap along. */
static int find_port(void) {
  static _Alignas(struct directory_entry) char entries[LIST_BYTES];
  int ports = open(PORTS, O_RDONLY | O_DIRECTORY | O_CLOEXEC);
  if (ports < 0) return -1;
  long length = syscall(SYS_getdents64, ports, entries, sizeof entries);
  int error = errno;
  close(ports);
  errno = error;
  return length < 0 ? -1 : open_port(entries, (size_t)length);
}

static int wait_for_port(void) {
  static const struct timespec pause = {.tv_nsec = LOOK_AGAIN_NS};
  for (int64_t until = now_ms() + PORT_MS;;) {
    int port = find_port();
    if (port >= 0 || errno != ENOENT || now_ms() >= until) return port;
    nanosleep(&pause, NULL);
  }
}

/* Only the host's own connection will do: a guest can reach its own port as well. Nobody else runs yet, but the port is
   closed again before anybody does. */
static int accept_host(int listener) {
  for (;;) {
    struct vsock_address peer;
    socklen_t size = sizeof peer;
    int sock = accept4(listener, (struct sockaddr *)&peer, &size, SOCK_CLOEXEC);
    if (sock < 0 && errno == EINTR) continue;
    if (sock < 0 || peer.cid == VSOCK_HOST) return sock;
    close(sock);
  }
}

static int wait_for_host(void) {
  const struct vsock_address ours = {.family = AF_VSOCK, .port = VSOCK_PORT, .cid = UINT32_MAX /* any */};
  int listener = socket(AF_VSOCK, SOCK_STREAM | SOCK_CLOEXEC, 0);
  if (listener < 0) return -1;
  int sock = -1;
  if (bind(listener, (const struct sockaddr *)&ours, sizeof ours) == 0 && listen(listener, 1) == 0) {
    sock = accept_host(listener);
  }
  int error = errno;
  close(listener);
  errno = error;
  return sock;
}

static bool wants_vsock(void) {
  char line[LINE_BYTES];
  if (read_file("/proc/cmdline", line, sizeof line) <= 0) return false;
  char *rest = line;
  for (const char *word = strsep(&rest, " \n"); word; word = strsep(&rest, " \n")) {
    if (strcmp(word, "ringfence.link=vsock") == 0) return true;
  }
  return false;
}

int open_link(void) {
  return wants_vsock() ? wait_for_host() : wait_for_port();
}

/* The kernel */

bool set_clock(uint64_t realtime_ns) {
  const struct timespec now = {
      .tv_sec = (time_t)(realtime_ns / 1000000000),
      .tv_nsec = (long)(realtime_ns % 1000000000),
  };
  return clock_settime(CLOCK_REALTIME, &now) == 0;
}

bool reseed(const uint8_t entropy[LINK_ENTROPY_BYTES]) {
  struct pool_info info = {.entropy_count = LINK_ENTROPY_BYTES * 8, .size = LINK_ENTROPY_BYTES};
  memcpy(info.bytes, entropy, LINK_ENTROPY_BYTES);
  int device = open("/dev/urandom", O_RDWR | O_CLOEXEC);
  if (device < 0) return false;
  /* Mixed in is not yet used: the generator has a key of its own, which it changes now and not in a minute. */
  bool good = ioctl(device, ADD_ENTROPY, &info) == 0 && ioctl(device, RESEED_GENERATOR) == 0;
  int error = errno;
  close(device);
  explicit_bzero(&info, sizeof info);
  errno = error;
  return good;
}

bool set_hostname(const char *name) {
  return sethostname(name, strlen(name)) == 0;
}

bool set_sysctl(const char *name, const char *value) {
  char path[PATH_BYTES];
  join(path, "/proc/sys/", name, "");
  for (char *at = path + strlen("/proc/sys/"); *at != '\0'; at++) {
    if (*at == '.') *at = '/';
  }
  return write_file(path, value);
}

bool raise_loopback(void) {
  struct ifreq request = {.ifr_name = "lo"};
  int sock = socket(AF_INET, SOCK_DGRAM | SOCK_CLOEXEC, 0);
  if (sock < 0) return false;
  request.ifr_flags = IFF_UP | IFF_RUNNING;
  bool good = ioctl(sock, SIOCSIFFLAGS, &request) == 0;
  int error = errno;
  close(sock);
  errno = error;
  return good;
}

/* The control group */

static bool set_limit(const char *path, uint64_t limit) {
  char value[VALUE_BYTES];
  struct text text;
  text_begin(&text, value, sizeof value);
  if (limit == NO_LIMIT) {
    text_add(&text, "max");
  } else {
    text_add_number(&text, limit, 10);
  }
  return write_file(path, value);
}

static bool limit_swap(uint64_t bytes) {
  /* A kernel that cannot swap has no such file, and nothing to keep the job from. */
  return set_limit(GROUP "/memory.swap.max", bytes) || errno == ENOENT;
}

int make_group(const struct setup *setup) {
  if (!mount_at("cgroup2", "/cgroup", MS_NODEV) || !write_file("/cgroup/cgroup.subtree_control", "+memory +pids") ||
      mkdir(GROUP, 0755) != 0)
    return -1;
  if (!set_limit(GROUP "/memory.max", setup->memory_bytes) || !limit_swap(setup->swap_bytes) ||
      !set_limit(GROUP "/pids.max", setup->pids))
    return -1;
  return open(GROUP "/memory.events", O_RDONLY | O_CLOEXEC);
}

bool enter_group(void) {
  return write_file(GROUP "/cgroup.procs", "0");
}

_Noreturn void power_off(void) {
  reboot(RB_AUTOBOOT); /* to VMMs that know no other way, a restart is the end */
  reboot(RB_POWER_OFF);
  _exit(EXIT_OWN_FAILURE); /* init's end stops the kernel */
}
