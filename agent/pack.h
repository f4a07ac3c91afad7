/* Files out of a sandbox, and into one: the agent's binary as an ordinary job, which has a job's rights and limits. */
#ifndef RINGFENCE_PACK_H
#define RINGFENCE_PACK_H

/* What both exit with; what is wrong with which file stands on stderr, as "ERRNO PATH" and a NUL for each. */
enum { PACK_ALL = 0, PACK_SOME = 1, PACK_FAILED = 2 };

/* `PATH FOLLOW`: write PATH, and all that is below it, to stdout. Its own name becomes ".", "./NAME" is below it. A
   symlink is packed as one; PATH itself is followed with FOLLOW "1". What is no file, directory or symlink is left out
   (errno 0), as is what cannot be read. */
int pack(char **argv);

/* `PATH NAME`: read such an archive from stdin. Where PATH is a directory, "." becomes NAME in it, or, with an empty NAME,
   PATH itself; else PATH is the name of ".", and with a slash at its end that has to be a directory. Nothing leads out
   of what is made: no symlink on the way is followed. What is in the way is replaced, but never a directory, and
   nothing by one. */
int unpack(char **argv);

#endif
