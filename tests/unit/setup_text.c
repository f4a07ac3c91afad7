/* Parses the setup text on stdin with the guest's own parser, and prints what came of it, one thing a line. */
#include <stdio.h>

#include "setup.h"

static struct setup setup;
static char text[(1 << 20) + 1];

static void print_disk(const char *name, const struct disk *disk) {
  if (disk->device) printf("%s %s %s\n", name, disk->device, disk->type);
}

static void print_room(const char *name, struct room room) {
  if (room.bytes) printf("%s %llu %llu\n", name, (unsigned long long)room.bytes, (unsigned long long)room.inodes);
}

static void print_step(const struct step *step) {
  const char *path = step->path ? step->path : "-";
  unsigned long long bytes = step->room.bytes;
  printf("step %d %s mode=%o uid=%u gid=%u", step->kind, path, step->mode, step->uid, step->gid);
  if (bytes) printf(" room=%llu:%llu", bytes, (unsigned long long)step->room.inodes);
  if (step->disk.device) printf(" disk=%s:%s", step->disk.device, step->disk.type);
  if (step->text) printf(" text=%s", step->text);
  printf("\n");
}

int main(void) {
  size_t length = fread(text, 1, sizeof text, stdin);
  const char *wrong = parse_setup(text, length, &setup);
  if (wrong) {
    printf("wrong %s\n", wrong);
    return 0;
  }
  unsigned long long capabilities = setup.capabilities;
  printf("hostname %s\nids %u %u\ncaps %llx\n", setup.hostname, setup.uid, setup.gid, capabilities);
  printf("limits %llu %llu %llu\n", (unsigned long long)setup.memory_bytes, (unsigned long long)setup.swap_bytes,
         (unsigned long long)setup.pids);
  printf("filter %d", setup.instructions);
  for (int i = 0; i < setup.instructions; i++) printf(" %016llx", (unsigned long long)setup.filter[i]);
  printf("\nsysfs %d\n", setup.sysfs);
  print_disk("root", &setup.root);
  print_room("upper", setup.upper);
  print_room("shm", setup.shm);
  for (int i = 0; i < MAX_RLIMITS; i++) {
    const struct rlimit_step *limit = &setup.rlimits[i];
    unsigned long long soft = limit->soft;
    if (limit->given) printf("rlimit %d %llu %llu\n", i, soft, (unsigned long long)limit->hard);
  }
  for (size_t i = 0; i < setup.step_count; i++) print_step(&setup.steps[i]);
  return 0;
}
