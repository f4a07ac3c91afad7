/* Setup text: no bytes make its parser read or write where it may not, and what it takes keeps its promises. */
#include <stdlib.h>
#include <string.h>

#include "setup.h"

static void check(bool holds) {
  if (!holds) abort();
}

static void check_path(const struct step *step) {
  if (step->kind == STEP_SYSCTL || step->kind == STEP_SCRATCH) return;
  check(step->path[0] == '/' && step->path[1] != '\0');
  check(!strstr(step->path, "/../") && !strstr(step->path, "//"));
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size) {
  static struct setup setup;
  memset(&setup, 0, sizeof setup);
  char *text = malloc(size ? size : 1); /* of its own, so that a byte too far is found */
  if (!text) return 0;
  memcpy(text, data, size);
  if (!parse_setup(text, size, &setup)) {
    check(setup.instructions > 0 && setup.instructions <= MAX_INSTRUCTIONS);
    check(setup.memory_bytes > 0 && setup.pids > 0 && setup.shm.bytes > 0 && setup.shm.inodes > 0);
    check(setup.uid != UINT32_MAX && setup.gid != UINT32_MAX);
    check(setup.step_count <= MAX_SETUP_STEPS);
    for (size_t i = 0; i < setup.step_count; i++) check_path(&setup.steps[i]);
  }
  free(text);
  return 0;
}
