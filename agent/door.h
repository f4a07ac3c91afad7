/* The door: PID 1 of the ring around a sandboxed kernel; see PROTOCOL.md. */
#ifndef RINGFENCE_DOOR_H
#define RINGFENCE_DOOR_H

/* `argv`: the most bytes of a detached job's log (0: not detached), how many milliseconds the sandbox may live after
   SIGUSR1 (0: no limit), then the runtime's command line. Returns only an exit status, when nothing was started. */
int keep_door(char **argv);

#endif
