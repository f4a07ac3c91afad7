#define _GNU_SOURCE
#include "root.h"

#include <errno.h>
#include <fcntl.h>
#include <string.h>
#include <sys/mount.h>
#include <sys/stat.h>
#include <sys/sysmacros.h>
#include <unistd.h>

#include "files.h"

/* In the initramfs. The overlay's options, which a job can read, name its layers from the staging directory. */
#define STAGE "/stage"
#define ROOT "/job"
#define SKELETON "skeleton"
#define IMAGE "image"
#define SCRATCH "scratch"
#define AGENT "/.ringfence"

enum { PLAIN = MS_NOSUID | MS_NODEV, STILL = PLAIN | MS_NOEXEC };
/* The agent and a few small files; mount points, one inode each. */
enum { STAGE_BYTES = 16 << 20, STAGE_INODES = 4096 };
enum { DEVICE_BYTES = 64 << 10, DEVICE_INODES = 64 };
enum { OPTIONS_BYTES = 512, NAME_BYTES = 32 };
static const struct room stage_room = {STAGE_BYTES, STAGE_INODES};

struct builder {
  int stage;       /* the staging directory, which is also the current one */
  int skeleton;
  int image;
  int root;        /* -1 as long as the root is not mounted */
  unsigned disks;  /* staged so far */
  unsigned shares;
};

static int open_directory(const char *path) {
  return open(path, O_RDONLY | O_DIRECTORY | O_NOFOLLOW | O_CLOEXEC);
}

/* Mounts */

static bool mount_tmpfs(const char *at, unsigned long flags, struct room room, uint32_t mode, uint32_t uid,
                        uint32_t gid) {
  char options[OPTIONS_BYTES];
  struct text text;
  text_begin(&text, options, sizeof options);
  text_add(&text, "size=");
  text_add_number(&text, room.bytes, 10);
  text_add(&text, ",nr_inodes=");
  text_add_number(&text, room.inodes, 10);
  text_add(&text, ",mode=");
  text_add_number(&text, mode, 8);
  text_add(&text, ",uid=");
  text_add_number(&text, uid, 10);
  text_add(&text, ",gid=");
  text_add_number(&text, gid, 10);
  return mount("tmpfs", at, "tmpfs", flags, options) == 0;
}

/* `upper` holds files/ and work/; NULL: nothing can be written. */
static bool mount_overlay(const char *at, const char *lower, const char *below, const char *upper) {
  char options[OPTIONS_BYTES];
  struct text text;
  text_begin(&text, options, sizeof options);
  text_add(&text, "redirect_dir=nofollow,metacopy=off,lowerdir=");
  text_add(&text, lower);
  if (below) {
    text_add(&text, ":");
    text_add(&text, below);
  }
  if (upper) {
    text_add(&text, ",upperdir=");
    text_add(&text, upper);
    text_add(&text, "/files,workdir=");
    text_add(&text, upper);
    text_add(&text, "/work");
  }
  errno = ENAMETOOLONG;
  return text.fits && mount("overlay", at, "overlay", PLAIN | (upper ? 0 : MS_RDONLY), options) == 0;
}

static bool mount_disk(const struct disk *disk, const char *at) {
  char device[NAME_BYTES];
  struct text text;
  text_begin(&text, device, sizeof device);
  text_add(&text, "/dev/");
  text_add(&text, disk->device);
  return text.fits && mount(device, at, disk->type, PLAIN | MS_RDONLY, NULL) == 0;
}

/* Mount onto what a descriptor stands for: no name is looked up twice. */
static bool mount_on(int target, const char *source, const char *type, unsigned long flags, const char *options) {
  char link[LINK_BYTES];
  return mount(source, descriptor_link(target, link), type, flags, options) == 0;
}

static bool closed(int descriptor, bool good) {
  int error = errno;
  close(descriptor);
  errno = error;
  return good;
}

static int target_of(const struct builder *builder, const char *path) {
  return open_below(builder->root, path, O_PATH);
}

/* The root */

