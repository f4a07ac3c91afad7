#define _GNU_SOURCE
#include "pack.h"

#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <unistd.h>

#include "files.h"
#include "tar.h"

enum { MOST_DEPTH = 256, LIST_BYTES = 1 << 12, PIECE_BYTES = 1 << 16 };
enum { PERMISSIONS = 0777, WHILE_UNPACKED = 0700, NOT_DESCRIBED = 0755 };
enum { LOOK = O_RDONLY | O_NONBLOCK | O_NOCTTY | O_CLOEXEC, DIRECTORY = O_RDONLY | O_DIRECTORY | O_NOFOLLOW | O_CLOEXEC };

static struct tar_entry entry;
static uint8_t piece[PIECE_BYTES];
static int status = PACK_ALL;

/* "ERRNO PATH" and a NUL. */
static void complain(int error, const char *path) {
  char room[TAR_PATH_BYTES + 16];
  struct text text;
  text_begin(&text, room, sizeof room);
  text_add_number(&text, (uint64_t)error, 10);
  text_add(&text, " ");
  text_add(&text, path);
  if (write(2, room, text.used + 1) < 0) status = PACK_FAILED;
}

static void leave_out(int error, const char *path) {
  complain(error, path);
  if (status == PACK_ALL) status = PACK_SOME;
}

static _Noreturn void fail(int error, const char *path) {
  complain(error, path);
  _exit(PACK_FAILED);
}

static bool write_all(int file, const uint8_t *bytes, size_t length) {
  while (length > 0) {
    ssize_t written = write(file, bytes, length);
    if (written < 0 && errno == EINTR) continue;
    if (written <= 0) return false;
    bytes += written;
    length -= (size_t)written;
  }
  return true;
}

/* Packing */

/* The name in the archive of what is being packed. */
static char path[TAR_PATH_BYTES] = ".";
static size_t path_length = 1;

static void put(const uint8_t *bytes, size_t length) {
  if (!write_all(1, bytes, length)) fail(errno, path);
}

static void put_zeros(uint64_t count) {
  memset(piece, 0, count < sizeof piece ? (size_t)count : sizeof piece);
  while (count > 0) {
    size_t part = count < sizeof piece ? (size_t)count : sizeof piece;
    put(piece, part);
    count -= part;
  }
}

static void put_entry(enum tar_kind kind, const struct stat *about, uint64_t size) {
  static uint8_t head[TAR_HEAD_BYTES];
  entry.kind = (uint8_t)kind;
  entry.mode = about->st_mode & PERMISSIONS;
  entry.mtime = about->st_mtime > 0 ? (uint64_t)about->st_mtime : 0;
  entry.size = size;
  if (kind != TAR_SYMLINK) entry.link[0] = '\0';
  memcpy(entry.name, path, path_length + 1);
  put(head, tar_put(head, &entry));
}

/* As much as the header has said, whatever happens to the file meanwhile. */
static void put_content(int file, uint64_t size) {
  uint64_t left = size;
  while (left > 0) {
    ssize_t count = read(file, piece, left < sizeof piece ? (size_t)left : sizeof piece);
    if (count < 0 && errno == EINTR) continue;
    if (count <= 0) {
      leave_out(count < 0 ? errno : EIO, path); /* it has shrunk */
      break;
    }
    put(piece, (size_t)count);
    left -= (uint64_t)count;
  }
  put_zeros(left + tar_padded(size) - size);
}

static void pack_file(int parent, const char *name, int follow) {
  struct stat about;
  int file = openat(parent, name, LOOK | follow);
  if (file < 0 || fstat(file, &about) != 0) leave_out(errno, path);
  else if (!S_ISREG(about.st_mode)) leave_out(EBUSY, path); /* something else has taken its name */
  else {
    put_entry(TAR_FILE, &about, (uint64_t)about.st_size);
    put_content(file, (uint64_t)about.st_size);
  }
  if (file >= 0) close(file);
}

static void pack_symlink(int parent, const char *name, const struct stat *about) {
  ssize_t length = readlinkat(parent, name, entry.link, sizeof entry.link - 1);
  if (length <= 0) {
    leave_out(length < 0 ? errno : ENOENT, path);
    return;
  }
  entry.link[length] = '\0';
  put_entry(TAR_SYMLINK, about, 0);
}

