/* A runsc that answers what it is asked, and goes wrong in one way when it is to start a sandbox. */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

enum { FAILS, SAYS_WHY, ENDS, FLOODS, CRASHES, HANGS, LEAVES_A_CHILD };

static int start_wrongly(void) {
  static char flood[1 << 16];
  switch (WAY) {
    case SAYS_WHY: fputs("FATAL ERROR: no such luck\n\033[31mred\n", stderr); return 128;
    case ENDS: return 0;
    case FLOODS:
      memset(flood, 0xc3, sizeof flood);
      for (int i = 0; i < 64; i++) fwrite(flood, 1, sizeof flood, stderr);
      return 1;
    case CRASHES: abort();
    case HANGS: sleep(600); return 0;
    case LEAVES_A_CHILD:
      if (fork() == 0) sleep(600);
      return 0;
    default: return 1;
  }
}

int main(int count, char **words) {
  for (int i = 1; i < count; i++) {
    if (strcmp(words[i], "--detach") == 0) return start_wrongly();
    if (strcmp(words[i], "do") == 0) return 0; /* a trial of a platform, which on a busy machine may take long */
  }
  execv(REAL, words);
  return 1;
}
