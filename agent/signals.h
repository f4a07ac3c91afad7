/* Signal masks and dispositions by the kernel's own calls: a libc keeps some real-time signals to itself. */
#ifndef RINGFENCE_SIGNALS_H
#define RINGFENCE_SIGNALS_H

/* Block all, and give each its default disposition; the runtime may have left some ignored. */
void block_signals(void);
void unblock_signals(void);

/* A descriptor that is readable when SIGCHLD or a signal to forward is there. -1 and errno on failure. */
int open_signals(void);

/* The next signal that came in by `descriptor`, or 0. */
int next_signal(int descriptor);

#endif
