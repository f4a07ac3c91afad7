/* Archives: no bytes make the reader read or write where it may not, and what it takes comes out of the writer again. */
#include <stdlib.h>
#include <string.h>

#include "tar.h"

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size);

static struct tar_entry entry;
static struct tar_entry again;

static void check(bool holds) {
  if (!holds) abort();
}

/* Of its own, so that a byte too far is found. */
static uint8_t *copy_of(const uint8_t *data, size_t size) {
  uint8_t *copy = malloc(size ? size : 1);
  if (!copy) abort();
  memcpy(copy, data, size);
  return copy;
}

static bool take_records(const uint8_t *data, size_t size) {
  uint8_t *records = copy_of(data, size);
  bool good = tar_take_records(records, size, &entry);
  free(records);
  return good;
}

static void check_entry(void) {
  uint8_t *head = malloc(TAR_HEAD_BYTES);
  if (!head) abort();
  check(entry.mode <= 0777 && entry.name[0] && strlen(entry.name) < TAR_PATH_BYTES);
  size_t bytes = tar_put(head, &entry);
  check(bytes % TAR_BLOCK_BYTES == 0 && bytes <= TAR_HEAD_BYTES);
  tar_begin(&again);
  check(tar_take_header(head, &again));
  if (again.kind == TAR_EXTENDED) {
    size_t length = (size_t)again.size;
    again.size = 0;
    check(tar_take_records(head + TAR_BLOCK_BYTES, length, &again));
    check(tar_take_header(head + bytes - TAR_BLOCK_BYTES, &again));
  }
  check(again.kind == entry.kind && again.mode == entry.mode && again.size == entry.size);
  check(strcmp(again.name, entry.name) == 0 && strcmp(again.link, entry.link) == 0);
  free(head);
}

/* No input would get any further otherwise. */
static void set_checksum(uint8_t *block) {
  unsigned sum = 0;
  memset(block + 148, ' ', 8);
  for (int i = 0; i < TAR_BLOCK_BYTES; i++) sum += block[i];
  for (int i = 5; i >= 0; i--, sum >>= 3) block[148 + i] = (uint8_t)('0' + (sum & 7));
}

/* Headers one after the other, as pack.c reads them; content is left out. */
int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size) {
  tar_begin(&entry);
  while (size >= TAR_BLOCK_BYTES) {
    uint8_t *block = copy_of(data, TAR_BLOCK_BYTES);
    bool good = !tar_is_end(block);
    set_checksum(block);
    good = good && tar_take_header(block, &entry);
    free(block);
    if (!good) return 0;
    data += TAR_BLOCK_BYTES;
    size -= TAR_BLOCK_BYTES;
    if (entry.kind != TAR_EXTENDED) {
      check_entry();
      tar_begin(&entry);
      continue;
    }
    size_t length = (size_t)entry.size;
    check(length <= TAR_EXTENDED_BYTES);
    entry.size = 0;
    if (tar_padded(length) > size || !take_records(data, length)) return 0;
    data += tar_padded(length);
    size -= (size_t)tar_padded(length);
  }
  return 0;
}