static bool begin_stage(struct builder *builder) {
  if (mkdir(STAGE, 0700) != 0 || mkdir(ROOT, 0755) != 0) return false;
  if (!mount_tmpfs(STAGE, PLAIN, stage_room, 0711, 0, 0) || chdir(STAGE) != 0) return false;
  if (mkdir(SKELETON, 0755) != 0 || mkdir(IMAGE, 0755) != 0) return false;
  builder->stage = open_directory(".");
  builder->skeleton = open_directory(SKELETON);
  return builder->stage >= 0 && builder->skeleton >= 0;
}

/* Mount points of the kernel's file systems, so that no image has to have, or can lead elsewhere with, any of them. */
static bool begin_skeleton(const struct builder *builder, const struct setup *setup) {
  return make_directory(builder->skeleton, "/proc", 0755, 0, 0) &&
         make_directory(builder->skeleton, "/dev", 0755, 0, 0) &&
         (!setup->sysfs || make_directory(builder->skeleton, "/sys", 0755, 0, 0)) &&
         copy_file(builder->skeleton, AGENT, "/init", 0555);
}

static bool mount_image(struct builder *builder, const struct setup *setup) {
  if (setup->root.device && !mount_disk(&setup->root, IMAGE)) return false;
  builder->image = open_directory(IMAGE);
  return builder->image >= 0;
}

/* A tmpfs with room for what is changed, laid out for an overlay. */
static bool make_upper(const char *name, struct room room) {
  char work[NAME_BYTES];
  char files[NAME_BYTES];
  struct text text;
  text_begin(&text, files, sizeof files);
  text_add(&text, name);
  text_add(&text, "/files");
  text_begin(&text, work, sizeof work);
  text_add(&text, name);
  text_add(&text, "/work");
  return mkdir(name, 0700) == 0 && mount_tmpfs(name, PLAIN, room, 0700, 0, 0) && mkdir(files, 0755) == 0 &&
         mkdir(work, 0700) == 0;
}

static bool mount_root(struct builder *builder, const struct setup *setup) {
  bool writable = setup->upper.bytes > 0;
  if (writable && !make_upper("upper", setup->upper)) return false;
  if (!mount_overlay(ROOT, SKELETON, IMAGE, writable ? "upper" : NULL)) return false;
  builder->root = open_directory(ROOT);
  return builder->root >= 0;
}

/* The kernel's file systems */

static bool make_node(const char *name, unsigned major_number, unsigned minor_number) {
  return mknod(name, S_IFCHR | 0666, makedev(major_number, minor_number)) == 0 && chmod(name, 0666) == 0;
}

/* In the new /dev, which is the current directory. There is no console and no disk: they are the guest's own. */
static bool fill_devices(const struct setup *setup) {
  return make_node("null", 1, 3) && make_node("zero", 1, 5) && make_node("full", 1, 7) && make_node("random", 1, 8) &&
         make_node("urandom", 1, 9) && make_node("tty", 5, 0) && symlink("pts/ptmx", "ptmx") == 0 &&
         symlink("/proc/self/fd", "fd") == 0 && symlink("/proc/self/fd/0", "stdin") == 0 &&
         symlink("/proc/self/fd/1", "stdout") == 0 && symlink("/proc/self/fd/2", "stderr") == 0 &&
         mkdir("pts", 0755) == 0 && mkdir("shm", 0755) == 0 &&
         mount("devpts", "pts", "devpts", MS_NOSUID | MS_NOEXEC, "newinstance,ptmxmode=0666,mode=0620,max=64") == 0 &&
         mount_tmpfs("shm", STILL, setup->shm, 01777, 0, 0);
}

static bool make_devices(const struct builder *builder, const struct setup *setup) {
  static const struct room room = {DEVICE_BYTES, DEVICE_INODES};
  if (!mount_tmpfs(ROOT "/dev", MS_NOSUID | MS_NOEXEC, room, 0755, 0, 0) || chdir(ROOT "/dev") != 0) return false;
  return fill_devices(setup) && fchdir(builder->stage) == 0;
}

