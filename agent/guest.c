#define _GNU_SOURCE
#include "guest.h"

#include <errno.h>
#include <fcntl.h>
#include <sched.h>
#include <signal.h>
#include <stdbool.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/utsname.h>
#include <unistd.h>

#include "back.h"
#include "credentials.h"
#include "files.h"
#include "link.h"
#include "machine.h"
#include "root.h"
#include "setup.h"
#include "signals.h"
#include "system.h"

enum { CONTROL = 3, FEED = 4 }; /* what the agent starts with */
enum { ABOVE = 10, WORDS_BYTES = 256 };

/* What could not be done, as SETUP_FAILED tells it. The process that builds the job's root sends it through a pipe. */
struct failure {
  int error;
  char words[WORDS_BYTES];
};

/* The agent's process, and our ends of its two sockets. */
struct started {
  int control;
  int feed;
};

static void note(struct failure *failure, int error, struct place place) {
  struct text text;
  failure->error = error;
  text_begin(&text, failure->words, sizeof failure->words);
  text_add(&text, place.what);
  if (place.name[0] != '\0') {
    text_add(&text, " ");
    text_add(&text, place.name);
  }
}

/* Before there is a link the console is the only place for words. */
static _Noreturn void give_up(const char *what) {
  char line[WORDS_BYTES];
  struct text text;
  int error = errno;
  text_begin(&text, line, sizeof line);
  text_add(&text, "init: ");
  text_add(&text, what);
  text_add(&text, ": error ");
  text_add_number(&text, (uint64_t)error, 10);
  text_add(&text, "\n");
  if (write(2, line, text.used) < 0) power_off();
  power_off();
}

/* The job's process */

/* Every other descriptor of ours is closed by execve, but the console, in whose place the agent puts the null device
   first of all. */
static bool place_descriptors(int control, int feed) {
  return dup2(control, CONTROL) == CONTROL && dup2(feed, FEED) == FEED;
}

/* Runs in the job's namespaces, as root of the guest, and comes back only if something fails. */
static void become_agent(const struct setup *setup, int control, int feed, struct place *place) {
  static char *const arguments[] = {"/.ringfence", NULL};
  static char *const environment[] = {NULL};
  if (!build_root(setup, place)) return;
  *place = (struct place){"group", ""};
  if (!enter_group() || !enter_root(place)) return;
  *place = (struct place){"descriptors", ""};
  if (!place_descriptors(control, feed)) return;
  *place = (struct place){"", ""};
  if (!take_credentials(setup, &place->what)) return;
  place->what = "agent";
  execve(arguments[0], arguments, environment);
}

static _Noreturn void run_child(const struct setup *setup, int control, int feed, int report) {
  struct place place;
  struct failure failure;
  become_agent(setup, control, feed, &place);
  note(&failure, errno, place);
  if (write(report, &failure, sizeof failure) < 0) _exit(EXIT_OWN_FAILURE);
  _exit(EXIT_OWN_FAILURE);
}

/* Move both ends above the numbers that the agent's descriptors get. */
static bool lift(int ends[2]) {
  for (int i = 0; i < 2; i++) {
    int high = fcntl(ends[i], F_DUPFD_CLOEXEC, ABOVE);
    if (high < 0) return false;
    close(ends[i]);
    ends[i] = high;
  }
  return true;
}

static bool make_pair(int ends[2]) {
  return socketpair(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0, ends) == 0 && lift(ends);
}

static bool make_pipe(int ends[2]) {
  return pipe2(ends, O_CLOEXEC) == 0 && lift(ends);
}

/* Wait until the child has become the agent, or has said why not. */
static bool has_started(int report, struct failure *failure) {
  ssize_t count;
  do count = read(report, failure, sizeof *failure);
  while (count < 0 && errno == EINTR);
  if (count == 0) return true;
  if (count == (ssize_t)sizeof *failure) {
    failure->words[sizeof failure->words - 1] = '\0';
  } else {
    note(failure, EIO, (struct place){"agent", ""});
  }
  return false;
}

