/* The back: the guest's end of the link, see LINK.md. */
#ifndef RINGFENCE_BACK_H
#define RINGFENCE_BACK_H

/* Serve the link until the machine is to be switched off. Takes over the descriptors, which become non-blocking, and
   blocks all signals of the process.

   link: where SETUP_DONE has just been sent.
   agent: our end of the connection that the agent has as descriptor 3.
   feed: our end of the one that it has as descriptor 4; connections are sent over it.
   memory_events: the file memory.events of the cgroup that the job is in, opened for reading, or -1.

   Returns 0 for POWEROFF, 1 when the link is gone or what came over it was wrong. Reaps nothing. */
int run_back(int link, int agent, int feed, int memory_events);

/* For tests, `agent --back LINK [MEMORY_EVENTS]`: HELLO, SETUP whose text is not looked at, SETUP_DONE, then run_back
   with an agent of its own, which is this same binary. Returns an exit status. */
int keep_back(char **argv);

#endif