static bool mount_kernel(const struct builder *builder, const struct setup *setup, struct place *place) {
  place->what = "proc";
  if (mount("proc", ROOT "/proc", "proc", STILL, NULL) != 0) return false;
  place->what = "sysfs";
  if (setup->sysfs && mount("sysfs", ROOT "/sys", "sysfs", STILL | MS_RDONLY, NULL) != 0) return false;
  place->what = "dev";
  return make_devices(builder, setup);
}

/* What hides information or keeps from writing; a kernel that does not have the file has nothing to hide. */

static bool mask(int target) {
  static const struct room nothing = {4096, 1};
  struct stat found;
  if (fstat(target, &found) != 0) return false;
  if (!S_ISDIR(found.st_mode)) return mount_on(target, ROOT "/dev/null", NULL, MS_BIND, NULL);
  char link[LINK_BYTES];
  return mount_tmpfs(descriptor_link(target, link), STILL | MS_RDONLY, nothing, 0555, 0, 0);
}

static bool make_read_only(const struct builder *builder, int target, const char *path) {
  char link[LINK_BYTES];
  if (!mount_on(target, descriptor_link(target, link), NULL, MS_BIND, NULL)) return false;
  int covered = target_of(builder, path); /* the new mount; the other descriptor is below it */
  if (covered < 0) return false;
  return closed(covered, mount_on(covered, NULL, NULL, MS_REMOUNT | MS_BIND | MS_RDONLY | STILL, NULL));
}

static bool guard(const struct builder *builder, const struct step *step) {
  int target = target_of(builder, step->path);
  if (target < 0) return errno == ENOENT;
  return closed(target, step->kind == STEP_MASK ? mask(target) : make_read_only(builder, target, step->path));
}

/* What the plan mounts */

static bool add_tmpfs(const struct builder *builder, const struct step *step) {
  int target = target_of(builder, step->path);
  if (target < 0) return false;
  char link[LINK_BYTES];
  bool good = mount_tmpfs(descriptor_link(target, link), PLAIN, step->room, step->mode, step->uid, step->gid);
  return closed(target, good);
}

static bool add_scratch(const struct step *step) {
  return mkdir(SCRATCH, 0711) == 0 && mount_tmpfs(SCRATCH, PLAIN, step->room, 0711, 0, 0);
}

static const char *numbered(const char *words, unsigned number, char room[NAME_BYTES]) {
  struct text text;
  text_begin(&text, room, NAME_BYTES);
  text_add(&text, words);
  text_add_number(&text, number, 10);
  return room;
}

/* One directory of the scratch file system, which all shares together may fill. */
static bool add_share(struct builder *builder, const struct step *step) {
  char source[NAME_BYTES];
  numbered(SCRATCH "/", builder->shares++, source);
  if (mkdir(source, 0755) != 0 || chown(source, step->uid, step->gid) != 0) return false;
  int target = target_of(builder, step->path);
  return target >= 0 && closed(target, mount_on(target, source, NULL, MS_BIND, NULL));
}

/* Refuse /bin/x where the image has a link /bin: a directory of ours would hide all that it leads to. */
static bool is_plain_in_image(const struct builder *builder, const char *path) {
  int found = open_below(builder->image, path, O_PATH | O_NOFOLLOW);
  if (found >= 0) return closed(found, true);
  return errno == ENOENT || errno == ENOTDIR;
}

/* The directory that a writable disk shows first is the upper one: it is made to look like the disk's own. */
static bool look_alike(const char *upper, const char *lower) {
  struct stat found;
  char files[NAME_BYTES];
  struct text text;
  text_begin(&text, files, sizeof files);
  text_add(&text, upper);
  text_add(&text, "/files");
  return stat(lower, &found) == 0 && chown(files, found.st_uid, found.st_gid) == 0 &&
         chmod(files, found.st_mode & 01777) == 0;
}

static bool add_changes(const char *lower, const struct step *step, int target, unsigned number) {
  char upper[NAME_BYTES];
  char link[LINK_BYTES];
  numbered("upper", number, upper);
  return make_upper(upper, step->room) && look_alike(upper, lower) &&
         mount_overlay(descriptor_link(target, link), lower, NULL, upper);
}

