/* The setup text of GUEST.md: bytes in, a checked description of a job's machine out. Pure: no system calls, no
   memory of its own. */
#ifndef RINGFENCE_SETUP_H
#define RINGFENCE_SETUP_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

enum { MAX_SETUP_STEPS = 2048, MAX_RLIMITS = 16, MAX_INSTRUCTIONS = 4096, INSTRUCTION_BYTES = 8 };

/* Of memory, swap and pids: as much as there is. */
#define NO_LIMIT UINT64_MAX

enum step_kind {
  STEP_SYSCTL,
  STEP_DIRECTORY,
  STEP_FILE,
  STEP_LINK,
  STEP_TMPFS,
  STEP_SCRATCH,
  STEP_SHARE,
  STEP_DISK,
  STEP_MASK,
  STEP_READ_ONLY,
};

/* How much a file system in memory may hold. */
struct room {
  uint64_t bytes;
  uint64_t inodes;
};

/* A disk image: what is below /dev, and the file system on it. */
struct disk {
  const char *device; /* NULL: none */
  const char *type;
};

/* One line that is carried out in its place; which fields count depends on the kind. */
struct step {
  enum step_kind kind;
  const char *path; /* absolute, in the job's root; of a sysctl its name */
  const char *text; /* a file's content, a link's target, a sysctl's value */
  struct disk disk;
  struct room room; /* bytes 0: a disk that cannot be written to */
  uint32_t mode;
  uint32_t uid;
  uint32_t gid;
};

struct rlimit_step {
  uint64_t soft;
  uint64_t hard;
  bool given;
};

struct setup {
  const char *hostname;
  uint32_t uid;
  uint32_t gid;
  uint64_t capabilities;
  uint64_t memory_bytes;
  uint64_t swap_bytes;
  uint64_t pids;
  struct disk root;
  struct room upper; /* bytes 0: the root cannot be written to */
  struct room shm;
  bool sysfs;
  struct rlimit_step rlimits[MAX_RLIMITS];      /* by their number */
  uint64_t filter[MAX_INSTRUCTIONS];            /* struct sock_filter each */
  uint16_t instructions;
  struct step steps[MAX_SETUP_STEPS];
  size_t step_count;
  uint32_t seen; /* keys that may be there only once */
};

/* Read `length` bytes of setup text into `setup`, which is all zero before and points into `text` afterwards, which is
   taken apart.
   NULL if all is well, else the name of the key that is wrong, missing or there twice ("setup": not even a key). */
const char *parse_setup(char *text, size_t length, struct setup *setup);

#endif
