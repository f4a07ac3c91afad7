/* The job's root file system inside the guest: as on the linux tier, a skeleton of ours over the image, and what the
   plan mounts on top. GUEST.md says which. */
#ifndef RINGFENCE_ROOT_H
#define RINGFENCE_ROOT_H

#include <stdbool.h>

#include "setup.h"

/* What was being done when something failed: the key of the setup text, and what it was about ("" if nothing). */
struct place {
  const char *what;
  const char *name;
};

/* Build the root, in a mount namespace and a process namespace of the job's own, in which the initramfs with its /proc,
   /sys and /dev is still in place. */
bool build_root(const struct setup *setup, struct place *place);

/* Make it the root of this process, and let go of everything else that is mounted. */
bool enter_root(struct place *place);

#endif
