/* Clients: a connection and the job that was started by it. Either may end before the other. */
#ifndef RINGFENCE_CLIENT_H
#define RINGFENCE_CLIENT_H

#include "job.h"
#include "system.h"
#include "wire.h"

enum { MAX_CONNECTIONS = 32, MAX_CLIENTS = 1 + MAX_CONNECTIONS };

struct client {
  struct wire wire;
  struct job job;
};

/* What an event is about; the rest of its data is the index of the client. */
enum about {
  ABOUT_SOURCE_0,
  ABOUT_SOURCE_1,
  ABOUT_LOG,    /* a pipe that was full */
  ABOUT_RELAY,  /* the host's side of one */
  ABOUT_MASTER, /* the job's side */
  ABOUT_SOCKET,
  ABOUT_SIGNALS,
  ABOUT_LISTENER,
  ABOUT_COUNT
};

struct sandbox {
  struct client clients[MAX_CLIENTS]; /* the first has the main job */
  int epoll;
  int proc;         /* /proc, or -1 */
  bool init;        /* we are PID 1 of a pid namespace: all that lives in it is ours */
  bool childless;   /* nothing is left to reap */
  bool reap_again;  /* stopped reaping to see to other things */
  bool ending;      /* all has been killed; we exit when it is gone, or at end_by */
  int64_t end_by;
  bool hurried;     /* the host wants the end: no slow reader is waited for */
  bool broken;      /* the launcher broke the protocol */
  uint32_t status;  /* to exit with */
};

extern struct sandbox sandbox;

/* Watch a descriptor for input. Closed it must be with unwatch first: a child before its execve may hold a copy. */
bool watch(int descriptor, uint32_t client, enum about about);
void unwatch(int descriptor);

/* All gates at once, in a page that is shared with first processes until they execute. */
bool clients_init(void);

/* A client that has neither connection nor job, or NULL. */
struct client *find_free(void);

void client_open(struct client *client, int sock);
void client_readable(struct client *client);
void client_output(struct client *client, int source);
void client_log(struct client *client);

/* `gone`: epoll says that nobody holds the host's end any more. */
void client_relay(struct client *client, bool gone);

/* Reap what has died, and see which first processes have become ready. */
void reap(void);

/* Kill what has passed its deadline, conclude what is over. */
void tick(int64_t now);

/* The first moment that tick has something to do, or INT64_MAX. */
int64_t next_tick(int64_t now);

/* The main job has not begun, or is not let go yet: nothing else may begin beside it. */
bool main_waits(void);

/* The signal `signo` was sent to us: it is meant for the main job. */
void forward(int signo);

/* Kill everything; the end follows when it is gone, or has not gone in time. */
void begin_ending(void);
bool has_ended(int64_t now);
_Noreturn void end(void);

#endif