static void pack_directory(int parent, const char *name, int follow, int depth);

static void pack_one(int parent, const char *name, bool follow, int depth) {
  struct stat about;
  int no_follow = follow ? 0 : O_NOFOLLOW;
  if (fstatat(parent, name, &about, follow ? 0 : AT_SYMLINK_NOFOLLOW) != 0) {
    if (depth == 0) fail(errno, name);
    leave_out(errno, path);
  } else if (S_ISREG(about.st_mode)) {
    pack_file(parent, name, no_follow);
  } else if (S_ISDIR(about.st_mode)) {
    pack_directory(parent, name, no_follow, depth);
  } else if (S_ISLNK(about.st_mode)) {
    pack_symlink(parent, name, &about);
  } else {
    leave_out(0, path);
  }
}

static void pack_below(int directory, const char *name, int depth) {
  size_t length = strlen(name);
  size_t before = path_length;
  if (path_length + 1 + length >= sizeof path || depth >= MOST_DEPTH) {
    leave_out(ENAMETOOLONG, path);
    return;
  }
  path[path_length] = '/';
  memcpy(path + path_length + 1, name, length + 1);
  path_length += 1 + length;
  pack_one(directory, name, false, depth + 1);
  path_length = before;
  path[path_length] = '\0';
}

struct item { /* getdents64(2) */
  uint64_t inode;
  int64_t offset;
  uint16_t length;
  uint8_t type;
  char name[];
};

static bool is_own(const char *name) {
  return strcmp(name, ".") == 0 || strcmp(name, "..") == 0;
}

static void pack_directory(int parent, const char *name, int follow, int depth) {
  union {
    struct item align;
    char bytes[LIST_BYTES];
  } list;
  struct stat about;
  int directory = openat(parent, name, O_RDONLY | O_DIRECTORY | O_CLOEXEC | follow);
  if (directory < 0 || fstat(directory, &about) != 0) {
    leave_out(errno, path);
    if (directory >= 0) close(directory);
    return;
  }
  put_entry(TAR_DIRECTORY, &about, 0);
  long count;
  while ((count = syscall(SYS_getdents64, directory, &list, sizeof list)) > 0) {
    for (long at = 0; at < count;) {
      const struct item *item = (const void *)(list.bytes + at);
      if (!is_own(item->name)) pack_below(directory, item->name, depth);
      at += item->length;
    }
  }
  if (count < 0) leave_out(errno, path);
  close(directory);
}

int pack(char **argv) {
  pack_one(AT_FDCWD, argv[0], strcmp(argv[1], "1") == 0, 0);
  put_zeros((uint64_t)2 * TAR_BLOCK_BYTES);
  return status;
}

/* Unpacking */

/* Directories that were made and are not left yet, the outermost first: they get their modes when nothing more is put
   into them. Each one's path is the beginning of `open_path`. */
static struct {
  size_t length;
  uint32_t mode;
  uint64_t mtime;
} open_directories[MOST_DEPTH + 1];
static int open_count;
static char open_path[TAR_PATH_BYTES];

static int top = -1;      /* where "." is to be made, and its name there */
static char top_name[NAME_MAX + 1];
static bool only_directory; /* which "." has to be */
static int root = -1;     /* "." once it is there */

static bool read_all(uint8_t *bytes, size_t length) {
  while (length > 0) {
    ssize_t count = read(0, bytes, length);
    if (count < 0 && errno == EINTR) continue;
    if (count <= 0) return false;
    bytes += count;
    length -= (size_t)count;
  }
  return true;
}

static void get(uint8_t *bytes, size_t length, const char *what) {
  if (!read_all(bytes, length)) fail(EPIPE, what);
}

/* The next part of a path without "." and empty ones; false at its end. */
static bool next_part(const char **at, size_t *length) {
  do {
    while (**at == '/') ++*at;
    *length = strcspn(*at, "/");
    if (*length != 1 || **at != '.') return *length > 0;
    ++*at;
  } while (true);
}

