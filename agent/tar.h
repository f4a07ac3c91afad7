/* Entries of a tar archive, as pack.c writes and reads them: ustar, with pax headers for what has no room there.
   Source: pax(1) of POSIX.1-2017. Nothing here does I/O. */
#ifndef RINGFENCE_TAR_H
#define RINGFENCE_TAR_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

enum { TAR_BLOCK_BYTES = 512, TAR_PATH_BYTES = 4096, TAR_EXTENDED_BYTES = 1 << 14 };
/* All that comes before an entry's content: pax header, its records, header. */
enum { TAR_HEAD_BYTES = 2 * TAR_BLOCK_BYTES + TAR_EXTENDED_BYTES };

enum tar_kind {
  TAR_FILE = '0',
  TAR_HARD_LINK = '1',
  TAR_SYMLINK = '2',
  TAR_DIRECTORY = '5',
  TAR_EXTENDED = 'x', /* not an entry: records about the one that follows */
};

struct tar_entry {
  uint8_t kind;
  uint32_t mode;  /* 0777 at the most */
  uint64_t size;  /* of a file's content, or of the records; else 0 */
  uint64_t mtime; /* seconds since 1970 */
  char name[TAR_PATH_BYTES];
  char link[TAR_PATH_BYTES]; /* target of a link */
  bool sized;                /* a record has said the size */
};

/* Write what comes before the content; returns how much of `room` (TAR_HEAD_BYTES) it takes, whole blocks. */
size_t tar_put(uint8_t *room, const struct tar_entry *entry);

/* Ready for the next entry: nothing is known of it. */
void tar_begin(struct tar_entry *entry);

/* Read records about the entry that follows; those that mean nothing here are skipped. False: they are broken, or a name
   is too long. */
bool tar_take_records(const uint8_t *records, size_t length, struct tar_entry *entry);

/* Read a header. What records have said stays. False: it is broken, or of a kind that is not known here. */
bool tar_take_header(const uint8_t block[TAR_BLOCK_BYTES], struct tar_entry *entry);

/* A block of zeros: the archive ends. */
bool tar_is_end(const uint8_t block[TAR_BLOCK_BYTES]);

/* `size` as whole blocks. */
uint64_t tar_padded(uint64_t size);

#endif
