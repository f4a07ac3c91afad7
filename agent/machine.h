/* What there is once in a guest: its kernel's settings, clock and random numbers, and the control group of the job.
   All return false, or -1, with errno on failure. */
#ifndef RINGFENCE_MACHINE_H
#define RINGFENCE_MACHINE_H

#include <stdbool.h>
#include <stdint.h>

#include "link.h"
#include "setup.h"

/* The kernel's own file systems, for the guest's init. */
bool mount_own(void);

/* Load what /modules.list names, one file of /modules a line; no list, no modules. No other can be loaded later. */
bool load_modules(void);

/* The descriptor of the link: the virtio port of that name, or with `ringfence.link=vsock` on the kernel's command line
   the host's connection to vsock port 1. */
int open_link(void);

/* A clone of a saved machine shares its clock and its random numbers with all others until this is done. */
bool set_clock(uint64_t realtime_ns);
bool reseed(const uint8_t entropy[LINK_ENTROPY_BYTES]);

bool set_hostname(const char *name);
bool set_sysctl(const char *name, const char *value);
bool raise_loopback(void);

/* Make the job's control group with its limits. Returns its memory.events, opened for reading. */
int make_group(const struct setup *setup);

/* Put the calling process into it. */
bool enter_group(void);

/* Ends the machine at once, and with it the VMM. */
_Noreturn void power_off(void);

#endif
