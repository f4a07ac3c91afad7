#include "setup.h"

#include <string.h>

enum { MOST_NAME_BYTES = 64, MOST_DEVICE_BYTES = 15, MOST_PATH_BYTES = 4095, MOST_MODE = 01777 };
enum { MOST_DIGITS = 20 };
/* Beyond what any machine has, and far from where the kernel's own sums would wrap around. */
#define MOST_ROOM_BYTES (UINT64_C(1) << 50)

/* Fields: what a colon ends. The last one of a line has its NUL. */

static char *next_field(char **rest) {
  char *field = *rest;
  if (!field) return NULL;
  char *colon = strchr(field, ':');
  if (colon) *colon = '\0';
  *rest = colon ? colon + 1 : NULL;
  return field;
}

static bool is_over(char *const *rest) {
  return !*rest;
}

static bool is_digit(char c, unsigned base) {
  return c >= '0' && (unsigned)(c - '0') < base;
}

/* Plain digits of base 8 or 10, no sign, no blank. */
static bool read_number(const char *text, unsigned base, uint64_t most, uint64_t *value) {
  *value = 0;
  if (!text || *text == '\0' || strlen(text) > MOST_DIGITS) return false;
  for (; *text != '\0'; text++) {
    if (!is_digit(*text, base)) return false;
    uint64_t digit = (uint64_t)(*text - '0');
    if (*value > (UINT64_MAX - digit) / base) return false;
    *value = *value * base + digit;
  }
  return *value <= most;
}

static bool next_number(char **rest, uint64_t most, uint64_t *value) {
  return read_number(next_field(rest), 10, most, value);
}

/* An id; the highest one means "no change" to the kernel. */
static bool next_id(char **rest, uint32_t *id) {
  uint64_t value;
  if (!next_number(rest, UINT32_MAX - 1, &value)) return false;
  *id = (uint32_t)value;
  return true;
}

static bool next_mode(char **rest, uint32_t *mode) {
  uint64_t value;
  if (!read_number(next_field(rest), 8, MOST_MODE, &value)) return false;
  *mode = (uint32_t)value;
  return true;
}

/* To a tmpfs 0 means "no bound", so that is no size here. */
static bool next_room(char **rest, struct room *room) {
  return next_number(rest, MOST_ROOM_BYTES, &room->bytes) && room->bytes > 0 &&
         next_number(rest, INT32_MAX, &room->inodes) && room->inodes > 0;
}

static bool is_name(const char *text, const char *more, size_t most) {
  size_t length = text ? strlen(text) : 0;
  if (length == 0 || length > most) return false;
  for (; *text != '\0'; text++) {
    if (!(*text >= 'a' && *text <= 'z') && !is_digit(*text, 10) && !strchr(more, *text)) return false;
  }
  return true;
}

/* Names alone: what is put together with /dev/ cannot lead elsewhere. */
static bool next_disk(char **rest, struct disk *disk) {
  disk->device = next_field(rest);
  disk->type = next_field(rest);
  return is_name(disk->device, "", MOST_DEVICE_BYTES) && is_name(disk->type, "", MOST_DEVICE_BYTES);
}

static bool begins(const char *path, const char *with) {
  size_t length = strlen(with);
  return strncmp(path, with, length) == 0 && (path[length] == '\0' || path[length] == '/');
}

/* "/a/b": every part has a name that is not "." or "..", and there is at least one. */
static bool is_path(const char *path) {
  if (!path || *path != '/' || strlen(path) > MOST_PATH_BYTES) return false;
  while (*path == '/') {
    const char *part = ++path;
    path += strcspn(path, "/");
    size_t length = (size_t)(path - part);
    if (length == 0 || (length <= 2 && strspn(part, ".") >= length)) return false;
  }
  return true;
}

/* A path that is the plan's to fill: the kernel's file systems and the agent are ours. */
static bool next_path(char **rest, const char **path) {
  *path = next_field(rest);
  return is_path(*path) && !begins(*path, "/proc") && !begins(*path, "/sys") && !begins(*path, "/dev") &&
         !begins(*path, "/.ringfence");
}

/* The keys */

static bool read_hostname(struct setup *setup, char *value) {
  setup->hostname = value;
  return is_name(value, "-", MOST_NAME_BYTES);
}

static bool read_uid(struct setup *setup, char *value) {
  return next_id(&value, &setup->uid) && is_over(&value);
}

static bool read_gid(struct setup *setup, char *value) {
  return next_id(&value, &setup->gid) && is_over(&value);
}

/* -1: no digit */
static int hex_digit(char c) {
  if (is_digit(c, 10)) return c - '0';
  return c >= 'a' && c <= 'f' ? c - 'a' + 10 : -1;
}