static bool add_disk(struct builder *builder, const struct step *step) {
  if (!is_plain_in_image(builder, step->path)) return false;
  int target = target_of(builder, step->path);
  if (target < 0) return false;
  char link[LINK_BYTES];
  if (step->room.bytes == 0) return closed(target, mount_disk(&step->disk, descriptor_link(target, link)));
  char lower[NAME_BYTES];
  unsigned number = builder->disks++;
  numbered("disk", number, lower);
  bool good = mkdir(lower, 0755) == 0 && mount_disk(&step->disk, lower) && add_changes(lower, step, target, number);
  return closed(target, good);
}

static bool add_name(const struct builder *builder, const struct step *step) {
  int below = builder->root >= 0 ? builder->root : builder->skeleton;
  switch (step->kind) {
    case STEP_DIRECTORY: return make_directory(below, step->path, step->mode, step->uid, step->gid);
    case STEP_FILE: return make_file(below, step->path, step->text, step->mode);
    default: return make_link(below, step->path, step->text);
  }
}

static bool add_mount(struct builder *builder, const struct step *step) {
  switch (step->kind) {
    case STEP_TMPFS: return add_tmpfs(builder, step);
    case STEP_SCRATCH: return add_scratch(step);
    case STEP_SHARE: return add_share(builder, step);
    case STEP_DISK: return add_disk(builder, step);
    default: return guard(builder, step);
  }
}

static bool is_name(enum step_kind kind) {
  return kind == STEP_DIRECTORY || kind == STEP_FILE || kind == STEP_LINK;
}

static bool complete_root(struct builder *builder, const struct setup *setup, struct place *place) {
  *place = (struct place){"overlay", ""};
  return mount_root(builder, setup) && mount_kernel(builder, setup, place);
}

/* Names up to the first mount are the skeleton's; later ones lie in what is mounted by then. */
static bool take_steps(struct builder *builder, const struct setup *setup, struct place *place) {
  static const char *const keys[] = {"sysctl",  "dir",   "file", "link", "tmpfs",
                                     "scratch", "share", "disk", "mask", "readonly"};
  for (size_t i = 0; i < setup->step_count; i++) {
    const struct step *step = &setup->steps[i];
    if (step->kind == STEP_SYSCTL) continue; /* of the whole kernel */
    if (!is_name(step->kind) && builder->root < 0 && !complete_root(builder, setup, place)) return false;
    *place = (struct place){keys[step->kind], step->path ? step->path : ""};
    if (!(is_name(step->kind) ? add_name(builder, step) : add_mount(builder, step))) return false;
  }
  return builder->root >= 0 || complete_root(builder, setup, place);
}

bool build_root(const struct setup *setup, struct place *place) {
  struct builder builder = {.stage = -1, .skeleton = -1, .image = -1, .root = -1};
  *place = (struct place){"stage", ""};
  if (mount(NULL, "/", NULL, MS_REC | MS_PRIVATE, NULL) != 0 || !begin_stage(&builder)) return false;
  if (!begin_skeleton(&builder, setup)) return false;
  *place = (struct place){"root", setup->root.device ? setup->root.device : ""};
  return mount_image(&builder, setup) && take_steps(&builder, setup, place);
  /* The descriptors are closed by execve. */
}

bool enter_root(struct place *place) {
  static const char *const others[] = {STAGE, "/cgroup", "/sys", "/dev", "/proc"};
  *place = (struct place){"enter", ""};
  if (chdir("/") != 0) return false;
  for (size_t i = 0; i < sizeof others / sizeof *others; i++) {
    if (umount2(others[i], MNT_DETACH | UMOUNT_NOFOLLOW) != 0) return false;
  }
  /* An initramfs cannot be pivoted away. Moved over it, the new root is what ".." of the new root leads to as well. */
  return chdir(ROOT) == 0 && mount(".", "/", NULL, MS_MOVE, NULL) == 0 && chroot(".") == 0 && chdir("/") == 0;
}
