#define _GNU_SOURCE
#include "report.h"

#include <errno.h>
#include <fcntl.h>
#include <stdbool.h>
#include <string.h>
#include <sys/prctl.h>
#include <sys/utsname.h>
#include <unistd.h>

enum { PATH_BYTES = 32 };

struct report {
  uint8_t *room;
  size_t size;
  size_t used;
};

/* Name and NUL of an item, whose text begins at `*text`. False: there is no room for that. */
static bool begin_item(const struct report *report, const char *name, size_t *text) {
  size_t bytes = strlen(name) + 1;
  if (bytes > report->size - report->used) return false;
  memcpy(report->room + report->used, name, bytes);
  *text = report->used + bytes;
  return true;
}

/* The text reaches from `text` to `end`. An item that does not end here is as if it had never begun. */
static void end_item(struct report *report, size_t text, size_t end) {
  if (end >= report->size || memchr(report->room + text, 0, end - text)) return;
  report->room[end] = 0;
  report->used = end + 1;
}

static void add_text(struct report *report, const char *name, const char *text) {
  size_t at;
  size_t bytes = strlen(text);
  if (!begin_item(report, name, &at) || bytes > report->size - at) return;
  memcpy(report->room + at, text, bytes);
  end_item(report, at, at + bytes);
}

/* A file that cannot be read to its end (a plain kernel shows some to nobody but root) or does not fit is left out. */
static void add_file(struct report *report, const char *name, int proc, const char *path) {
  size_t text;
  if (!begin_item(report, name, &text)) return;
  int file = openat(proc, path, O_RDONLY | O_NOFOLLOW | O_CLOEXEC);
  if (file < 0) return;
  size_t end = text;
  ssize_t count;
  do {
    count = read(file, report->room + end, report->size - end);
    if (count > 0) end += (size_t)count;
  } while ((count > 0 && end < report->size) || (count < 0 && errno == EINTR));
  close(file);
  if (count == 0) end_item(report, text, end);
}

/* "<pid>/<name>", the number written from its end. */
static const char *path_of(char path[PATH_BYTES], pid_t pid, const char *name) {
  size_t bytes = strlen(name) + 1;
  char *at = path + PATH_BYTES - bytes;
  memcpy(at, name, bytes);
  *--at = '/';
  do *--at = (char)('0' + pid % 10);
  while (pid /= 10);
  return at;
}

size_t report_write(uint8_t *room, size_t size, int proc, pid_t pid) {
  /* What may be long comes last, and takes no other's place. */
  static const char *const of_process[] = {"status", "limits", "uid_map", "gid_map", "net/dev", "mountinfo"};
  struct report report = {.room = room, .size = size};
  struct utsname names;
  int no_new_privileges = prctl(PR_GET_NO_NEW_PRIVS, 0, 0, 0, 0); /* a job inherits it, and cannot undo it */
  if (no_new_privileges >= 0) add_text(&report, "no_new_privileges", no_new_privileges ? "1" : "0");
  if (uname(&names) == 0) add_text(&report, "hostname", names.nodename);
  add_file(&report, "version", proc, "version");
  for (size_t i = 0; i < sizeof of_process / sizeof *of_process; i++) {
    char path[PATH_BYTES];
    add_file(&report, of_process[i], proc, path_of(path, pid, of_process[i]));
  }
  return report.used;
}
