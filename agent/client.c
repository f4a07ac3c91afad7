#define _GNU_SOURCE
#include "client.h"

#include <errno.h>
#include <signal.h>
#include <sys/epoll.h>
#include <sys/mman.h>
#include <sys/wait.h>
#include <unistd.h>

#include "report.h"

/* RELAY_MS: after the end of a job on a terminal, how long its reader may take nothing at all. */
enum { DRAIN_MS = 200, KILL_MS = 2000, RELAY_MS = 5000 };
enum { FRAMES_A_TURN = 4, REAPED_A_TURN = 64 };
enum { EXIT_NOT_EXECUTABLE = 126, EXIT_NOT_FOUND = 127 };
enum { LAST_SIGNAL = 64 };

struct sandbox sandbox;

static struct client *const main_client = &sandbox.clients[0];
static struct client *const no_client = &sandbox.clients[MAX_CLIENTS];

static bool set_watch(int operation, int descriptor, uint32_t client, enum about about, uint32_t events) {
  struct epoll_event event = {.events = events};
  event.data.u32 = client * ABOUT_COUNT + about;
  return epoll_ctl(sandbox.epoll, operation, descriptor, &event) == 0;
}

bool watch(int descriptor, uint32_t client, enum about about) {
  return set_watch(EPOLL_CTL_ADD, descriptor, client, about, EPOLLIN);
}

void unwatch(int descriptor) {
  epoll_ctl(sandbox.epoll, EPOLL_CTL_DEL, descriptor, NULL);
}

static bool watch_for(const struct client *client, int descriptor, enum about about) {
  return watch(descriptor, (uint32_t)(client - sandbox.clients), about);
}

/* A watch that is armed anew after each event: what waits for another descriptor stays silent, its hang-up too. It is
   had from the start, as a job can use up the watches of its uid. */
static bool watch_once(const struct client *client, int descriptor, enum about about) {
  return set_watch(EPOLL_CTL_ADD, descriptor, (uint32_t)(client - sandbox.clients), about, EPOLLONESHOT);
}

static void arm(const struct client *client, int descriptor, enum about about, uint32_t events) {
  set_watch(EPOLL_CTL_MOD, descriptor, (uint32_t)(client - sandbox.clients), about, events);
}