static bool read_capabilities(struct setup *setup, char *value) {
  setup->capabilities = 0;
  size_t length = strlen(value);
  if (length == 0 || length > 16) return false;
  for (; *value != '\0'; value++) {
    int digit = hex_digit(*value);
    if (digit < 0) return false;
    setup->capabilities = setup->capabilities << 4 | (unsigned)digit;
  }
  return true;
}

/* Said so that nobody takes its absence for a wish: without it a filter could not be set by a job's uid, and as every
   mount has nosuid, nothing could be gained. */
static bool read_no_new_privileges(struct setup *setup, char *value) {
  (void)setup;
  return strcmp(value, "1") == 0;
}

static bool read_filter(struct setup *setup, char *value) {
  size_t digits = strlen(value);
  if (digits == 0 || digits % (2 * INSTRUCTION_BYTES) != 0 || digits > sizeof setup->filter * 2) return false;
  uint8_t *to = (uint8_t *)setup->filter;
  for (size_t i = 0; i < digits; i += 2) {
    int high = hex_digit(value[i]);
    int low = hex_digit(value[i + 1]);
    if (high < 0 || low < 0) return false;
    *to++ = (uint8_t)(high << 4 | low);
  }
  setup->instructions = (uint16_t)(digits / (2 * INSTRUCTION_BYTES));
  return true;
}

static bool read_limit(char *value, uint64_t *limit) {
  if (strcmp(value, "max") == 0) {
    *limit = NO_LIMIT;
    return true;
  }
  return next_number(&value, INT64_MAX, limit) && is_over(&value);
}

static bool read_memory(struct setup *setup, char *value) {
  return read_limit(value, &setup->memory_bytes) && setup->memory_bytes > 0;
}

static bool read_swap(struct setup *setup, char *value) {
  return read_limit(value, &setup->swap_bytes);
}

static bool read_pids(struct setup *setup, char *value) {
  return read_limit(value, &setup->pids) && setup->pids > 0;
}

static bool read_root(struct setup *setup, char *value) {
  if (strcmp(value, "none") == 0) return true;
  return next_disk(&value, &setup->root) && is_over(&value);
}

static bool read_overlay(struct setup *setup, char *value) {
  if (strcmp(value, "ro") == 0) return true;
  return next_room(&value, &setup->upper) && is_over(&value);
}

static bool read_shm(struct setup *setup, char *value) {
  return next_room(&value, &setup->shm) && is_over(&value);
}

static bool read_sysfs(struct setup *setup, char *value) {
  setup->sysfs = strcmp(value, "1") == 0;
  return setup->sysfs || strcmp(value, "0") == 0;
}

static bool read_rlimit(struct setup *setup, char *value) {
  uint64_t number;
  if (!next_number(&value, MAX_RLIMITS - 1, &number)) return false;
  struct rlimit_step *limit = &setup->rlimits[number];
  if (limit->given) return false;
  limit->given = true;
  return next_number(&value, UINT64_MAX, &limit->soft) && next_number(&value, UINT64_MAX, &limit->hard) &&
         limit->soft <= limit->hard && is_over(&value);
}

/* Steps: their order is that of the text. */

static struct step *add_step(struct setup *setup, enum step_kind kind) {
  if (setup->step_count == MAX_SETUP_STEPS) return NULL;
  struct step *step = &setup->steps[setup->step_count++];
  step->kind = kind;
  return step;
}

/* Dots become slashes below /proc/sys: each must have a name on both sides. */
static bool has_parts(const char *name) {
  char before = '.';
  for (; *name != '\0'; before = *name++) {
    if (*name == '.' && before == '.') return false;
  }
  return before != '.';
}

static bool read_sysctl(struct setup *setup, char *value) {
  struct step *step = add_step(setup, STEP_SYSCTL);
  char *text = strchr(value, '=');
  if (!step || !text) return false;
  *text++ = '\0';
  step->path = value;
  step->text = text;
  return is_name(value, "._-", MOST_NAME_BYTES) && has_parts(value);
}

static bool read_directory(struct setup *setup, char *value) {
  struct step *step = add_step(setup, STEP_DIRECTORY);
  return step && next_path(&value, &step->path) && next_mode(&value, &step->mode) && next_id(&value, &step->uid) &&
         next_id(&value, &step->gid) && is_over(&value);
}

static bool read_file(struct setup *setup, char *value) {
  struct step *step = add_step(setup, STEP_FILE);
  if (!step || !next_path(&value, &step->path) || !next_mode(&value, &step->mode)) return false;
  step->text = value; /* colons and all */
  return value;
}

