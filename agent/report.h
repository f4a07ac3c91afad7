/* What the kernel says of a held job, for a host that cannot see into that kernel itself; see PROTOCOL.md, REPORTED. */
#ifndef RINGFENCE_REPORT_H
#define RINGFENCE_REPORT_H

#include <stddef.h>
#include <stdint.h>
#include <sys/types.h>

/* Write the items about process `pid` to `room`, all that fit whole; `proc` is /proc opened. Returns their bytes. */
size_t report_write(uint8_t *room, size_t size, int proc, pid_t pid);

#endif
