/* What the harnesses of whole state machines share. Included after the source that is fuzzed. */
#ifndef RINGFENCE_FUZZ_HARNESS_H
#define RINGFENCE_FUZZ_HARNESS_H

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size);
int LLVMFuzzerInitialize(int *argc, char ***argv);

static inline void must(bool good) {
  if (!good) __builtin_trap();
}

static inline void shut(int *descriptor) {
  if (*descriptor >= 0) close(*descriptor);
  *descriptor = -1;
}

/* A new descriptor of the null device; a peer that has gone must be an error and not a signal. */
static inline int begin_harness(void) {
  signal(SIGPIPE, SIG_IGN);
  int null_device = open("/dev/null", O_RDWR | O_CLOEXEC);
  must(null_device >= 0);
  return null_device;
}

#endif