static bool read_link(struct setup *setup, char *value) {
  struct step *step = add_step(setup, STEP_LINK);
  if (!step || !next_path(&value, &step->path)) return false;
  step->text = value;
  return value && *value != '\0' && strlen(value) <= MOST_PATH_BYTES;
}

static bool read_tmpfs(struct setup *setup, char *value) {
  struct step *step = add_step(setup, STEP_TMPFS);
  return step && next_path(&value, &step->path) && next_room(&value, &step->room) && next_mode(&value, &step->mode) &&
         next_id(&value, &step->uid) && next_id(&value, &step->gid) && is_over(&value);
}

static bool read_scratch(struct setup *setup, char *value) {
  struct step *step = add_step(setup, STEP_SCRATCH);
  return step && next_room(&value, &step->room) && is_over(&value);
}

static bool read_share(struct setup *setup, char *value) {
  struct step *step = add_step(setup, STEP_SHARE);
  return step && next_path(&value, &step->path) && next_id(&value, &step->uid) && next_id(&value, &step->gid) &&
         is_over(&value);
}

static bool read_disk(struct setup *setup, char *value) {
  struct step *step = add_step(setup, STEP_DISK);
  if (!step || !next_disk(&value, &step->disk) || !next_path(&value, &step->path)) return false;
  const char *way = next_field(&value);
  if (!way) return false;
  if (strcmp(way, "ro") == 0) return is_over(&value);
  return strcmp(way, "rw") == 0 && next_room(&value, &step->room) && is_over(&value);
}

/* In the kernel's own file systems, and there alone. */
static bool add_guarded(struct setup *setup, enum step_kind kind, char *value) {
  struct step *step = add_step(setup, kind);
  if (!step) return false;
  step->path = value;
  return is_path(value) && (strncmp(value, "/proc/", 6) == 0 || strncmp(value, "/sys/", 5) == 0);
}

static bool read_mask(struct setup *setup, char *value) {
  return add_guarded(setup, STEP_MASK, value);
}

static bool read_read_only(struct setup *setup, char *value) {
  return add_guarded(setup, STEP_READ_ONLY, value);
}

static const struct key {
  const char *name;
  bool (*read)(struct setup *setup, char *value);
  bool once; /* and it must be there */
} keys[] = {
    {"hostname", read_hostname, true},
    {"uid", read_uid, true},
    {"gid", read_gid, true},
    {"caps", read_capabilities, true},
    {"nnp", read_no_new_privileges, true},
    {"seccomp", read_filter, true},
    {"memory", read_memory, true},
    {"swap", read_swap, true},
    {"pids", read_pids, true},
    {"root", read_root, true},
    {"overlay", read_overlay, true},
    {"shm", read_shm, true},
    {"sysfs", read_sysfs, true},
    {"scratch", read_scratch, false}, /* twice: its directory is there already */
    {"rlimit", read_rlimit, false},
    {"sysctl", read_sysctl, false},
    {"dir", read_directory, false},
    {"file", read_file, false},
    {"link", read_link, false},
    {"tmpfs", read_tmpfs, false},
    {"share", read_share, false},
    {"disk", read_disk, false},
    {"mask", read_mask, false},
    {"readonly", read_read_only, false},
};
enum { KEYS = sizeof keys / sizeof *keys };

static const struct key *find_key(const char *name) {
  for (size_t i = 0; i < KEYS; i++) {
    if (strcmp(keys[i].name, name) == 0) return &keys[i];
  }
  return NULL;
}

static uint32_t bit_of(const struct key *key) {
  return UINT32_C(1) << (key - keys);
}

static const char *read_line(struct setup *setup, char *line) {
  char *value = strchr(line, '=');
  if (!value) return "setup";
  *value++ = '\0';
  const struct key *key = find_key(line);
  if (!key) return "setup";
  if (key->once && setup->seen & bit_of(key)) return key->name;
  setup->seen |= bit_of(key);
  return key->read(setup, value) ? NULL : key->name;
}

static const char *missing_key(const struct setup *setup) {
  for (size_t i = 0; i < KEYS; i++) {
    if (keys[i].once && !(setup->seen & bit_of(&keys[i]))) return keys[i].name;
  }
  return NULL;
}

const char *parse_setup(char *text, size_t length, struct setup *setup) {
  if (length == 0 || text[length - 1] != '\0') return "setup";
  for (char *line = text; line < text + length;) {
    char *next = line + strlen(line) + 1; /* before the line is cut up */
    const char *wrong = read_line(setup, line);
    if (wrong) return wrong;
    line = next;
  }
  return missing_key(setup);
}
