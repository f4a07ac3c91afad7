/* Files and their names, as the guest's set-up needs them. All return false or -1 with errno on failure. */
#ifndef RINGFENCE_FILES_H
#define RINGFENCE_FILES_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include <sys/types.h>

/* A string that is put together in a buffer: always ended by a NUL, and `fits` as long as nothing had to be left
   out. */
struct text {
  char *room;
  size_t size;
  size_t used;
  bool fits;
};

void text_begin(struct text *text, char *room, size_t size);
void text_add(struct text *text, const char *words);
void text_add_number(struct text *text, uint64_t number, unsigned base);

/* "/proc/self/fd/N": the way to name what a descriptor stands for to mount(2). */
enum { LINK_BYTES = 32 };
const char *descriptor_link(int descriptor, char room[LINK_BYTES]);

/* Write `content` to a file that is there, in one write as the kernel's own files want it. */
bool write_file(const char *path, const char *content);

/* Read at most `size` - 1 bytes, and put a NUL behind them. */
ssize_t read_file(const char *path, char *room, size_t size);

/* Open what `path` (absolute) names below the directory `root`; no link on the way is followed. */
int open_below(int root, const char *path, int flags);

/* Make the directory that `path` names below `root`, those on the way with it. One that is there already stays as it
   is; a link on the way is an error. */
bool make_directory(int root, const char *path, uint32_t mode, uint32_t uid, uint32_t gid);

/* Make a file or a symbolic link that must not be there yet, and the directories on the way. Both belong to root. */
bool make_file(int root, const char *path, const char *content, uint32_t mode);
bool make_link(int root, const char *path, const char *target);
bool copy_file(int root, const char *path, const char *source, uint32_t mode);

#endif
