#include "tar.h"

#include <string.h>

enum { NAME = 0, MODE = 100, UID = 108, GID = 116, SIZE = 124, MTIME = 136, CHECKSUM = 148, KIND = 156, LINK = 157 };
enum { MAGIC = 257, PREFIX = 345 };
enum { NAME_BYTES = 100, PREFIX_BYTES = 155, NUMBER_BYTES = 8, LONG_NUMBER_BYTES = 12 };
enum { ANY_MODE = 0777 };
/* What eleven octal digits hold. */
static const uint64_t most = (UINT64_C(1) << 33) - 1;

uint64_t tar_padded(uint64_t size) {
  return (size + TAR_BLOCK_BYTES - 1) / TAR_BLOCK_BYTES * TAR_BLOCK_BYTES;
}

/* The field counts as eight spaces in its own sum. */
static uint32_t sum_of(const uint8_t block[TAR_BLOCK_BYTES]) {
  uint32_t sum = 8 * ' ';
  for (int i = 0; i < TAR_BLOCK_BYTES; i++) sum += i >= CHECKSUM && i < KIND ? 0 : block[i];
  return sum;
}

/* Writing */

static void put_number(uint8_t *field, size_t bytes, uint64_t number) {
  field[--bytes] = 0;
  while (bytes > 0) {
    field[--bytes] = (uint8_t)('0' + (number & 7));
    number >>= 3;
  }
}

static void put_text(uint8_t *field, const char *text) {
  size_t length = strlen(text);
  memcpy(field, text, length < NAME_BYTES ? length : NAME_BYTES);
}

static void put_header(uint8_t *block, uint8_t kind, const struct tar_entry *entry, uint64_t size) {
  memset(block, 0, TAR_BLOCK_BYTES);
  put_text(block + NAME, entry->name);
  put_text(block + LINK, kind == TAR_EXTENDED ? "" : entry->link);
  put_number(block + MODE, NUMBER_BYTES, entry->mode & ANY_MODE);
  put_number(block + UID, NUMBER_BYTES, 0);
  put_number(block + GID, NUMBER_BYTES, 0);
  put_number(block + SIZE, LONG_NUMBER_BYTES, size <= most ? size : 0);
  put_number(block + MTIME, LONG_NUMBER_BYTES, entry->mtime <= most ? entry->mtime : 0);
  block[KIND] = kind;
  memcpy(block + MAGIC, "ustar\00000", 8);
  put_number(block + CHECKSUM, NUMBER_BYTES - 1, sum_of(block));
  block[CHECKSUM + 7] = ' ';
}

static size_t put_decimal(uint8_t *at, uint64_t number) {
  uint8_t digits[20];
  size_t count = 0;
  do digits[count++] = (uint8_t)('0' + number % 10);
  while (number /= 10);
  for (size_t i = 0; i < count; i++) at[i] = digits[count - 1 - i];
  return count;
}

static size_t digits_of(size_t number) {
  size_t count = 1;
  while (number /= 10) count++;
  return count;
}

/* "LENGTH KEY=VALUE\n", where LENGTH counts itself. */
static size_t put_record(uint8_t *at, const char *key, const void *value, size_t value_bytes) {
  size_t key_bytes = strlen(key);
  size_t rest = 1 + key_bytes + 1 + value_bytes + 1;
  size_t length = rest + digits_of(rest);
  length = rest + digits_of(length);
  uint8_t *to = at + put_decimal(at, length);
  *to++ = ' ';
  memcpy(to, key, key_bytes);
  to += key_bytes;
  *to++ = '=';
  memcpy(to, value, value_bytes);
  to[value_bytes] = '\n';
  return length;
}

size_t tar_put(uint8_t *room, const struct tar_entry *entry) {
  uint8_t *records = room + TAR_BLOCK_BYTES;
  uint8_t size[20];
  size_t used = 0;
  size_t name = strlen(entry->name);
  size_t link = strlen(entry->link);
  if (name > NAME_BYTES) used += put_record(records + used, "path", entry->name, name);
  if (link > NAME_BYTES) used += put_record(records + used, "linkpath", entry->link, link);
  if (entry->size > most) used += put_record(records + used, "size", size, put_decimal(size, entry->size));
  size_t before = 0;
  if (used > 0) {
    put_header(room, TAR_EXTENDED, entry, used);
    before = TAR_BLOCK_BYTES + (size_t)tar_padded(used);
    memset(records + used, 0, before - TAR_BLOCK_BYTES - used);
  }
  put_header(room + before, entry->kind, entry, entry->size);
  return before + TAR_BLOCK_BYTES;
}

/* Reading */

void tar_begin(struct tar_entry *entry) {
  entry->name[0] = entry->link[0] = '\0';
  entry->size = 0;
  entry->sized = false;
}

