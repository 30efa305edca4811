/* A program that writes on: embed MODEL [PROMPT] [THREADS]
 *
 *   cc -std=c99 embed.c $(pkg-config --cflags --libs --static omq) -o embed */
#include <omq.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

static int show(void *user, const char *text, size_t bytes) {
  (void)user;
  fwrite(text, 1, bytes, stdout);
  return fflush(stdout); /* not 0, a broken pipe: stop */
}

static int failed(omq_model *model, omq_status status) {
  fprintf(stderr, "embed: status %d: %s\n", (int)status, omq_message(model));
  omq_close(model);
  return 1;
}

/* What of the process is in memory; Rss-File is the mapped model. */
static void show_memory(void) {
  char line[256];
  FILE *f = fopen("/proc/self/status", "r");
  while (f && fgets(line, sizeof line, f))
    if (!strncmp(line, "VmRSS", 5) || !strncmp(line, "RssAnon", 7) || !strncmp(line, "RssFile", 7))
      fputs(line, stderr);
  if (f) fclose(f);
}

int main(int argc, char **argv) {
  if (argc < 2) return fprintf(stderr, "usage: embed MODEL [PROMPT] [THREADS]\n"), 2;
  const char *prompt = argc > 2 ? argv[2] : "Once upon a time";
  omq_options options = {0};
  options.context = 256;
  if (argc > 3) options.threads = atoi(argv[3]);

  omq_model *model;
  omq_status status = omq_open(argv[1], &options, &model);
  if (status != OMQ_OK) return failed(model, status);

  int32_t ids[256];
  size_t count;
  status = omq_encode(model, prompt, strlen(prompt), ids, 256, &count);
  if (status != OMQ_OK) return failed(model, status);

  omq_sampling sampling = {0}; /* greedy */
  sampling.max_tokens = 48;
  omq_generated made;
  fputs(prompt, stdout);
  status = omq_generate(model, ids, count, &sampling, show, NULL, &made);
  putchar('\n');
  if (status != OMQ_OK && status != OMQ_CONTEXT_FULL) return failed(model, status);
  if (made.tokens > 1)
    fprintf(stderr, "%.1f tokens/s\n", (double)(made.tokens - 1) / made.decode_seconds);
  show_memory();
  omq_close(model);
  return 0;
}
