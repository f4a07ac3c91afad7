/* What a tier costs a job: nanoseconds for one of several things a job does, printed as "NAME NS".

   costs DIRECTORY FILE: the working directory for files that are made, and a file of at least 1 MiB to read. */
#define _GNU_SOURCE
#include <fcntl.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

static volatile uint64_t sink;
static const char *directory;
static const char *file;

static double now_ns(void) {
  struct timespec now;
  clock_gettime(CLOCK_MONOTONIC, &now);
  return (double)now.tv_sec * 1e9 + (double)now.tv_nsec;
}

static void check(int good, const char *what) {
  if (good) return;
  perror(what);
  exit(1);
}

static void getpid_once(void) {
  sink += (uint64_t)syscall(SYS_getpid);
}

static void open_close(void) {
  int fd = open(file, O_RDONLY | O_CLOEXEC);
  check(fd >= 0, "open");
  close(fd);
}

static void read_4k(void) {
  static int fd = -1;
  static off_t at;
  static char block[4096];
  if (fd < 0) fd = open(file, O_RDONLY | O_CLOEXEC);
  check(pread(fd, block, sizeof block, at) == sizeof block, "pread");
  at = (at + 4096) % (1 << 20);
}

static void make_write_remove(void) {
  char path[4096];
  static const char block[4096];
  snprintf(path, sizeof path, "%s/made", directory);
  int fd = open(path, O_WRONLY | O_CREAT | O_TRUNC | O_CLOEXEC, 0600);
  check(fd >= 0 && write(fd, block, sizeof block) == sizeof block, "make a file");
  close(fd);
  check(unlink(path) == 0, "unlink");
}

static void fork_exec(void) {
  pid_t pid = fork();
  check(pid >= 0, "fork");
  if (pid == 0) {
    execl("/proc/self/exe", "costs", (char *)NULL);
    _exit(127);
  }
  int status;
  check(waitpid(pid, &status, 0) == pid && status == 0, "wait");
}

static void pipe_round(void) {
  static int ends[2] = {-1, -1};
  char byte = 0;
  if (ends[0] < 0) check(pipe(ends) == 0, "pipe");
  check(write(ends[1], &byte, 1) == 1 && read(ends[0], &byte, 1) == 1, "pipe");
}

static void cpu_loop(void) {
  uint64_t value = sink | 1;
  for (int i = 0; i < 1000000; i++) value = value * 6364136223846793005U + 1442695040888963407U;
  sink = value;
}

enum { WALK_BYTES = 64 << 20 };

static void memory_walk(void) {
  static char *room;
  if (!room) {
    room = mmap(NULL, WALK_BYTES, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    check(room != MAP_FAILED, "mmap");
  }
  for (size_t at = 0; at < WALK_BYTES; at += 64) room[at]++;
}

static void fresh_memory(void) {
  enum { BYTES = 4 << 20 };
  char *room = mmap(NULL, BYTES, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  check(room != MAP_FAILED, "mmap");
  for (size_t at = 0; at < BYTES; at += 4096) room[at] = 1;
  munmap(room, BYTES);
}

static const struct {
  const char *name;
  void (*once)(void);
  int count;
} costs[] = {
    {"getpid", getpid_once, 20000},        {"open-close", open_close, 1000},
    {"read-4k", read_4k, 4000},            {"make-write-remove", make_write_remove, 300},
    {"fork-exec", fork_exec, 30},          {"pipe-round", pipe_round, 4000},
    {"cpu-loop", cpu_loop, 60},            {"memory-walk", memory_walk, 10},
    {"fresh-memory", fresh_memory, 20},
};

int main(int argc, char **argv) {
  if (argc < 3) return 0; /* the child of fork_exec */
  directory = argv[1];
  file = argv[2];
  for (size_t i = 0; i < sizeof costs / sizeof *costs; i++) {
    costs[i].once(); /* warm */
    double best = 1e18;
    for (int round = 0; round < 5; round++) {
      double started = now_ns();
      for (int n = 0; n < costs[i].count; n++) costs[i].once();
      double each = (now_ns() - started) / costs[i].count;
      if (each < best) best = each;
    }
    printf("%s %.1f\n", costs[i].name, best);
    fflush(stdout);
  }
  return 0;
}