static bool start_agent(const struct setup *setup, struct started *started, struct failure *failure) {
  int control[2];
  int feed[2];
  int report[2];
  if (!make_pair(control) || !make_pair(feed) || !make_pipe(report)) {
    note(failure, errno, (struct place){"agent", ""});
    return false;
  }
  /* The libc's fork knows no namespaces; nothing that it would see to is in use here. */
  long child = syscall(SYS_clone, CLONE_NEWPID | CLONE_NEWNS | SIGCHLD, 0L, 0L, 0L, 0L);
  if (child == 0) run_child(setup, control[1], feed[1], report[1]);
  int error = errno;
  close(control[1]);
  close(feed[1]);
  close(report[1]);
  if (child < 0) {
    note(failure, error, (struct place){"namespaces", ""});
    return false;
  }
  *started = (struct started){.control = control[0], .feed = feed[0]};
  bool good = has_started(report[0], failure);
  close(report[0]);
  return good;
}

/* The machine */

static bool set_sysctls(const struct setup *setup, struct place *place) {
  for (size_t i = 0; i < setup->step_count; i++) {
    const struct step *step = &setup->steps[i];
    *place = (struct place){"sysctl", step->path ? step->path : ""};
    if (step->kind == STEP_SYSCTL && !set_sysctl(step->path, step->text)) return false;
  }
  return true;
}

static bool set_kernel(const struct setup *setup, int *memory_events, struct place *place) {
  *place = (struct place){"hostname", ""};
  if (!set_hostname(setup->hostname)) return false;
  if (!set_sysctls(setup, place)) return false;
  *place = (struct place){"loopback", ""};
  if (!raise_loopback()) return false;
  *place = (struct place){"group", ""};
  *memory_events = make_group(setup);
  return *memory_events >= 0;
}

/* First of all what makes this machine another one than its clones. */
static bool refresh(const struct link_setup *given, struct place *place) {
  *place = (struct place){"entropy", ""};
  if (!reseed(given->entropy)) return false;
  place->what = "clock";
  return set_clock(given->realtime_ns);
}

static bool set_up(struct link_setup *given, struct started *started, int *memory_events, struct failure *failure) {
  static struct setup setup;
  struct place place = {"", ""};
  if (!refresh(given, &place)) {
    note(failure, errno, place);
    return false;
  }
  place.what = parse_setup(given->text, given->length, &setup);
  if (place.what) {
    note(failure, EINVAL, place);
    return false;
  }
  if (!set_kernel(&setup, memory_events, &place)) {
    note(failure, errno, place);
    return false;
  }
  return start_agent(&setup, started, failure);
}

/* Words of ours go to the console. Where its driver is a module the kernel found none when it started us. */
static bool open_console(void) {
  int console = open("/dev/console", O_RDWR | O_NOCTTY | O_CLOEXEC);
  if (console < 0) return true; /* then there are none */
  for (int i = 0; i < 3; i++) {
    if (dup2(console, i) != i) return false;
  }
  return console <= 2 || close(console) == 0;
}

static uint64_t boot_ms(void) {
  return (uint64_t)now_ms(); /* the clock starts with the kernel */
}

static void start_machine(void) {
  umask(022);
  block_signals();
  if (!mount_own()) give_up("kernel's file systems");
  if (!open_null()) give_up("null device");
  if (!load_modules()) give_up("modules");
  if (!open_console()) give_up("console");
}

static int say_hello(void) {
  struct utsname names;
  int link = open_link();
  if (link < 0) give_up("link");
  if (uname(&names) != 0 || !link_say_hello(link, names.release, boot_ms())) give_up("hello");
  return link;
}

_Noreturn void run_guest(void) {
  struct link_setup given;
  struct started started;
  struct failure failure;
  int memory_events;
  start_machine();
  int link = say_hello();
  if (!link_read_setup(link, &given)) give_up("setup");
  bool good = set_up(&given, &started, &memory_events, &failure);
  link_forget_setup(&given);
  unlink("/init"); /* the agent has a copy; ours stays in memory as long as we run */
  if (!good) {
    link_setup_failed(link, failure.error, failure.words);
    power_off();
  }
  if (link_setup_done(link)) run_back(link, started.control, started.feed, memory_events);
  power_off();
}
