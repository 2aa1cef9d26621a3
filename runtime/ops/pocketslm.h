/* The C border of the native engine.
 *
 * Every function that can fail returns a status and, where it takes `error`, writes one line of
 * text into the caller's buffer. Nothing throws or exits across this border.
 *
 * Threads. A model may be shared by any number of sessions and threads. A session serves one thread
 * at a time: a second one that comes in meanwhile gets PSLM_ERROR_BUSY and changes nothing, and
 * pslm_session_close leaves a session alone that another thread is in. pslm_length may always be
 * asked. After fork() the child has no more than the calling thread: there, sessions of several
 * threads give PSLM_ERROR_FORK, and closing one frees nothing.
 *
 * Files. A model file is mapped, and read for as long as the model is open. Whoever cuts or rewrites
 * it in place meanwhile ends this process with SIGBUS or changes its answers: write a new file beside
 * it and rename() it over the old one, whose content stays with those that have it open.
 */
#ifndef POCKETSLM_H
#define POCKETSLM_H

#include <stddef.h>
#include <stdint.h>

#if defined(__GNUC__)
#define PSLM_API __attribute__((visibility("default")))
#else
#define PSLM_API
#endif

#ifdef __cplusplus
extern "C" {
#endif

#define PSLM_ABI_VERSION 11

typedef enum {
  PSLM_OK = 0,
  PSLM_ERROR_ARGUMENT = 1, /* a null pointer, an out-of-range token, an unknown option value */
  PSLM_ERROR_FILE = 2,     /* the file cannot be opened or mapped */
  PSLM_ERROR_FORMAT = 3,   /* the file is not a valid model.slm of a known version */
  PSLM_ERROR_CONTEXT = 4,  /* the tokens do not fit the session's context */
  PSLM_ERROR_MEMORY = 5,
  PSLM_ERROR_ISA = 6,        /* the named kernel path is unknown or this CPU lacks it */
  PSLM_ERROR_BUSY = 7,       /* another thread is in the session */
  PSLM_ERROR_FORK = 8,       /* the session's threads stayed behind in a fork */
  PSLM_ERROR_NOT_FINITE = 9, /* the model computes NaN or infinity */
  PSLM_ERROR_GRAMMAR = 10    /* a schema, an expression or a grammar is wrong, or costs too much */
} pslm_status;

typedef enum {
  PSLM_KV_F16 = 0,
  PSLM_KV_I8 = 1,
  PSLM_KV_CALLER = 2 /* fp16 in the caller's memory: see pslm_bind_cache */
} pslm_kv_type;
enum {
  PSLM_TEXT_SPECIAL = 1, /* encode: the names of special tokens mean them; not for users' text */
  PSLM_TEXT_WHOLE = 2,   /* encode: with what stands around a text, such as BOS; not for chats */
  PSLM_TEXT_GOES_ON = 4, /* it is not the beginning of a text; not beside PSLM_TEXT_WHOLE */
  PSLM_TEXT_NORMALIZED = 8 /* encode: as the tokenizer.json says, and without added tokens; not
                              beside PSLM_TEXT_WHOLE */
};
typedef enum { PSLM_LOGITS_NONE = 0, PSLM_LOGITS_LAST = 1, PSLM_LOGITS_ALL = 2 } pslm_logits;

typedef struct pslm_model pslm_model;
typedef struct pslm_session pslm_session;
typedef struct pslm_tokenizer pslm_tokenizer;

typedef struct {
  char* text; /* may be null */
  size_t capacity;
} pslm_error;

typedef struct {
  /* heads, kv_heads, head_dim, intermediate_size: the widest of any layer */
  uint32_t hidden_size, layers, heads, kv_heads, head_dim, intermediate_size, vocab_size;
  uint32_t max_context; /* what the model was trained for */
  uint32_t output_size; /* floats of a row of "logits": vocab_size, or hidden_size of an encoder */
  uint32_t states;      /* see pslm_model_state */
  uint64_t file_bytes;
  uint64_t bytes_per_token; /* weight bytes that one greedy token reads */
  uint64_t macs_per_token;  /* multiply-accumulates of one token in the layers, attention apart */
  uint64_t head_macs;       /* the same in the output head */
} pslm_model_info;

typedef struct {
  uint32_t context; /* positions; 0 means the model's own maximum */
  uint32_t threads; /* 1 to 64; 0 means one per available CPU, at most 8 */
  uint32_t kv_type; /* pslm_kv_type */
  uint32_t pin;     /* 1: bind thread i to the i-th fastest available CPU */
  const char* isa;  /* null or "auto": $POCKETSLM_ISA if set, else the best of this CPU */
} pslm_options;

typedef struct {
  uint32_t context, threads, kv_type;
  uint64_t kv_bytes; /* reserved address space; pages are touched as positions fill */
  const char* isa;   /* the kernel path in use */
} pslm_session_info;

PSLM_API uint32_t pslm_abi_version(void);
/* The compiler that built this, with its version: speed depends on it. */
PSLM_API const char* pslm_compiler(void);
/* Names of the kernel paths that this CPU can run, best first, null-terminated. */
PSLM_API const char* const* pslm_isa_names(void);

PSLM_API pslm_status pslm_model_open(const char* path, pslm_model** model, pslm_error error);
/* The same for the bytes of a model.slm in the caller's memory, 64-byte aligned, which must outlive
 * the model. */
PSLM_API pslm_status pslm_model_view(const void* data, size_t bytes, pslm_model** model,
                                     pslm_error error);
PSLM_API void pslm_model_close(pslm_model* model);
PSLM_API pslm_status pslm_model_describe(const pslm_model* model, pslm_model_info* info);
/* What a session keeps of its tokens: keys and values (PSLM_STATE_KV: KV heads, head size, and the
 * window or 0) or the last columns of a convolution (PSLM_STATE_CONV: width, taps, 0). */
enum { PSLM_STATE_KV = 1, PSLM_STATE_CONV = 2 };
typedef struct {
  uint32_t kind, sizes[3];
} pslm_state_info;
PSLM_API pslm_status pslm_model_state(const pslm_model* model, uint32_t index,
                                      pslm_state_info* info);
/* An opaque section of the file, such as the tokenizer; null and 0 where the file has none. */
PSLM_API const void* pslm_model_blob(const pslm_model* model, uint32_t role, size_t* bytes);

/* The tokenizer that export packed into the file, an error where it packed none. The model must
 * outlive it. It holds no state: any number of threads may use one at once. */
PSLM_API pslm_status pslm_tokenizer_open(const pslm_model* model, pslm_tokenizer** tokenizer,
                                         pslm_error error);
PSLM_API void pslm_tokenizer_close(pslm_tokenizer* tokenizer);
/* The bytes of all tokens, special ones too: those of token i are bytes[offsets[i]] up to
 * bytes[offsets[i + 1]], for i < count. They live as long as the model. */
PSLM_API pslm_status pslm_tokenizer_pieces(const pslm_tokenizer* tokenizer, const char** bytes,
                                           const uint32_t** offsets, size_t* count);
/* PSLM_TEXT_NORMALIZED where the caller has to normalize (a Unigram), else 0: pslm_encode takes no
 * other text then, and no such text otherwise. */
PSLM_API uint32_t pslm_tokenizer_takes(const pslm_tokenizer* tokenizer);
/* UTF-8 to tokens; `flags` are PSLM_TEXT_ values. `count` becomes the number of tokens. Where they
 * are more than `capacity`, none is written, which is an error unless `capacity` is 0. */
PSLM_API pslm_status pslm_encode(const pslm_tokenizer* tokenizer, const char* text, size_t bytes,
                                 uint32_t flags, int32_t* tokens, size_t capacity, size_t* count,
                                 pslm_error error);
/* Tokens to text, to which special ones add nothing; `bytes` and `capacity` as above. A character
 * may end in a later token, so text by the token is to be joined before it is read as UTF-8. */
PSLM_API pslm_status pslm_decode(const pslm_tokenizer* tokenizer, const int32_t* tokens,
                                 size_t count, uint32_t flags, char* text, size_t capacity,
                                 size_t* bytes, pslm_error error);

/* Constrained decoding: which tokens may come next, by a grammar. It needs no model: a vocabulary is
 * made of any tokenizer's tokens. Grammars and vocabularies may be shared by threads and by any number
 * of constraints, and be closed before them; a constraint serves one text and thread at a time. */
typedef struct pslm_vocabulary pslm_vocabulary;
typedef struct pslm_grammar pslm_grammar;
typedef struct pslm_constraint pslm_constraint;

/* Token i is the bytes from offsets[i] to offsets[i + 1] of `bytes`; one of no bytes, such as a special
 * one, is never allowed. `ends` are the tokens that end a text, which are allowed where it is whole.
 * `strip`: of the first token of a text, one leading space does not count, as its decoder drops it. */
PSLM_API pslm_status pslm_vocabulary_open(const char* bytes, const uint64_t* offsets, size_t count,
                                          const int32_t* ends, size_t end_count, uint32_t strip,
                                          pslm_vocabulary** vocabulary, pslm_error error);
PSLM_API void pslm_vocabulary_close(pslm_vocabulary* vocabulary);

typedef enum {
  PSLM_GRAMMAR_JSON_SCHEMA = 1, /* draft 2020-12: docs/how-to/schema.md says what of it */
  PSLM_GRAMMAR_REGEX = 2,       /* that the whole text matches */
  PSLM_GRAMMAR_GBNF = 3
} pslm_grammar_kind;
/* Takes time and memory within fixed bounds, whatever the text is. */
PSLM_API pslm_status pslm_grammar_open(uint32_t kind, const char* text, size_t bytes,
                                       pslm_grammar** grammar, pslm_error error);
PSLM_API void pslm_grammar_close(pslm_grammar* grammar);

PSLM_API pslm_status pslm_constraint_open(const pslm_grammar* grammar,
                                          const pslm_vocabulary* vocabulary,
                                          pslm_constraint** constraint, pslm_error error);
PSLM_API void pslm_constraint_close(pslm_constraint* constraint);
/* Begins a new text. */
PSLM_API void pslm_constraint_restart(pslm_constraint* constraint);
/* Sets the logits of all tokens that may not be next to minus infinity. `count` is the vocabulary's, or
 * more: what lies beyond is none of its tokens. An error where no token may be next. */
PSLM_API pslm_status pslm_constraint_apply(pslm_constraint* constraint, float* logits, size_t count,
                                           pslm_error error);
/* The same as bits: token i is bit i % 64 of word i / 64. */
PSLM_API pslm_status pslm_constraint_mask(pslm_constraint* constraint, uint64_t* words, size_t count,
                                          pslm_error error);
/* Goes on behind a token; an error, and nothing changes, where it may not be next. */
PSLM_API pslm_status pslm_constraint_advance(pslm_constraint* constraint, int32_t token,
                                             pslm_error error);
/* Whether the text is whole as it is, and whether nothing may follow. */
enum { PSLM_TEXT_MAY_END = 1, PSLM_TEXT_MUST_END = 2 };
PSLM_API uint32_t pslm_constraint_state(const pslm_constraint* constraint);

/* The model must outlive the session. */
PSLM_API pslm_status pslm_session_open(const pslm_model* model, const pslm_options* options,
                                       pslm_session** session, pslm_error error);
PSLM_API void pslm_session_close(pslm_session* session);
/* For a session of PSLM_KV_CALLER, before its first call and whenever the memory or what it holds
 * is another: `tensors` are keys and values of each KV state in turn, fp16
 * [kv_heads][positions][head_dim], whose first `length` positions this library has filled. How they
 * lie inside is private; the context is `positions`, rounded down to a multiple of 16. */
PSLM_API pslm_status pslm_bind_cache(pslm_session* session, void* const* tensors, size_t count,
                                     size_t positions, size_t length, pslm_error error);
/* A low-rank update of one of a layer's matrices [rows, cols], by the role that it has in
 * model.slm: y += b^T (a^T x), with a [cols][rank] and b [rank][rows] as floats, which are rounded to
 * fp16. */
typedef struct {
  uint32_t role, layer, rows, cols, rank;
  const float *a, *b;
} pslm_update;
/* A session may have up to PSLM_MAX_ADAPTERS sets of updates, its adapters, numbered from 1. These
 * replace what an adapter was; it is empty with a count of 0. They are copied. What uses it forgets
 * its context, which came of other weights. */
enum { PSLM_MAX_ADAPTERS = 64 };
PSLM_API pslm_status pslm_set_updates(pslm_session* session, uint32_t adapter,
                                      const pslm_update* updates, size_t count, pslm_error error);
/* The slot in use takes an adapter that is not empty from now on; 0: the weights as they are. Its
 * context is forgotten, if that is a change. */
PSLM_API pslm_status pslm_use_adapter(pslm_session* session, uint32_t adapter, pslm_error error);
PSLM_API pslm_status pslm_session_describe(const pslm_session* session, pslm_session_info* info);

/* Appends `count` tokens to the context. `logits` receives output_size floats (LAST) or
 * count * output_size (ALL); `capacity` is its size in floats. A failing call changes nothing.
 * Where attention is bidirectional, the tokens are a text of their own, and the length is 0 again
 * after the call. */
PSLM_API pslm_status pslm_forward(pslm_session* session, const int32_t* tokens, size_t count,
                                  pslm_logits which, float* logits, size_t capacity,
                                  pslm_error error);
/* Appends `count` tokens and gives the `top` most probable next ones, the most probable first (the
 * lower token of equals), with their logits, and the logarithm of the sum of exp over all logits:
 * a token's log-probability is its logit less this. */
PSLM_API pslm_status pslm_forward_top(pslm_session* session, const int32_t* tokens, size_t count,
                                      size_t top, int32_t* best, float* logits,
                                      double* log_total, pslm_error error);
/* Appends one token and gives the most probable next one: no logits leave the engine, and of a
 * split 8-bit head only the rows that may win are read in full. */
PSLM_API pslm_status pslm_step_greedy(pslm_session* session, int32_t token, int32_t* next,
                                      pslm_error error);
/* What a text repeats is less probable: the logit of a token that was seen is divided by `factor`
 * where it is positive, and multiplied elsewhere. */
typedef struct {
  float factor;        /* 1 to 100 */
  const int32_t* seen; /* the end of the text, of any length, the call's tokens included */
  size_t count;
} pslm_penalty;
/* The same for any number of tokens; `next` receives what follows each of the last `following` of
 * them, 1 to count. Tokens get the same bits together as one by one: what was guessed of a text can
 * be checked in one call, and the wrong part taken back by pslm_truncate. `penalty` may be null; what
 * follows a token is penalized by what was seen up to it. */
PSLM_API pslm_status pslm_forward_greedy(pslm_session* session, const int32_t* tokens, size_t count,
                                         size_t following, const pslm_penalty* penalty,
                                         int32_t* next, pslm_error error);

/* Several texts at once. A session may have up to PSLM_MAX_SLOTS contexts, its slots, which share all
 * that it has but the state of their tokens; memory of that is touched as positions fill. A function
 * that knows no slot means the one in use, at first 0; each slot may take another adapter. An
 * encoder and PSLM_KV_CALLER have one slot only. */
enum { PSLM_MAX_SLOTS = 16 };
PSLM_API pslm_status pslm_session_open_slots(const pslm_model* model, const pslm_options* options,
                                             uint32_t slots, pslm_session** session,
                                             pslm_error error);
PSLM_API pslm_status pslm_use_slot(pslm_session* session, uint32_t slot, pslm_error error);
/* What follows tokens of an entry. */
typedef enum {
  PSLM_WANT_NOTHING = 0,
  PSLM_WANT_NEXT = 1,  /* the most probable next tokens in best, as by pslm_forward_greedy */
  PSLM_WANT_TOP = 2,   /* the `room` most probable in best and logits, as by pslm_forward_top */
  PSLM_WANT_LOGITS = 3 /* all logits, for which there is `room` */
} pslm_wanted;
typedef struct {
  uint32_t slot, wanted; /* pslm_wanted */
  const int32_t* tokens;
  size_t count;
  size_t following; /* the last so many of the tokens are those behind which it is wanted: 1 of
                     * PSLM_WANT_TOP, and of what has more than 16 tokens */
  int32_t* best;
  float* logits;
  size_t room;                 /* in best and logits, whichever is wanted */
  const pslm_penalty* penalty; /* may be null; of PSLM_WANT_NEXT */
  double log_total;            /* receives it with PSLM_WANT_TOP */
} pslm_entry;
/* Appends tokens to slots, each of which is named by one entry at most: all of them go through the
 * model together. Each gets the bits that it gets alone. A failing call changes no slot. */
PSLM_API pslm_status pslm_forward_slots(pslm_session* session, pslm_entry* entries, size_t count,
                                        pslm_error error);

/* A text that goes on token by token, drawn or the most probable ones. All zeros but for top_p and
 * repetition_penalty, which are 1, is greedy to the end of the context. */
typedef struct {
  uint32_t max_tokens;         /* 0: as many as the context holds */
  float temperature;           /* 1e-6 to 1e9, or 0: the most probable token */
  uint32_t top_k;              /* 0: all */
  float top_p, min_p;          /* 1 and 0: all */
  float typical_p;             /* 0 or 1: all */
  float repetition_penalty;    /* 0.01 to 100; 1: none */
  uint32_t spare_prompt;       /* 1: only what follows the text is penalized */
  uint32_t logprobs;           /* 1: say how probable each token was, before any penalty */
  uint32_t guesses;            /* at the next greedy tokens, at most, that a step checks */
  uint64_t seed;               /* of what is drawn */
  const int32_t* ends;         /* tokens that end the text */
  size_t end_count;
  pslm_constraint* constraint; /* null, or what the new text is held to, which is moved along */
} pslm_generation;
typedef enum {
  PSLM_GOES_ON = 0,
  PSLM_FINISH_END = 1,    /* the token is one of `ends` */
  PSLM_FINISH_STOP = 2,   /* nothing may follow by the constraint */
  PSLM_FINISH_LENGTH = 3, /* max_tokens were made */
  PSLM_FINISH_CONTEXT = 4 /* the context is full */
} pslm_finish;
typedef struct {
  int32_t token;   /* -1: a part of the text was read, and there is none yet */
  uint32_t finish; /* pslm_finish */
  double logprob;  /* natural; 0 where it was not asked for */
} pslm_made;
typedef struct pslm_generator pslm_generator;
/* `text` has at least one token more than the slot in use, whose tokens it begins with. Session and
 * constraint must outlive the generator; the slot and the constraint are its own until it is closed, or
 * another one is opened in the slot. */
PSLM_API pslm_status pslm_generator_open(pslm_session* session, const int32_t* text, size_t count,
                                         const pslm_generation* options, pslm_generator** generator,
                                         pslm_error error);
/* The next token, or the next part of reading the text, so that a caller can stop at any time. An
 * error after a finish. */
PSLM_API pslm_status pslm_generator_next(pslm_generator* generator, pslm_made* made,
                                         pslm_error error);
/* What a step made of a text: none where a part of it was read, several where guesses were right. */
enum { PSLM_MOST_MADE = 8 };
typedef struct {
  pslm_generator* generator;
  pslm_error error;
  uint32_t status; /* receives what is wrong with this text, which then has ended */
  uint32_t count;  /* receives how many were made */
  pslm_made made[PSLM_MOST_MADE];
} pslm_turn;
/* A step of several texts, each in a slot of its own of one session: their tokens go through the model
 * together, long prompts in parts between the tokens of others. Each gets the tokens that it gets
 * alone. An error where one of them has ended; nothing is made then. */
PSLM_API pslm_status pslm_generate(pslm_turn* turns, size_t count, pslm_error error);
/* A slot that is still its own is cut back to the text and the tokens that were given, the last one
 * apart. The session may be closed before. */
PSLM_API void pslm_generator_close(pslm_generator* generator);

/* Where time goes, in nanoseconds of the calling thread with its waiting for others, summed over
 * the calls since profiling was turned on. Norms and quantization count to the product they feed. */
typedef struct {
  uint64_t calls, tokens;
  uint64_t embedding_ns, qkv_ns, attention_ns, output_ns, gate_up_ns, down_ns, head_ns;
} pslm_times;
/* Turning it on sets the times to zero; off, it costs nothing that can be measured. */
PSLM_API pslm_status pslm_set_profiling(pslm_session* session, uint32_t on);
PSLM_API pslm_status pslm_read_times(const pslm_session* session, pslm_times* times);

PSLM_API size_t pslm_length(const pslm_session* session);
/* Forgets all positions from `length` on: 0, or from pslm_rewind_limit() to the length now. What a
 * window or a convolution no longer holds cannot be had back: other lengths are an error. */
PSLM_API pslm_status pslm_truncate(pslm_session* session, size_t length);
PSLM_API size_t pslm_rewind_limit(const pslm_session* session);

/* The state after the first `count` positions in one buffer, for prefix caches; count as in
 * pslm_truncate. The layout is private to one version, KV type and model. */
PSLM_API size_t pslm_kv_bytes(const pslm_session* session, size_t count);
PSLM_API pslm_status pslm_kv_save(const pslm_session* session, size_t count, void* buffer,
                                  size_t capacity);
/* Replaces the context by `count` saved positions. */
PSLM_API pslm_status pslm_kv_restore(pslm_session* session, size_t count, const void* buffer,
                                     size_t bytes);

/* One packed matrix times `count` rows of activations: out[t * rows + n]. For tests and probes of
 * a single kernel path; `packed` must be 64-byte aligned. */
PSLM_API pslm_status pslm_matmul(const char* isa, uint32_t kind, const void* packed,
                                 size_t packed_bytes, size_t rows, size_t cols,
                                 const float* activations, size_t count, float* out,
                                 pslm_error error);
/* Bytes of a packed matrix, 0 where the kind or the shape is not supported. */
PSLM_API size_t pslm_packed_bytes(uint32_t kind, size_t rows, size_t cols);

/* Machine limits, for a roofline: bytes per second of streaming reads over `bytes` of memory, and
 * int8 multiply-accumulates per second from registers with the given path's instruction. */
PSLM_API double pslm_measure_bandwidth(uint32_t threads, size_t bytes);
PSLM_API double pslm_measure_int8_peak(const char* isa, uint32_t threads);

#ifdef __cplusplus
}
#endif
#endif
