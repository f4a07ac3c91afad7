/* From root of the guest to the job: limits, ids, capabilities and filter, in the order in which each is still
   allowed. */
#ifndef RINGFENCE_CREDENTIALS_H
#define RINGFENCE_CREDENTIALS_H

#include <stdbool.h>

#include "setup.h"

/* False with errno, and the name of the key that could not be obeyed in `what`: the process must not go on then. */
bool take_credentials(const struct setup *setup, const char **what);

#endif
