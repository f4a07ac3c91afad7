#define _GNU_SOURCE
#include "files.h"

#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <unistd.h>

/* linux/openat2.h, which musl does not bring */
enum { RESOLVE_NO_MAGICLINKS = 0x02, RESOLVE_NO_SYMLINKS = 0x04, RESOLVE_IN_ROOT = 0x10 };
enum { MOST_PATH_BYTES = 4096, COPY_BYTES = 1 << 16, ON_THE_WAY = 0755 };

void text_begin(struct text *text, char *room, size_t size) {
  *text = (struct text){.room = room, .size = size, .fits = true};
  room[0] = '\0';
}

void text_add(struct text *text, const char *words) {
  size_t length = strlen(words);
  size_t left = text->size - text->used - 1;
  if (length > left) {
    text->fits = false;
    length = left;
  }
  memcpy(text->room + text->used, words, length);
  text->used += length;
  text->room[text->used] = '\0';
}

void text_add_number(struct text *text, uint64_t number, unsigned base) {
  char digits[24];
  char *at = digits + sizeof digits - 1;
  *at = '\0';
  do *--at = (char)('0' + number % base);
  while (number /= base);
  text_add(text, at);
}

const char *descriptor_link(int descriptor, char room[LINK_BYTES]) {
  struct text text;
  text_begin(&text, room, LINK_BYTES);
  text_add(&text, "/proc/self/fd/");
  text_add_number(&text, (uint64_t)descriptor, 10);
  return room;
}

static bool write_all(int file, const char *bytes, size_t length) {
  while (length > 0) {
    ssize_t written = write(file, bytes, length);
    if (written < 0 && errno == EINTR) continue;
    if (written < 0) return false;
    bytes += written;
    length -= (size_t)written;
  }
  return true;
}

/* Close without losing the error that is to be reported. */
static bool closed(int file, bool good) {
  int error = errno;
  close(file);
  errno = error;
  return good;
}

bool write_file(const char *path, const char *content) {
  int file = open(path, O_WRONLY | O_CLOEXEC);
  if (file < 0) return false;
  return closed(file, write(file, content, strlen(content)) == (ssize_t)strlen(content));
}

ssize_t read_file(const char *path, char *room, size_t size) {
  int file = open(path, O_RDONLY | O_CLOEXEC);
  if (file < 0) return -1;
  ssize_t count = read(file, room, size - 1);
  room[count > 0 ? count : 0] = '\0';
  closed(file, true);
  return count;
}

int open_below(int root, const char *path, int flags) {
  const struct {
    uint64_t flags, mode, resolve;
  } how = {
      .flags = (uint64_t)(unsigned)flags | O_CLOEXEC,
      .resolve = RESOLVE_IN_ROOT | RESOLVE_NO_SYMLINKS | RESOLVE_NO_MAGICLINKS,
  };
  return (int)syscall(SYS_openat2, root, path, &how, sizeof how);
}

static bool own(int file, uint32_t mode, uint32_t uid, uint32_t gid) {
  return fchown(file, uid, gid) == 0 && fchmod(file, mode) == 0;
}

/* Open the directory `name` of `parent`, made if need be. -1 and errno on failure. */
static int make_one(int parent, const char *name, uint32_t mode, uint32_t uid, uint32_t gid) {
  bool made = mkdirat(parent, name, 0700) == 0;
  if (!made && errno != EEXIST) return -1;
  int directory = open_below(parent, name, O_RDONLY | O_DIRECTORY);
  if (directory < 0 || !made || own(directory, mode, uid, gid)) return directory;
  closed(directory, false);
  return -1;
}

/* Split the first part off `*path`: "a" of "/a/b", which leaves "/b". */
static bool next_part(const char **path, char part[NAME_MAX + 1]) {
  while (**path == '/') ++*path;
  size_t length = strcspn(*path, "/");
  if (length > NAME_MAX) {
    errno = ENAMETOOLONG;
    return false;
  }
  memcpy(part, *path, length);
  part[length] = '\0';
  *path += length;
  return true;
}

/* Open the directory above `path`, made if need be, and leave the last part of the name in `last`. */
static int open_parent(int root, const char *path, char last[NAME_MAX + 1]) {
  int here = fcntl(root, F_DUPFD_CLOEXEC, 0);
  while (here >= 0 && next_part(&path, last)) {
    if (*path == '\0') return here;
    int below = make_one(here, last, ON_THE_WAY, 0, 0);
    closed(here, true);
    here = below;
  }
  if (here >= 0) closed(here, false);
  return -1;
}

bool make_directory(int root, const char *path, uint32_t mode, uint32_t uid, uint32_t gid) {
  char name[NAME_MAX + 1];
  int parent = open_parent(root, path, name);
  if (parent < 0) return false;
  int directory = make_one(parent, name, mode, uid, gid);
  closed(parent, true);
  return directory >= 0 && closed(directory, true);
}

static int open_new(int root, const char *path) {
  char name[NAME_MAX + 1];
  int parent = open_parent(root, path, name);
  if (parent < 0) return -1;
  int file = openat(parent, name, O_WRONLY | O_CREAT | O_EXCL | O_NOFOLLOW | O_CLOEXEC, 0600);
  closed(parent, true);
  return file;
}

bool make_file(int root, const char *path, const char *content, uint32_t mode) {
  int file = open_new(root, path);
  if (file < 0) return false;
  return closed(file, write_all(file, content, strlen(content)) && own(file, mode, 0, 0));
}

bool make_link(int root, const char *path, const char *target) {
  char name[NAME_MAX + 1];
  int parent = open_parent(root, path, name);
  return parent >= 0 && closed(parent, symlinkat(target, parent, name) == 0);
}

static bool copy(int from, int to) {
  static char piece[COPY_BYTES];
  for (;;) {
    ssize_t count = read(from, piece, sizeof piece);
    if (count < 0 && errno == EINTR) continue;
    if (count <= 0) return count == 0;
    if (!write_all(to, piece, (size_t)count)) return false;
  }
}

bool copy_file(int root, const char *path, const char *source, uint32_t mode) {
  int from = open(source, O_RDONLY | O_CLOEXEC);
  if (from < 0) return false;
  int to = open_new(root, path);
  bool good = to >= 0 && copy(from, to) && own(to, mode, 0, 0);
  if (to >= 0) closed(to, good);
  return closed(from, good);
}