bool clients_init(void) {
  size_t bytes = MAX_CLIENTS * sizeof(struct gate);
  struct gate *gates = mmap(NULL, bytes, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
  if (gates == MAP_FAILED) return false;
  for (size_t i = 0; i < MAX_CLIENTS; i++) {
    wire_open(&sandbox.clients[i].wire, -1);
    job_none(&sandbox.clients[i].job, &gates[i]);
  }
  return true;
}

struct client *find_free(void) {
  for (struct client *client = main_client + 1; client < no_client; client++) {
    if (client->wire.sock < 0 && client->job.state == JOB_NONE) return client;
  }
  return NULL;
}

bool main_waits(void) {
  enum job_state state = main_client->job.state;
  return state == JOB_NONE || state == JOB_PREPARING || state == JOB_HELD;
}

static void kill_all(void) {
  if (sandbox.init) {
    kill(-1, SIGKILL);
    return;
  }
  for (struct client *client = main_client; client < no_client; client++) job_kill(&client->job, sandbox.proc);
}

void begin_ending(void) {
  kill_all();
  if (sandbox.ending) return;
  sandbox.ending = true;
  sandbox.end_by = now_ms() + KILL_MS;
}

static void end_job(const struct client *client) {
  if (client == main_client) begin_ending();
  else job_kill(&client->job, sandbox.proc);
}

/* Connections */

static void close_connection(struct client *client) {
  if (client->wire.sock < 0) return;
  wire_release(&client->wire);
  unwatch(client->wire.sock);
  close(client->wire.sock);
  client->wire.sock = -1;
}

/* Close a descriptor that epoll watches. */
static void close_watched(int *descriptor) {
  if (*descriptor < 0) return;
  unwatch(*descriptor);
  close(*descriptor);
  *descriptor = -1;
}

static void end_relay(struct client *client) {
  struct relay *relay = &client->job.relay;
  if (relay->sock < 0) return;
  unwatch(relay->sock);
  relay_close(relay);
}

static void give_up_relay(struct client *client) {
  if (client->job.relay.sock >= 0) client->job.output.truncated = true;
  end_relay(client);
}

/* What the end of a terminal's other side is to a job: SIGHUP, and nothing more to read. */
static void hang_up(struct client *client) {
  end_relay(client);
  close_watched(&client->job.master);
  /* tty_ioctl(4) has it that the kernel does this, but gVisor's does not. */
  job_signal(&client->job, SIGHUP);
  job_signal(&client->job, SIGCONT);
}

/* The connection is gone. Its job ends with it, unless it was let go as a detached one. */
static void lose(struct client *client) {
  const struct job *job = &client->job;
  bool let_go = job->state == JOB_RUNNING || (job->state == JOB_PREPARING && !(job->flags & START_HOLD));
  close_connection(client);
  if (job->flags & START_RELAY) hang_up(client);
  if (job->state == JOB_ENDING || (let_go && job->flags & START_DETACH)) return;
  end_job(client);
}

static void break_off(struct client *client) {
  if (client == main_client) {
    sandbox.broken = true;
    begin_ending();
  }
  lose(client);
}

static void answer(struct client *client, enum agent_frame type, const uint32_t *words, uint32_t count, int descriptor) {
  if (client->wire.sock < 0) return;
  if (!wire_send(&client->wire, (uint8_t)type, words, count, descriptor)) lose(client);
}

void client_open(struct client *client, int sock) {
  wire_open(&client->wire, sock);
  if (!watch_for(client, sock, ABOUT_SOCKET)) {
    lose(client);
    return;
  }
  const uint32_t words[] = {PROTOCOL_VERSION, (uint32_t)getpid()};
  answer(client, READY, words, 2, -1);
}

/* Frames: false is a protocol error */

static void start_clock(struct job *job) {
  if (job->deadline_ms > 0) job->deadline_at = now_ms() + job->deadline_ms;
}

static void watch_sources(struct client *client) {
  struct output *output = &client->job.output;
  for (int i = 0; i < SOURCES; i++) {
    if (output->sources[i] < 0 || watch_for(client, output->sources[i], ABOUT_SOURCE_0 + (enum about)i)) continue;
    /* A job can use up the watches of its uid: then this output is lost, and said to be. */
    output->truncated = true;
    if (output->sources[i] != client->job.master) close(output->sources[i]);
    output->sources[i] = -1;
  }
}

static void watch_output(struct client *client) {
  struct output *output = &client->job.output;
  /* A terminal's output follows when the job has it open: until then a read ends with EIO in gVisor's kernel. */
  if (!(client->job.flags & START_TTY)) watch_sources(client);
  if (output->held && !watch_once(client, output->log, ABOUT_LOG)) output->torn = true;
}

static void close_sources(struct job *job) {
  for (int i = 0; i < SOURCES; i++) {
    int descriptor = job->output.sources[i];
    if (descriptor < 0) continue;
    unwatch(descriptor);
    if (descriptor != job->master) close(descriptor);
    job->output.sources[i] = -1;
  }
  close_watched(&job->master);
}

static bool on_start(struct client *client) {
  struct wire *wire = &client->wire;
  struct job *job = &client->job;
  struct start start;
  if (job->state != JOB_NONE) return false;
  if (!parse_start(wire->header.flags, wire->payload, wire->header.length, &start)) return false;
  if (sandbox.ending || (client != main_client && main_waits())) {
    job->state = JOB_ENDING;
    job->stage = STAGE_FORK;
    job->error = EAGAIN;
    return true;
  }
  if (!job_start(job, wire->header.flags, &start, wire->descriptors)) {
    job->state = JOB_ENDING;
    close_sources(job);
    if (client == main_client) begin_ending();
    return true;
  }
  sandbox.childless = false;
  watch_output(client);
  if (!(job->flags & START_HOLD)) start_clock(job);
  return true;
}

static bool on_go(struct job *job) {
  if (job->state == JOB_ENDING) return true;
  if (job->state != JOB_PREPARING && job->state != JOB_HELD) return false;
  if (!(job->flags & START_HOLD) || job->gate->go) return false;
  if (job->state == JOB_HELD) job->state = JOB_RUNNING;
  start_clock(job);
  job_go(job);
  return true;
}

static bool on_signal(const struct client *client) {
  uint32_t signo = get_u32(client->wire.payload);
  if (signo < 1 || signo > LAST_SIGNAL) return false;
  job_signal(client->job.state == JOB_NONE ? &main_client->job : &client->job, (int)signo);
  return true;
}

static bool on_resize(const struct client *client) {
  const struct job *job = &client->job;
  if (job->state == JOB_NONE || !(job->flags & START_TTY)) return false;
  job_resize(job, get_u16(client->wire.payload), get_u16(client->wire.payload + 2));
  if (job->flags & START_RELAY) job_tell_size(job);
  return true;
}

/* Only before GO: then nothing of the job has run that could have changed what the kernel says of it. */
static bool on_report(struct client *client) {
  const struct job *job = &client->job;
  if (job->state == JOB_ENDING) return true; /* its end is the answer */
  if (job->state != JOB_HELD) return false;
  size_t bytes = HEADER_BYTES + MAX_REPORT_BYTES;
  uint8_t *frame = mmap(NULL, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  if (frame == MAP_FAILED) {
    lose(client);
    return true;
  }
  size_t length = report_write(frame + HEADER_BYTES, MAX_REPORT_BYTES, sandbox.proc, job->pid);
  bool sent = wire_send_large(&client->wire, REPORTED, frame, (uint32_t)length);
  munmap(frame, bytes);
  if (!sent) lose(client);
  return true;
}

static bool on_frame(struct client *client) {
  switch (client->wire.header.type) {
    case START: return on_start(client);
    case GO: return on_go(&client->job);
    case SIGNAL: return on_signal(client);
    case RESIZE: return on_resize(client);
    case REPORT: return on_report(client);
    case SHUTDOWN:
      sandbox.hurried = true;
      begin_ending();
      return true;
    default: return false;
  }
}

void client_readable(struct client *client) {
  for (int frames = 0; frames < FRAMES_A_TURN && client->wire.sock >= 0; frames++) {
    switch (wire_read(&client->wire)) {
      case WIRE_WAIT: return;
      case WIRE_END: lose(client); return;
      case WIRE_BAD: break_off(client); return;
      case WIRE_FRAME: break;
    }
    bool good = on_frame(client);
    wire_release(&client->wire);
    if (!good) break_off(client);
  }
}

/* Jobs */

/* The log is a full pipe: nothing is read until it has room, so that the job waits for its reader. */
static void wait_for_log(struct client *client) {
  const struct output *output = &client->job.output;
  for (int i = 0; i < SOURCES; i++) {
    if (output->sources[i] >= 0) arm(client, output->sources[i], ABOUT_SOURCE_0 + (enum about)i, EPOLLONESHOT);
  }
  arm(client, output->log, ABOUT_LOG, EPOLLOUT | EPOLLONESHOT);
}

void client_log(struct client *client) {
  struct output *output = &client->job.output;
  if (!output_is_stuck(output)) return;
  output_flush(output);
  if (output_is_stuck(output)) {
    wait_for_log(client);
    return;
  }
  for (int i = 0; i < SOURCES; i++) {
    if (output->sources[i] >= 0) arm(client, output->sources[i], ABOUT_SOURCE_0 + (enum about)i, EPOLLIN);
  }
}

void client_output(struct client *client, int source) {
  struct output *output = &client->job.output;
  int descriptor = output->sources[source];
  if (descriptor < 0) return;
  bool lives = output_pump(output, source);
  if (output_is_stuck(output)) wait_for_log(client);
  if (lives) return;
  unwatch(descriptor);
  /* The master stays: to close it would hang up a job that only let go of its terminal. */
  if (descriptor != client->job.master) close(descriptor);
  output->sources[source] = -1;
}

static void arm_relay(struct client *client) {
  const struct job *job = &client->job;
  uint32_t events = relay_master_events(&job->relay);
  /* The hang-up of the socket is always of interest. That of a terminal which nothing is wanted of would come again
     and again. */
  arm(client, job->relay.sock, ABOUT_RELAY, relay_socket_events(&job->relay) | EPOLLONESHOT);
  if (events) arm(client, job->master, ABOUT_MASTER, events | EPOLLONESHOT);
}

/* Not before the job has its terminal open: until then what is typed would be lost. */
static void start_relay(struct client *client) {
  struct job *job = &client->job;
  if (!watch_once(client, job->relay.sock, ABOUT_RELAY) || !watch_once(client, job->master, ABOUT_MASTER)) {
    job->output.truncated = true;
    hang_up(client);
    return;
  }
  arm_relay(client);
}

/* How long what is left of a job's output may take; for a relay, from the last time that its reader took something. */
static int64_t patience_ms(const struct job *job) {
  bool waits = job->relay.sock >= 0 && !sandbox.hurried && !(job->end_flags & TIMED_OUT);
  return waits ? RELAY_MS : DRAIN_MS;
}

void client_relay(struct client *client, bool gone) {
  struct job *job = &client->job;
  struct relay *relay = &job->relay;
  if (relay->sock < 0) return;
  relay->moved = false;
  enum relay_result result = gone ? RELAY_GONE : relay_turn(relay, job->master);
  if (relay->moved && job->state == JOB_ENDING) job->drain_by = now_ms() + patience_ms(job);
  switch (result) {
    case RELAY_ON: arm_relay(client); break;
    case RELAY_GONE: hang_up(client); break;
    /* The master stays: to close it would hang up a job that only let go of its terminal. */
    case RELAY_DONE: end_relay(client); break;
  }
}

/* Nobody is to write to the terminal any more: pass on what is there, as its reader takes it, but not for ever. */
static void finish_relay(struct client *client, int64_t now) {
  struct relay *relay = &client->job.relay;
  if (relay->sock < 0 || client->job.state != JOB_ENDING) return;
  if (now >= client->job.drain_by) {
    give_up_relay(client);
  } else if (!relay->last && (client != main_client || sandbox.childless || now >= sandbox.end_by)) {
    relay_finish(relay);
    client_relay(client, false);
  }
}

static bool is_drained(const struct job *job) {
  if (job->relay.sock >= 0) return false;
  for (int i = 0; i < SOURCES; i++) {
    if (job->output.sources[i] >= 0) return false;
  }
  return true;
}

static void note_prepared(struct client *client) {
  struct job *job = &client->job;
  if (job->state != JOB_PREPARING || !__atomic_load_n(&job->gate->prepared, __ATOMIC_ACQUIRE)) return;
  job->state = job->flags & START_HOLD && !job->gate->go ? JOB_HELD : JOB_RUNNING;
  const uint32_t words[] = {(uint32_t)job->pid, job->gate->descriptors};
  answer(client, PREPARED, words, 2, job->flags & (START_DETACH | START_RELAY) ? -1 : job->master);
  if (job->relay.sock >= 0) start_relay(client);
  else if (job->flags & START_TTY) watch_sources(client);
}

static void note_death(struct client *client, int wait_status) {
  struct job *job = &client->job;
  note_prepared(client);
  /* A terminal is not watched yet then, and nobody has written to it. */
  if (job->state == JOB_PREPARING && job->relay.sock < 0) close_sources(job);
  job_ended(job, wait_status);
  job->state = JOB_ENDING;
  job->deadline_at = 0;
  job->drain_by = now_ms() + patience_ms(job);
  /* What is left of a detached job would keep its pipes open; of others it may stay, as under a shell. */
  if (client == main_client) begin_ending();
  else if (job->flags & START_DETACH) job_kill(job, sandbox.proc);
}

static struct client *find_pid(pid_t pid) {
  for (struct client *client = main_client; client < no_client; client++) {
    if (client->job.pid == pid) return client;
  }
  return NULL;
}

void reap(void) {
  sandbox.reap_again = false;
  for (struct client *client = main_client; client < no_client; client++) note_prepared(client);
  for (int reaped = 0; reaped < REAPED_A_TURN; reaped++) {
    int wait_status;
    pid_t pid = waitpid(-1, &wait_status, WNOHANG);
    if (pid <= 0) {
      sandbox.childless = pid < 0 && errno == ECHILD;
      return;
    }
    struct client *client = find_pid(pid);
    if (client) note_death(client, wait_status);
  }
  sandbox.reap_again = true;
}

void forward(int signo) {
  if (main_client->job.state != JOB_NONE) {
    job_signal(&main_client->job, signo);
  } else if (signo != SIGUSR1 && signo != SIGUSR2) {
    sandbox.status = 128 + (uint32_t)signo;
    begin_ending();
  }
}

/* What `ringfence run` exits with. */
static uint32_t exit_code(const struct job *job) {
  if (job->stage == 0) return job->exit_code;
  if (job->stage != STAGE_EXEC) return EXIT_OWN_FAILURE;
  return job->error == ENOENT || job->error == ENOTDIR ? EXIT_NOT_FOUND : EXIT_NOT_EXECUTABLE;
}

/* The job is over: end its log, tell its client, forget both. */
static void conclude(struct client *client) {
  struct job *job = &client->job;
  uint32_t code = exit_code(job);
  if (output_is_stuck(&job->output) && !is_drained(job)) job->output.truncated = true;
  give_up_relay(client);
  close_sources(job);
  if (job->output.held) unwatch(job->output.log);
  if (job->output.truncated) job->end_flags |= OUTPUT_TRUNCATED;
  output_close(&job->output, code, job->signal, job->end_flags);
  if (job->stage) {
    const uint32_t words[] = {job->stage, job->error};
    answer(client, FAILED, words, 2, -1);
  } else {
    const uint32_t words[] = {code, job->signal, job->end_flags};
    answer(client, EXITED, words, 3, -1);
  }
  if (client == main_client) sandbox.status = code;
  job_none(job, job->gate);
  close_connection(client);
}

void tick(int64_t now) {
  for (struct client *client = main_client; client < no_client; client++) {
    struct job *job = &client->job;
    if (job->deadline_at && now >= job->deadline_at) {
      job->deadline_at = 0;
      job->end_flags |= TIMED_OUT;
      end_job(client);
    }
    finish_relay(client, now);
    if (client != main_client && job->state == JOB_ENDING && (is_drained(job) || now >= job->drain_by)) {
      conclude(client);
    }
  }
}

static int64_t earlier(int64_t one, int64_t other) {
  return one < other ? one : other;
}

int64_t next_tick(int64_t now) {
  int64_t next = sandbox.ending && now < sandbox.end_by ? sandbox.end_by : INT64_MAX;
  for (const struct client *client = main_client; client < no_client; client++) {
    if (client->job.deadline_at) next = earlier(next, client->job.deadline_at);
    bool drains = client != main_client || client->job.relay.sock >= 0;
    if (drains && client->job.state == JOB_ENDING) next = earlier(next, client->job.drain_by);
  }
  return next;
}

static bool main_reader_is_waited_for(void) {
  const struct job *job = &main_client->job;
  return job->state == JOB_ENDING && job->relay.sock >= 0 && !sandbox.hurried;
}

bool has_ended(int64_t now) {
  if (!sandbox.ending) return false;
  /* Only the main job's relay is waited for any longer: all else has had its time. */
  if (now >= sandbox.end_by) return !main_reader_is_waited_for();
  if (!sandbox.childless || !is_drained(&main_client->job)) return false;
  for (const struct client *client = main_client + 1; client < no_client; client++) {
    if (client->job.state != JOB_NONE) return false;
  }
  return true;
}

/* The main job comes last: its EXITED says that all is over. */
void end(void) {
  for (struct client *client = no_client; client-- > main_client;) {
    struct job *job = &client->job;
    if (job->state == JOB_NONE) continue;
    if (job->pid > 0) {
      /* Killed, but stuck in the kernel: our exit takes it along. */
      job->signal = SIGKILL;
      job->exit_code = 128 + SIGKILL;
    }
    conclude(client);
  }
  _exit(sandbox.broken ? EXIT_OWN_FAILURE : (int)sandbox.status);
}
