/* What a job in a microVM's guest can do and cannot: one question a run, the answer on stdout. */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <sched.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/klog.h>
#include <sys/mount.h>
#include <sys/ptrace.h>
#include <sys/random.h>
#include <sys/reboot.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/sysmacros.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

static void tell(const char *what, long result) {
  printf("%s %d\n", what, result < 0 ? errno : 0);
  fflush(stdout);
}

/* The port that the guest's own connection to the host may have had; by way of the machine itself. */
static int own_vsock(void) {
  const struct {
    unsigned short family, reserved;
    unsigned port, cid;
    unsigned char rest[4];
  } address = {.family = AF_VSOCK, .port = 1, .cid = 1};
  int sock = socket(AF_VSOCK, SOCK_STREAM, 0);
  return sock < 0 ? -1 : connect(sock, (const struct sockaddr *)&address, sizeof address);
}

/* Each of these would be a way to the guest's init, its kernel or its devices. */
static void refused(void) {
  const struct timespec past = {.tv_sec = 1};
  tell("mount", mount("x", "/tmp", "tmpfs", 0, NULL));
  tell("umount", umount2("/proc", MNT_DETACH));
  tell("mknod", mknod("/tmp/vda", S_IFBLK | 0666, makedev(254, 0)));
  tell("sethostname", sethostname("x", 1));
  tell("settime", clock_settime(CLOCK_REALTIME, &past));
  tell("reboot", reboot(RB_AUTOBOOT));
  tell("klog", klogctl(3, (char[64]){0}, 64));
  tell("chroot", chroot("/tmp"));
  tell("setuid", setuid(0));
  tell("ptrace", ptrace(PTRACE_ATTACH, 1, NULL, NULL));
  tell("agent-memory", open("/proc/1/mem", O_RDWR));
  tell("agent-descriptors", open("/proc/1/fd", O_RDONLY));
  tell("kmsg", open("/dev/kmsg", O_RDONLY));
  tell("port", open("/dev/vport0p1", O_RDWR));
  tell("disk", open("/dev/vda", O_RDONLY));
  tell("console", open("/dev/console", O_RDWR));
  tell("write-device-directory", open("/dev/x", O_WRONLY | O_CREAT, 0600));
  tell("write-sysctl", open("/proc/sys/kernel/hostname", O_WRONLY));
  tell("write-agent", open("/.ringfence", O_WRONLY));
  tell("remove-agent", unlink("/.ringfence"));
  tell("vsock", own_vsock());
}

/* As many children as there may be. */
static void spawn(void) {
  int count = 0;
  for (pid_t pid; count < 1000; count++) {
    pid = fork();
    if (pid == 0) {
      for (;;) pause();
    }
    if (pid < 0) break;
  }
  printf("%d %d\n", count, errno);
  fflush(stdout);
  kill(0, SIGKILL); /* and us */
}

static void eat(size_t bytes) {
  char *room = malloc(bytes);
  for (size_t at = 0; room && at < bytes; at += 4096) room[at] = 1;
  printf("%zu\n", room ? bytes : 0);
}

/* Without waiting: an answer means that the kernel's generator has been given its seed. */
static void random_now(void) {
  unsigned char bytes[16];
  if (getrandom(bytes, sizeof bytes, GRND_NONBLOCK) != sizeof bytes) {
    printf("errno %d\n", errno);
    return;
  }
  for (size_t i = 0; i < sizeof bytes; i++) printf("%02x", bytes[i]);
  printf("\n");
}

/* The old way out of a chroot, for who may call it: what is above the root is the root again, or it is not. */
static void escape(void) {
  tell("directory", mkdir("/work/cage", 0755));
  tell("chroot", chroot("/work/cage"));
  for (int i = 0; i < 64; i++) {
    if (chdir("..") != 0) break;
  }
  tell("out", chroot("."));
  tell("init", access("/init", F_OK));
  tell("stage", access("/stage", F_OK));
  tell("cgroup", access("/cgroup", F_OK));
  tell("agent", access("/.ringfence", F_OK));
}

int main(int argc, char **argv) {
  const char *what = argc > 1 ? argv[1] : "";
  if (strcmp(what, "refused") == 0) refused();
  if (strcmp(what, "spawn") == 0) spawn();
  if (strcmp(what, "eat") == 0 && argc > 2) eat(strtoul(argv[2], NULL, 10));
  if (strcmp(what, "random") == 0) random_now();
  if (strcmp(what, "escape") == 0) escape();
  return 0;
}
