/* Small pieces of the kernel that the agent and the door both need. */
#ifndef RINGFENCE_SYSTEM_H
#define RINGFENCE_SYSTEM_H

#include <stdbool.h>
#include <stdint.h>

enum { EXIT_OWN_FAILURE = 125 };

/* CLOCK_MONOTONIC in milliseconds. */
int64_t now_ms(void);

/* Close this descriptor and all above it. */
bool close_from(int first);

/* Make 0, 1 and 2 the null device: nothing of who started us stays on them. */
bool open_null(void);

#endif
