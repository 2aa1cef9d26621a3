/* cc generate.c -I runtime/ops LIBRARY -o generate && ./generate model.slm "The sea is" */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "pocketslm.h"

static char line[512];
static const pslm_error error = {line, sizeof line};

static void check(pslm_status status) {
  if (status == PSLM_OK) return;
  fprintf(stderr, "%s\n", line);
  exit(1);
}

int main(int count, char** arguments) {
  if (count != 3) return 2;
  pslm_model* model;
  pslm_tokenizer* tokenizer;
  pslm_session* session;
  const pslm_options options = {.threads = 2};
  check(pslm_model_open(arguments[1], &model, error));
  check(pslm_tokenizer_open(model, &tokenizer, error));
  check(pslm_session_open(model, &options, &session, error));

  int32_t text[1024];
  size_t tokens;
  check(pslm_encode(tokenizer, arguments[2], strlen(arguments[2]), PSLM_TEXT_WHOLE, text, 1024,
                    &tokens, error));

  /* The prompt is read in parts and then goes on token by token: leave the loop to stop at any time. */
  const pslm_generation how = {.max_tokens = 40, .top_p = 1, .repetition_penalty = 1, .guesses = 7};
  pslm_generator* generator;
  pslm_made made = {0};
  check(pslm_generator_open(session, text, tokens, &how, &generator, error));
  while (made.finish == PSLM_GOES_ON) {
    check(pslm_generator_next(generator, &made, error));
    if (made.token < 0) continue;
    char bytes[256];
    size_t size;
    check(pslm_decode(tokenizer, &made.token, 1, PSLM_TEXT_GOES_ON, bytes, sizeof bytes, &size, error));
    fwrite(bytes, 1, size, stdout);
  }
  putchar('\n');
  pslm_generator_close(generator);
  pslm_session_close(session);
  pslm_tokenizer_close(tokenizer);
  pslm_model_close(model);
  return 0;
}
