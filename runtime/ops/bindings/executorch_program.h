/* C interface to ExecuTorch's own runtime for programs of the LLM runner's kind: what its Python
 * bindings do, without torch's Python. One program is used by one thread at a time. */
#pragma once

#include "pocketslm.h"

#ifdef __cplusplus
extern "C" {
#endif

typedef struct pslm_et_program pslm_et_program;

/* Time and calls of one operator since the program was loaded. */
typedef struct {
  const char* name;
  uint64_t calls;
  uint64_t ns;
} pslm_et_clock;

/* Threads of ExecuTorch's pool, which the whole process shares. */
PSLM_API void pslm_et_set_threads(uint32_t threads);

PSLM_API pslm_status pslm_et_open(const char* path, pslm_et_program** program, pslm_error error);
PSLM_API void pslm_et_close(pslm_et_program* program);
/* Runs a method without inputs whose outputs are integers or booleans. `count`: room in `numbers`,
 * then how many there are. */
PSLM_API pslm_status pslm_et_numbers(const pslm_et_program* program, const char* method,
                                     int64_t* numbers, size_t* count, pslm_error error);
/* Loads forward(tokens int64 [1, n], start int64 [1]) -> logits [..., vocabulary]. With `timed`,
 * every operator outside a delegate is timed; one such program at a time in a process. */
PSLM_API pslm_status pslm_et_load(pslm_et_program* program, int timed, size_t* longest,
                                  size_t* vocabulary, pslm_error error);
/* Writes the last token's logits [vocabulary]. */
PSLM_API pslm_status pslm_et_forward(pslm_et_program* program, const int64_t* tokens, size_t count,
                                     int64_t start, float* logits, pslm_error error);
/* The operators that have run since the timed program was loaded; returns how many there are,
 * writes at most `room`. */
PSLM_API size_t pslm_et_clocks(pslm_et_clock* clocks, size_t room);

#ifdef __cplusplus
}
#endif