static bool take_text(char *to, const uint8_t *text, size_t length) {
  if (length >= TAR_PATH_BYTES || memchr(text, 0, length)) return false;
  memcpy(to, text, length);
  to[length] = '\0';
  return true;
}

static bool take_decimal(const uint8_t *text, size_t length, uint64_t *number) {
  *number = 0;
  if (length == 0 || length > 18) return false;
  for (size_t i = 0; i < length; i++) {
    if (text[i] < '0' || text[i] > '9') return false;
    *number = *number * 10 + (uint64_t)(text[i] - '0');
  }
  return true;
}

static bool is_key(const uint8_t *text, size_t length, const char *key) {
  return length == strlen(key) && memcmp(text, key, length) == 0;
}

static bool take_record(const uint8_t *text, size_t length, struct tar_entry *entry) {
  const uint8_t *equals = memchr(text, '=', length);
  if (!equals) return false;
  size_t key = (size_t)(equals - text);
  const uint8_t *value = equals + 1;
  size_t bytes = length - key - 1;
  if (is_key(text, key, "path")) return take_text(entry->name, value, bytes);
  if (is_key(text, key, "linkpath")) return take_text(entry->link, value, bytes);
  if (!is_key(text, key, "size")) return true;
  entry->sized = true;
  return take_decimal(value, bytes, &entry->size);
}

bool tar_take_records(const uint8_t *records, size_t length, struct tar_entry *entry) {
  for (size_t at = 0; at < length;) {
    const uint8_t *space = memchr(records + at, ' ', length - at);
    uint64_t whole;
    if (!space || !take_decimal(records + at, (size_t)(space - records) - at, &whole)) return false;
    size_t head = (size_t)(space - records) - at + 1;
    if (whole <= head || whole > length - at || records[at + whole - 1] != '\n') return false;
    if (!take_record(space + 1, (size_t)whole - head - 1, entry)) return false;
    at += (size_t)whole;
  }
  return true;
}

/* Octal digits, with spaces before and a space or NUL behind. */
static bool take_number(const uint8_t *field, size_t bytes, uint64_t *number) {
  size_t at = 0;
  *number = 0;
  while (at < bytes && field[at] == ' ') at++;
  for (; at < bytes && field[at] >= '0' && field[at] <= '7'; at++) *number = *number << 3 | (uint64_t)(field[at] - '0');
  return at == bytes || field[at] == ' ' || field[at] == 0;
}

static size_t field_length(const uint8_t *field, size_t bytes) {
  const uint8_t *end = memchr(field, 0, bytes);
  return end ? (size_t)(end - field) : bytes;
}

static bool take_name(const uint8_t *block, struct tar_entry *entry) {
  size_t prefix = field_length(block + PREFIX, PREFIX_BYTES);
  char *to = entry->name;
  if (memcmp(block + MAGIC, "ustar", 6) == 0 && prefix > 0) {
    memcpy(to, block + PREFIX, prefix);
    to[prefix] = '/';
    to += prefix + 1;
  }
  return take_text(to, block + NAME, field_length(block + NAME, NAME_BYTES)) && entry->name[0];
}

bool tar_take_header(const uint8_t block[TAR_BLOCK_BYTES], struct tar_entry *entry) {
  uint64_t sum;
  uint64_t mode;
  uint64_t size;
  if (!take_number(block + CHECKSUM, NUMBER_BYTES, &sum) || sum != sum_of(block)) return false;
  if (!take_number(block + MODE, NUMBER_BYTES, &mode) || !take_number(block + SIZE, LONG_NUMBER_BYTES, &size)) return false;
  if (!take_number(block + MTIME, LONG_NUMBER_BYTES, &entry->mtime)) return false;
  entry->kind = block[KIND];
  entry->mode = (uint32_t)mode & ANY_MODE;
  if (entry->kind == TAR_EXTENDED) {
    if (entry->sized || entry->name[0] || entry->link[0]) return false; /* a second one before an entry */
    entry->size = size;
    return size <= TAR_EXTENDED_BYTES;
  }
  if (!entry->sized) entry->size = size;
  if (!entry->name[0] && !take_name(block, entry)) return false;
  if (!entry->link[0] && !take_text(entry->link, block + LINK, field_length(block + LINK, NAME_BYTES))) return false;
  switch (entry->kind) {
    case TAR_FILE: return true;
    case TAR_DIRECTORY: return entry->size == 0;
    case TAR_HARD_LINK:
    case TAR_SYMLINK: return entry->size == 0 && entry->link[0];
    default: return false;
  }
}

bool tar_is_end(const uint8_t block[TAR_BLOCK_BYTES]) {
  for (int i = 0; i < TAR_BLOCK_BYTES; i++) {
    if (block[i]) return false;
  }
  return true;
}
