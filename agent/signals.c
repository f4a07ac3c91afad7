#define _GNU_SOURCE
#include "signals.h"

#include <signal.h>
#include <stdint.h>
#include <sys/signalfd.h>
#include <sys/syscall.h>
#include <unistd.h>

enum { LAST_SIGNAL = 64 };

static void set_mask(uint64_t mask) {
  syscall(SYS_rt_sigprocmask, SIG_SETMASK, &mask, NULL, sizeof mask);
}

void block_signals(void) {
  static const struct {
    uint64_t words[8]; /* all zero: SIG_DFL, no flags; as large as any architecture's structure */
  } standard;
  set_mask(~UINT64_C(0));
  for (int signo = 1; signo <= LAST_SIGNAL; signo++) {
    syscall(SYS_rt_sigaction, signo, &standard, NULL, sizeof(uint64_t));
  }
}

void unblock_signals(void) {
  set_mask(0);
}

int open_signals(void) {
  static const int wanted[] = {SIGCHLD, SIGTERM, SIGINT, SIGHUP, SIGQUIT, SIGUSR1, SIGUSR2};
  sigset_t set;
  sigemptyset(&set);
  for (size_t i = 0; i < sizeof wanted / sizeof *wanted; i++) sigaddset(&set, wanted[i]);
  return signalfd(-1, &set, SFD_CLOEXEC | SFD_NONBLOCK);
}

int next_signal(int descriptor) {
  struct signalfd_siginfo info;
  return read(descriptor, &info, sizeof info) == sizeof info ? (int)info.ssi_signo : 0;
}
