/* The first process of a microVM's guest, `/init` of its initramfs; see GUEST.md. */
#ifndef RINGFENCE_GUEST_H
#define RINGFENCE_GUEST_H

/* Start the machine, do as the host's SETUP says, run the agent and pass its frames on until the end of the machine. */
_Noreturn void run_guest(void);

#endif