/* Clean a name of the archive; "" is the top. */
static void clean(const char *name, char to[TAR_PATH_BYTES]) {
  size_t used = 0;
  size_t length;
  int depth = 0;
  for (const char *at = name; next_part(&at, &length); at += length) {
    bool climbs = length == 2 && memcmp(at, "..", 2) == 0;
    if (climbs || length > NAME_MAX || ++depth > MOST_DEPTH) fail(EINVAL, name);
    if (used > 0) to[used++] = '/';
    memmove(to + used, at, length); /* never longer than the name */
    used += length;
  }
  to[used] = '\0';
}

static bool step_into(int *here, const char *part, size_t length, bool make) {
  char name[NAME_MAX + 1];
  memcpy(name, part, length);
  name[length] = '\0';
  int below = openat(*here, name, DIRECTORY);
  if (below < 0 && errno == ENOENT && make && mkdirat(*here, name, NOT_DESCRIBED) == 0) {
    below = openat(*here, name, DIRECTORY);
  }
  int error = errno;
  close(*here);
  errno = error;
  *here = below;
  return below >= 0;
}

/* The directory that the first `length` bytes of a clean path name. -1 and errno. */
static int open_at(const char *clean_path, size_t length, bool make) {
  int here = fcntl(root, F_DUPFD_CLOEXEC, 0);
  const char *at = clean_path;
  const char *end = clean_path + length;
  while (here >= 0 && at < end) {
    size_t part = strcspn(at, "/");
    if (part > (size_t)(end - at)) part = (size_t)(end - at);
    if (!step_into(&here, at, part, make)) return -1;
    at += part;
    if (at < end) at++;
  }
  return here;
}

static bool set_times(int file, uint64_t mtime) {
  const struct timespec times[2] = {{.tv_nsec = UTIME_OMIT}, {.tv_sec = (time_t)mtime}};
  return futimens(file, times) == 0;
}

/* Is it the directory, or in it? */
static bool is_within(const char *clean_path, size_t length) {
  if (length == 0) return true;
  return strncmp(clean_path, open_path, length) == 0 && (clean_path[length] == '/' || clean_path[length] == '\0');
}

static void leave_directory(void) {
  open_count--;
  int directory = open_at(open_path, open_directories[open_count].length, false);
  bool good = directory >= 0 && fchmod(directory, open_directories[open_count].mode) == 0;
  if (!good || !set_times(directory, open_directories[open_count].mtime)) fail(errno, open_path);
  close(directory);
}

static void leave_directories(const char *clean_path) {
  while (open_count > 0 && !is_within(clean_path, open_directories[open_count - 1].length)) leave_directory();
}

static void note_directory(const char *clean_path) {
  size_t length = strlen(clean_path);
  memcpy(open_path, clean_path, length + 1);
  /* Somebody has removed it meanwhile, and it was made once more. */
  if (open_count > 0 && open_directories[open_count - 1].length == length) open_count--;
  open_directories[open_count].length = length;
  open_directories[open_count].mode = entry.mode;
  open_directories[open_count].mtime = entry.mtime;
  open_count++;
}

/* One that is there already stays as it is. */
static void make_directory_entry(int parent, const char *name, const char *clean_path) {
  struct stat about;
  if (mkdirat(parent, name, WHILE_UNPACKED) == 0) {
    note_directory(clean_path);
    return;
  }
  if (errno != EEXIST || fstatat(parent, name, &about, AT_SYMLINK_NOFOLLOW) != 0) fail(errno, entry.name);
  if (!S_ISDIR(about.st_mode)) fail(ENOTDIR, entry.name);
}

static bool take_content(int file) {
  for (uint64_t left = entry.size; left > 0;) {
    size_t part = left < sizeof piece ? (size_t)left : sizeof piece;
    errno = EPIPE;
    if (!read_all(piece, part) || !write_all(file, piece, part)) return false;
    left -= part;
  }
  errno = EPIPE;
  return read_all(piece, (size_t)(tar_padded(entry.size) - entry.size));
}

static void make_file_entry(int parent, const char *name) {
  int file = openat(parent, name, O_WRONLY | O_CREAT | O_EXCL | O_NOFOLLOW | O_CLOEXEC, WHILE_UNPACKED);
  if (file < 0) fail(errno, entry.name);
  if (take_content(file) && fchmod(file, entry.mode) == 0 && set_times(file, entry.mtime) && close(file) == 0) return;
  int error = errno;
  unlinkat(parent, name, 0); /* half of it is none */
  fail(error, entry.name);
}

