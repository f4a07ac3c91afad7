#define _GNU_SOURCE
#include "credentials.h"

#include <sys/prctl.h>
#include <sys/syscall.h>
#include <unistd.h>

/* linux/seccomp.h and linux/filter.h, which musl does not bring */
enum { SET_MODE_FILTER = 1 };
struct program {
  unsigned short length;
  const void *filter;
};

static bool has(uint64_t capabilities, unsigned long capability) {
  return capabilities >> capability & 1;
}

static bool set_rlimits(const struct setup *setup) {
  for (int number = 0; number < MAX_RLIMITS; number++) {
    const struct rlimit_step *step = &setup->rlimits[number];
    const struct {
      uint64_t soft, hard;
    } limit = {step->soft, step->hard};
    if (step->given && syscall(SYS_prlimit64, 0, number, &limit, NULL) != 0) return false;
  }
  return true;
}

static bool bound_capabilities(uint64_t wanted) {
  for (unsigned long capability = 0; prctl(PR_CAPBSET_READ, capability, 0, 0, 0) >= 0; capability++) {
    if (!has(wanted, capability) && prctl(PR_CAPBSET_DROP, capability, 0, 0, 0) != 0) return false;
  }
  return true;
}

/* By system calls of our own: nothing of a libc's, which may have threads in mind. The ids stay under our control. */
static bool set_ids(uint32_t uid, uint32_t gid) {
  return prctl(PR_SET_KEEPCAPS, 1, 0, 0, 0) == 0 && syscall(SYS_setgroups, 0, NULL) == 0 &&
         syscall(SYS_setresgid, gid, gid, gid) == 0 && syscall(SYS_setresuid, uid, uid, uid) == 0 &&
         prctl(PR_SET_KEEPCAPS, 0, 0, 0, 0) == 0;
}

static bool set_capabilities(uint64_t wanted) {
  const struct {
    uint32_t version;
    int pid;
  } header = {.version = 0x20080522}; /* capset(2): version 3 */
  const uint32_t low = (uint32_t)wanted;
  const uint32_t high = (uint32_t)(wanted >> 32);
  const uint32_t sets[2][3] = {{low, low, low}, {high, high, high}};
  if (syscall(SYS_capset, &header, sets) != 0) return false;
  for (unsigned long capability = 0; capability < 64; capability++) {
    if (has(wanted, capability) && prctl(PR_CAP_AMBIENT, PR_CAP_AMBIENT_RAISE, capability, 0, 0) != 0) return false;
  }
  return true;
}

static bool set_filter(const struct setup *setup) {
  const struct program program = {.length = setup->instructions, .filter = setup->filter};
  return syscall(SYS_seccomp, SET_MODE_FILTER, 0, &program) == 0;
}

bool take_credentials(const struct setup *setup, const char **what) {
  *what = "rlimit";
  if (!set_rlimits(setup)) return false;
  *what = "caps";
  if (!bound_capabilities(setup->capabilities)) return false;
  *what = "uid";
  if (!set_ids(setup->uid, setup->gid)) return false;
  *what = "caps";
  if (!set_capabilities(setup->capabilities)) return false;
  *what = "nnp";
  if (prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) != 0) return false;
  *what = "seccomp"; /* last: it need not allow any of the above */
  return set_filter(setup);
}
