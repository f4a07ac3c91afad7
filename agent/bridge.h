/* The bridge: PID 1 of the ring around a microVM; see LINK.md and PROTOCOL.md. */
#ifndef RINGFENCE_BRIDGE_H
#define RINGFENCE_BRIDGE_H

/* `argv`: the most bytes of a detached job's log (0: not detached), the file with the setup text, 1 to wait for HELLO
   or 0 if it was said before a snapshot, the number of descriptors from 8 on that are the VMM's, its command line.
   Returns only an exit status, when nothing was started. */
int keep_bridge(char **argv);

#endif