static void make_hard_link(int parent, const char *name) {
  static char target[TAR_PATH_BYTES];
  clean(entry.link, target);
  const char *last = strrchr(target, '/');
  int from = open_at(target, last ? (size_t)(last - target) : 0, false);
  if (from < 0 || linkat(from, last ? last + 1 : target, parent, name, 0) != 0) fail(errno, entry.name);
  close(from);
}

static void make_entry(int parent, const char *name, const char *clean_path) {
  if (entry.kind == TAR_DIRECTORY) {
    make_directory_entry(parent, name, clean_path);
    return;
  }
  if (unlinkat(parent, name, 0) != 0 && errno != ENOENT) fail(errno, entry.name);
  if (entry.kind == TAR_FILE) make_file_entry(parent, name);
  else if (entry.kind == TAR_HARD_LINK) make_hard_link(parent, name);
  else if (symlinkat(entry.link, parent, name) != 0) fail(errno, entry.name);
}

static void make_top(void) {
  if (root < 0) {
    if (entry.kind == TAR_HARD_LINK) fail(EINVAL, entry.name);
    if (only_directory && entry.kind != TAR_DIRECTORY) fail(ENOTDIR, top_name);
    make_entry(top, top_name, "");
    if (entry.kind != TAR_DIRECTORY) return;
    root = openat(top, top_name, DIRECTORY);
    if (root < 0) fail(errno, top_name);
  } else if (entry.kind != TAR_DIRECTORY) {
    fail(ENOTDIR, entry.name);
  }
}

static void unpack_entry(void) {
  static char clean_path[TAR_PATH_BYTES];
  clean(entry.name, clean_path);
  if (!clean_path[0]) {
    make_top();
    return;
  }
  if (root < 0) fail(only_directory ? ENOENT : EINVAL, ".");
  leave_directories(clean_path);
  const char *last = strrchr(clean_path, '/');
  int parent = open_at(clean_path, last ? (size_t)(last - clean_path) : 0, true);
  if (parent < 0) fail(errno, entry.name);
  make_entry(parent, last ? last + 1 : clean_path, clean_path);
  close(parent);
}

/* Find where "." goes. */
static void find_top(char *to, const char *name) {
  int directory = open(to, O_RDONLY | O_DIRECTORY | O_CLOEXEC);
  if (directory >= 0) {
    if (!name[0]) root = directory;
    else top = directory;
  } else if (errno != ENOENT && errno != ENOTDIR) {
    fail(errno, to);
  } else {
    size_t length = strlen(to);
    while (length > 1 && to[length - 1] == '/') {
      to[--length] = '\0';
      only_directory = true;
    }
    char *last = strrchr(to, '/');
    name = last + 1;
    top = open(last == to ? "/" : (*last = '\0', to), O_RDONLY | O_DIRECTORY | O_CLOEXEC);
    if (top < 0) fail(errno, to);
  }
  if (strlen(name) > NAME_MAX) fail(ENAMETOOLONG, name);
  memcpy(top_name, name, strlen(name) + 1);
}

int unpack(char **argv) {
  static uint8_t block[TAR_BLOCK_BYTES];
  static uint8_t records[TAR_EXTENDED_BYTES];
  if (argv[0][0] != '/' || strchr(argv[1], '/')) fail(EINVAL, argv[0]);
  find_top(argv[0], argv[1]);
  for (tar_begin(&entry);;) {
    get(block, sizeof block, ".");
    if (tar_is_end(block)) break;
    if (!tar_take_header(block, &entry)) fail(EINVAL, entry.name);
    if (entry.kind == TAR_EXTENDED) {
      size_t length = (size_t)entry.size;
      entry.size = 0;
      get(records, (size_t)tar_padded(length), ".");
      if (!tar_take_records(records, length, &entry)) fail(EINVAL, entry.name);
      continue;
    }
    unpack_entry();
    tar_begin(&entry);
  }
  while (open_count > 0) leave_directory();
  return status;
}
