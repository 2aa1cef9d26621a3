// The C border: arguments are checked before anything is touched, and exceptions end here.
#include <algorithm>
#include <map>
#include <memory>
#include <string>
#include <vector>

#include "border.h"
#include "cpu.h"
#include "model_file.h"
#include "pocketslm.h"
#include "runner/tokenizer.h"
#include "platform.h"
#include "session_border.h"

using namespace pocketslm;

struct pslm_model {
  ModelFile file;
};
struct pslm_tokenizer {
  Tokenizer tokenizer;
  uint32_t vocabulary;
};

namespace {

constexpr uint32_t kMaxThreads = 64;

// Which of a step's matrices an update belongs to; kNone where it is none of them.
size_t slot_of(const Step& step, const pslm_update& update) {
  size_t slot = kNone;
  if (step.layer != update.layer) return slot;
  const Role role = static_cast<Role>(update.role);
  switch (step.code) {
    case Code::project:
      slot = role == Role::query ? 0 : role == Role::key ? 1 : role == Role::value ? 2 : kNone;
      break;
    case Code::gated: slot = role == Role::gate ? 0 : role == Role::up ? 1 : kNone; break;
    case Code::project_add:
      if (role == (step.buffer == BufferId::attended ? Role::output : Role::down)) slot = 0;
      break;
    default: break;
  }
  return slot != kNone && step.w[slot] ? slot : kNone;
}

uint32_t default_threads() {
  const size_t cpus = cpus_by_speed().size();
  return cpus == 0 ? 1 : cpus < 8 ? static_cast<uint32_t>(cpus) : 8;
}

}  // namespace

namespace pocketslm {

pslm_status check_vocabulary(uint32_t vocabulary, const int32_t* tokens, size_t count,
                             pslm_error error) {
  for (size_t i = 0; i < count; ++i)
    if (static_cast<uint32_t>(tokens[i]) >= vocabulary)
      return report(error, PSLM_ERROR_ARGUMENT,
                    "token " + std::to_string(tokens[i]) + " is outside the vocabulary of " +
                        std::to_string(vocabulary));
  return PSLM_OK;
}

pslm_status check_tokens(const Session& session, size_t length, const int32_t* tokens, size_t count,
                         pslm_error error) {
  const uint32_t vocabulary = session.model().config.vocab_size;
  if (const pslm_status status = check_vocabulary(vocabulary, tokens, count, error)) return status;
  if (count > session.context() - length)
    return report(error, PSLM_ERROR_CONTEXT,
                  std::to_string(count) + " more tokens after " + std::to_string(length) +
                      " do not fit the context of " + std::to_string(session.context()));
  return PSLM_OK;
}

pslm_status check_logits(const Session& session, pslm_error error) {
  if (session.finite()) return PSLM_OK;
  return report(error, PSLM_ERROR_NOT_FINITE,
                "the model's logits are not finite: its weights or its adapter are damaged");
}

pslm_status check_penalty(const Session& session, const pslm_penalty* penalty, pslm_error error) {
  if (!penalty) return PSLM_OK;
  if (penalty->count && !penalty->seen) return report(error, PSLM_ERROR_ARGUMENT, "null argument");
  if (!(penalty->factor >= 1 && penalty->factor <= 100))
    return report(error, PSLM_ERROR_ARGUMENT, "a penalty's factor is 1 to 100");
  return check_vocabulary(session.model().config.vocab_size, penalty->seen, penalty->count, error);
}

pslm_status check_head(const Session& session, pslm_error error) {
  if (session.model().program.head().w[0]) return PSLM_OK;
  return report(error, PSLM_ERROR_ARGUMENT, "the model is an encoder: it has no next token");
}

}  // namespace pocketslm

uint32_t pslm_abi_version(void) { return PSLM_ABI_VERSION; }

const char* pslm_compiler(void) {
#if defined(__clang__)
  return "clang " __clang_version__;
#else
  return "g++ " __VERSION__;
#endif
}
const char* const* pslm_isa_names(void) { return available_isa_names(); }

pslm_status pslm_model_open(const char* path, pslm_model** model, pslm_error error) {
  if (!path || !model) return report(error, PSLM_ERROR_ARGUMENT, "null argument");
  *model = nullptr;
  return guarded(error, [&] {
    auto opened = std::make_unique<pslm_model>();
    if (const Failure failure = opened->file.open(path))
      return report(error, failure.status, failure.text);
    *model = opened.release();
    return PSLM_OK;
  });
}

pslm_status pslm_model_view(const void* data, size_t bytes, pslm_model** model,
                            pslm_error error) {
  if (!data || !model) return report(error, PSLM_ERROR_ARGUMENT, "null argument");
  *model = nullptr;
  return guarded(error, [&] {
    auto opened = std::make_unique<pslm_model>();
    if (const Failure failure = opened->file.view(data, bytes))
      return report(error, failure.status, failure.text);
    *model = opened.release();
    return PSLM_OK;
  });
}

void pslm_model_close(pslm_model* model) { delete model; }

pslm_status pslm_model_describe(const pslm_model* model, pslm_model_info* info) {
  if (!model || !info) return PSLM_ERROR_ARGUMENT;
  const ModelFile& file = model->file;
  const Program& program = file.program;
  const FileHeader& c = file.config;
  *info = {};
  info->hidden_size = c.hidden_size, info->layers = c.layers;
  info->heads = static_cast<uint32_t>(program.widest_heads);
  info->kv_heads = static_cast<uint32_t>(program.widest_kv_heads);
  info->head_dim = static_cast<uint32_t>(program.widest_head_dim);
  info->intermediate_size = static_cast<uint32_t>(program.width(BufferId::hidden));
  info->vocab_size = c.vocab_size, info->max_context = c.max_context;
  info->output_size = static_cast<uint32_t>(file.output_size());
  info->states = static_cast<uint32_t>(program.states.size());
  info->file_bytes = c.file_bytes;
  if (const Matrix* head = program.head().w[0]) {
    // Of a split head the greedy token needs the high nibbles and the scales.
    info->bytes_per_token = head->blocks() * head->read_bytes();
    info->head_macs = uint64_t{head->rows} * head->cols;
  }
  std::map<const uint8_t*, uint32_t> read_by;  // the last layer that read a matrix
  for (const Step& step : program.steps) {
    if (step.code == Code::embed || step.code == Code::head) continue;
    for (const Matrix* w : step.w) {
      if (!w) continue;
      info->macs_per_token += uint64_t{w->rows} * w->cols;
      // A layer on the weights of the one before it finds them in a cache.
      const auto [entry, first] = read_by.try_emplace(w->data(), step.layer);
      if (first || entry->second + 1 != step.layer) info->bytes_per_token += w->bytes();
      entry->second = step.layer;
    }
  }
  return PSLM_OK;
}

pslm_status pslm_model_state(const pslm_model* model, uint32_t index, pslm_state_info* info) {
  if (!model || !info || index >= model->file.program.states.size()) return PSLM_ERROR_ARGUMENT;
  const StateRecord& state = model->file.program.states[index];
  *info = {state.kind, {state.sizes[0], state.sizes[1], state.sizes[2]}};
  return PSLM_OK;
}

const void* pslm_model_blob(const pslm_model* model, uint32_t role, size_t* bytes) {
  if (!model || !bytes) return nullptr;
  const Blob blob = role <= static_cast<uint32_t>(Role::projection)
                        ? model->file.blob(static_cast<Role>(role))
                        : Blob{};
  *bytes = blob.bytes;
  return blob.data;
}

pslm_status pslm_session_open(const pslm_model* model, const pslm_options* options,
                              pslm_session** session, pslm_error error) {
  return pslm_session_open_slots(model, options, 1, session, error);
}

pslm_status pslm_session_open_slots(const pslm_model* model, const pslm_options* options,
                                    uint32_t slots, pslm_session** session, pslm_error error) {
  if (!model || !options || !session) return report(error, PSLM_ERROR_ARGUMENT, "null argument");
  *session = nullptr;
  const Program& program = model->file.program;
  // Where attention is bidirectional, all of the context is one batch.
  const uint32_t trained = model->file.config.max_context;
  const uint32_t maximum =
      program.bidirectional ? std::min<uint32_t>(trained, kMaxWhole) : trained;
  const uint32_t context = options->context ? options->context : maximum;
  const uint32_t threads = options->threads ? options->threads : default_threads();
  if (context > maximum)
    return report(error, PSLM_ERROR_ARGUMENT,
                  "context of " + std::to_string(context) + " is above the model's " +
                      std::to_string(maximum));
  if (threads > kMaxThreads)
    return report(error, PSLM_ERROR_ARGUMENT,
                  std::to_string(threads) + " threads, at most " + std::to_string(kMaxThreads));
  if (options->kv_type > PSLM_KV_CALLER)
    return report(error, PSLM_ERROR_ARGUMENT, "unknown KV type");
  if (slots == 0 || slots > kMaxSlots)
    return report(error, PSLM_ERROR_ARGUMENT,
                  std::to_string(slots) + " slots, expected 1 to " + std::to_string(kMaxSlots));
  if (slots > 1 && (options->kv_type == PSLM_KV_CALLER || !program.head().w[0]))
    return report(error, PSLM_ERROR_ARGUMENT,
                  "one slot is all there is of an encoder, and of a caller's cache");
  if (options->kv_type == PSLM_KV_CALLER) {
    for (const StateRecord& state : program.states)
      if (state.kind != static_cast<uint32_t>(StateKind::kv))
        return report(error, PSLM_ERROR_ARGUMENT,
                      "the model keeps the state of a convolution, which has no place in the "
                      "caller's key and value tensors");
    if (program.bidirectional)
      return report(error, PSLM_ERROR_ARGUMENT,
                    "bidirectional attention keeps nothing in the caller's key and value tensors");
  }
  if (options->pin && !platform::binds_threads())
    return report(error, PSLM_ERROR_ARGUMENT, "this system binds no threads to CPUs; open it without");
  const Kernels* kernels = select_kernels(options->isa);
  if (!kernels)
    return report(error, PSLM_ERROR_ISA, "kernel path is unknown or not supported by this CPU");
  return guarded(error, [&] {
    *session =
        new pslm_session(model->file, *kernels, context,
                         static_cast<pslm_kv_type>(options->kv_type), threads, options->pin != 0,
                         slots);
    return PSLM_OK;
  });
}

void pslm_session_close(pslm_session* session) {
  if (!session || session->lost_threads()) return;
  if (!session->entered.exchange(true, std::memory_order_acquire)) delete session;
}

pslm_status pslm_bind_cache(pslm_session* session, void* const* tensors, size_t count,
                            size_t positions, size_t length, pslm_error error) {
  if (!session || !tensors) return report(error, PSLM_ERROR_ARGUMENT, "null argument");
  return enter(session, error, [&](Session& engine) {
    if (engine.states().type() != PSLM_KV_CALLER)
      return report(error, PSLM_ERROR_ARGUMENT, "the session has a cache of its own");
    if (const size_t expected = 2 * engine.states().kv_states(); count != expected)
      return report(error, PSLM_ERROR_ARGUMENT,
                    std::to_string(count) + " cache tensors, expected " + std::to_string(expected));
    for (size_t i = 0; i < count; ++i)
      if (!tensors[i]) return report(error, PSLM_ERROR_ARGUMENT, "a cache tensor is null");
    const size_t context = engine.context_of(positions);
    if (length > context)
      return report(error, PSLM_ERROR_CONTEXT,
                    std::to_string(length) + " positions do not fit the context of " +
                        std::to_string(context));
    engine.bind_cache(tensors, positions, length);
    return PSLM_OK;
  });
}

pslm_status pslm_set_updates(pslm_session* session, uint32_t adapter, const pslm_update* updates,
                             size_t count, pslm_error error) {
  if (!session || (count && !updates)) return report(error, PSLM_ERROR_ARGUMENT, "null argument");
  if (adapter < 1 || adapter > kMaxAdapters)
    return report(error, PSLM_ERROR_ARGUMENT,
                  "adapter " + std::to_string(adapter) + ", expected 1 to " +
                      std::to_string(kMaxAdapters));
  return enter(session, error, [&](Session& engine) {
    const ModelFile& model = engine.model();
    const std::vector<Step>& steps = model.program.steps;
    std::vector<StepUpdates> all(count ? steps.size() : 0);
    for (size_t i = 0; i < count; ++i) {
      const pslm_update& u = updates[i];
      if (u.layer >= model.config.layers)
        return report(error, PSLM_ERROR_ARGUMENT,
                      "update of layer " + std::to_string(u.layer) + ", the model has " +
                          std::to_string(model.config.layers));
      const Matrix* matrix = nullptr;
      LowRank* slot = nullptr;
      for (size_t at = 0; at < steps.size(); ++at) {
        const size_t place = slot_of(steps[at], u);
        if (place == kNone) continue;
        if (slot)
          return report(error, PSLM_ERROR_ARGUMENT,
                        "layer " + std::to_string(u.layer) + " has several matrices of role " +
                            std::to_string(u.role));
        matrix = steps[at].w[place], slot = &all[at].of[place];
      }
      if (!slot || slot->rank || !u.a || !u.b || !u.rank || u.rank > kMaxRank)
        return report(error, PSLM_ERROR_ARGUMENT,
                      "update of role " + std::to_string(u.role) + " and rank " +
                          std::to_string(u.rank) + " is unknown, empty or there twice");
      if (u.rows != matrix->rows || u.cols != matrix->cols)
        return report(error, PSLM_ERROR_ARGUMENT,
                      "update of role " + std::to_string(u.role) + ", layer " +
                          std::to_string(u.layer) + " is for " + std::to_string(u.rows) + " x " +
                          std::to_string(u.cols) + ", the matrix is " +
                          std::to_string(matrix->rows) + " x " + std::to_string(matrix->cols));
      if (!in_half_range(u.a, matrix->cols * u.rank) || !in_half_range(u.b, u.rank * matrix->rows))
        return report(error, PSLM_ERROR_ARGUMENT,
                      "update of role " + std::to_string(u.role) + ", layer " +
                          std::to_string(u.layer) + " has numbers that are not within fp16's range");
      *slot = LowRank::packed(u.a, u.b, u.rank, matrix->rows, matrix->cols,
                              is_quantized(matrix->kind));
    }
    engine.set_updates(adapter, std::move(all));
    return PSLM_OK;
  });
}

pslm_status pslm_use_adapter(pslm_session* session, uint32_t adapter, pslm_error error) {
  if (!session) return report(error, PSLM_ERROR_ARGUMENT, "null argument");
  return enter(session, error, [&](Session& engine) {
    if (!engine.has_adapter(adapter))
      return report(error, PSLM_ERROR_ARGUMENT,
                    "adapter " + std::to_string(adapter) + " is empty; set its updates first");
    engine.use_adapter(adapter);
    return PSLM_OK;
  });
}

pslm_status pslm_session_describe(const pslm_session* session, pslm_session_info* info) {
  if (!session || !info) return PSLM_ERROR_ARGUMENT;
  return enter(session, {}, [&](const Session& engine) {
    *info = {};
    info->context = static_cast<uint32_t>(engine.context());
    info->threads = engine.threads();
    info->kv_type = engine.states().type();
    info->kv_bytes = engine.shape().bytes() * engine.slots();
    info->isa = engine.kernels().name;
    return PSLM_OK;
  });
}

pslm_status pslm_forward(pslm_session* session, const int32_t* tokens, size_t count,
                         pslm_logits which, float* logits, size_t capacity, pslm_error error) {
  if (!session || (count && !tokens)) return report(error, PSLM_ERROR_ARGUMENT, "null argument");
  if (count == 0) return report(error, PSLM_ERROR_ARGUMENT, "no tokens");
  if (which < PSLM_LOGITS_NONE || which > PSLM_LOGITS_ALL)
    return report(error, PSLM_ERROR_ARGUMENT, "unknown choice of logits");
  const size_t rows = which == PSLM_LOGITS_ALL ? count : which == PSLM_LOGITS_LAST ? 1 : 0;
  if (rows && (!logits || capacity / session->engine.model().output_size() < rows))
    return report(error, PSLM_ERROR_ARGUMENT, "the logits buffer is too small");
  return enter(session, error, [&](Session& engine) {
    if (const pslm_status status = check_tokens(engine, engine.length(), tokens, count, error))
      return status;
    engine.forward(tokens, count, which, logits);
    return check_logits(engine, error);
  });
}

pslm_status pslm_step_greedy(pslm_session* session, int32_t token, int32_t* next,
                             pslm_error error) {
  return pslm_forward_greedy(session, &token, 1, 1, nullptr, next, error);
}

pslm_status pslm_forward_greedy(pslm_session* session, const int32_t* tokens, size_t count,
                                size_t following, const pslm_penalty* penalty, int32_t* next,
                                pslm_error error) {
  if (!session || !tokens || !next) return report(error, PSLM_ERROR_ARGUMENT, "null argument");
  if (count == 0) return report(error, PSLM_ERROR_ARGUMENT, "no tokens");
  if (following == 0 || following > count)
    return report(error, PSLM_ERROR_ARGUMENT,
                  "what follows " + std::to_string(following) + " tokens of " +
                      std::to_string(count));
  if (const pslm_status status = check_head(session->engine, error)) return status;
  return enter(session, error, [&](Session& engine) {
    if (const pslm_status status = check_tokens(engine, engine.length(), tokens, count, error))
      return status;
    if (const pslm_status status = check_penalty(engine, penalty, error)) return status;
    engine.forward_greedy(tokens, count, following, penalty, next);
    return check_logits(engine, error);
  });
}

pslm_status pslm_set_profiling(pslm_session* session, uint32_t on) {
  if (!session) return PSLM_ERROR_ARGUMENT;
  return enter(session, {}, [&](Session& engine) {
    engine.clock().set(on != 0);
    return PSLM_OK;
  });
}

pslm_status pslm_read_times(const pslm_session* session, pslm_times* times) {
  if (!session || !times) return PSLM_ERROR_ARGUMENT;
  return enter(session, {}, [&](const Session& engine) {
    *times = engine.clock().times();
    return PSLM_OK;
  });
}

pslm_status pslm_forward_top(pslm_session* session, const int32_t* tokens, size_t count, size_t top,
                             int32_t* best, float* logits, double* log_total, pslm_error error) {
  if (!session || (count && !tokens) || !best || !logits || !log_total)
    return report(error, PSLM_ERROR_ARGUMENT, "null argument");
  if (count == 0) return report(error, PSLM_ERROR_ARGUMENT, "no tokens");
  if (const pslm_status status = check_head(session->engine, error)) return status;
  const uint32_t vocabulary = session->engine.model().config.vocab_size;
  if (top == 0 || top > vocabulary)
    return report(error, PSLM_ERROR_ARGUMENT,
                  "the " + std::to_string(top) + " most probable tokens of " +
                      std::to_string(vocabulary));
  return enter(session, error, [&](Session& engine) {
    if (const pslm_status status = check_tokens(engine, engine.length(), tokens, count, error))
      return status;
    *log_total = engine.forward_top(tokens, count, top, best, logits);
    return check_logits(engine, error);
  });
}

size_t pslm_length(const pslm_session* session) {
  return session ? session->length.load(std::memory_order_relaxed) : 0;
}

pslm_status pslm_truncate(pslm_session* session, size_t length) {
  if (!session) return PSLM_ERROR_ARGUMENT;
  return enter(session, {}, [&](Session& engine) {
    if (!engine.can_rewind(length)) return PSLM_ERROR_ARGUMENT;
    engine.truncate(length);
    return PSLM_OK;
  });
}

size_t pslm_rewind_limit(const pslm_session* session) {
  size_t limit = 0;
  if (session)
    enter(session, {}, [&](const Session& engine) {
      limit = engine.rewind_limit();
      return PSLM_OK;
    });
  return limit;
}

// The shape of a cache of the session's own never changes, so that this needs no turn.
size_t pslm_kv_bytes(const pslm_session* session, size_t count) {
  if (!session || session->engine.shape().type() == PSLM_KV_CALLER) return 0;
  return count > session->engine.context() ? 0 : session->engine.shape().saved_bytes(count);
}

pslm_status pslm_kv_save(const pslm_session* session, size_t count, void* buffer,
                         size_t capacity) {
  if (!session || !buffer) return PSLM_ERROR_ARGUMENT;
  return enter(session, {}, [&](const Session& engine) {
    if (!engine.can_rewind(count) || capacity < engine.states().saved_bytes(count))
      return PSLM_ERROR_ARGUMENT;
    engine.save(count, static_cast<uint8_t*>(buffer));
    return PSLM_OK;
  });
}

pslm_status pslm_kv_restore(pslm_session* session, size_t count, const void* buffer,
                            size_t bytes) {
  if (!session || !buffer) return PSLM_ERROR_ARGUMENT;
  return enter(session, {}, [&](Session& engine) {
    if (count > engine.context() || bytes != engine.states().saved_bytes(count))
      return PSLM_ERROR_ARGUMENT;
    engine.restore(count, static_cast<const uint8_t*>(buffer));
    return PSLM_OK;
  });
}

pslm_status pslm_tokenizer_open(const pslm_model* model, pslm_tokenizer** tokenizer,
                                pslm_error error) {
  if (!model || !tokenizer) return report(error, PSLM_ERROR_ARGUMENT, "null argument");
  *tokenizer = nullptr;
  size_t bytes = 0;
  const void* data = pslm_model_blob(model, static_cast<uint32_t>(Role::tokenizer), &bytes);
  if (!data) return report(error, PSLM_ERROR_FORMAT, "the model file has no tokenizer");
  return guarded(error, [&] {
    auto opened = std::make_unique<pslm_tokenizer>();
    opened->vocabulary = model->file.config.vocab_size;
    const std::string failure = opened->tokenizer.load(data, bytes, opened->vocabulary);
    if (!failure.empty()) return report(error, PSLM_ERROR_FORMAT, failure);
    platform::drop_mapped(data, bytes);  // all was read to check it; a text needs little
    *tokenizer = opened.release();
    return PSLM_OK;
  });
}

void pslm_tokenizer_close(pslm_tokenizer* tokenizer) { delete tokenizer; }

pslm_status pslm_tokenizer_pieces(const pslm_tokenizer* tokenizer, const char** bytes,
                                  const uint32_t** offsets, size_t* count) {
  if (!tokenizer || !bytes || !offsets || !count) return PSLM_ERROR_ARGUMENT;
  tokenizer->tokenizer.pieces(bytes, offsets, count);
  return PSLM_OK;
}

uint32_t pslm_tokenizer_takes(const pslm_tokenizer* tokenizer) {
  return tokenizer && tokenizer->tokenizer.takes_normalized() ? PSLM_TEXT_NORMALIZED : 0;
}

namespace {

// Into the caller's memory, if it is large enough; `capacity` 0 asks for the size alone.
template <typename T>
pslm_status hand_over(const T* made, size_t size, T* out, size_t capacity, size_t* count,
                      pslm_error error) {
  *count = size;
  if (size <= capacity) std::copy(made, made + size, out);
  if (size <= capacity || capacity == 0) return PSLM_OK;
  return report(error, PSLM_ERROR_ARGUMENT,
                "no room for " + std::to_string(size) + ", only for " + std::to_string(capacity));
}

}  // namespace

pslm_status pslm_encode(const pslm_tokenizer* tokenizer, const char* text, size_t bytes,
                        uint32_t flags, int32_t* tokens, size_t capacity, size_t* count,
                        pslm_error error) {
  if (!tokenizer || (bytes && !text) || (capacity && !tokens) || !count)
    return report(error, PSLM_ERROR_ARGUMENT, "null argument");
  if (flags & ~uint32_t{PSLM_TEXT_SPECIAL | PSLM_TEXT_WHOLE | PSLM_TEXT_GOES_ON |
                        PSLM_TEXT_NORMALIZED})
    return report(error, PSLM_ERROR_ARGUMENT, "unknown flags of text");
  if (flags & PSLM_TEXT_WHOLE && flags & (PSLM_TEXT_GOES_ON | PSLM_TEXT_NORMALIZED))
    return report(error, PSLM_ERROR_ARGUMENT, "a whole text neither goes on nor is normalized");
  if ((flags & PSLM_TEXT_NORMALIZED) != pslm_tokenizer_takes(tokenizer))
    return report(error, PSLM_ERROR_ARGUMENT,
                  flags & PSLM_TEXT_NORMALIZED ? "this tokenizer normalizes texts itself"
                                               : "this tokenizer takes normalized text alone");
  return guarded(error, [&] {
    const Tokenizer& own = tokenizer->tokenizer;
    std::vector<int32_t> out;
    const TextPart part{{text, bytes}, (flags & PSLM_TEXT_SPECIAL) != 0};
    const bool starts = !(flags & PSLM_TEXT_GOES_ON);
    if (flags & PSLM_TEXT_WHOLE)
      own.encode_whole(part, out);
    else if (flags & PSLM_TEXT_NORMALIZED)
      own.encode_normalized(part, out, starts);
    else
      own.encode({part}, out, starts);
    return hand_over(out.data(), out.size(), tokens, capacity, count, error);
  });
}

pslm_status pslm_decode(const pslm_tokenizer* tokenizer, const int32_t* tokens, size_t count,
                        uint32_t flags, char* text, size_t capacity, size_t* bytes,
                        pslm_error error) {
  if (!tokenizer || (count && !tokens) || (capacity && !text) || !bytes)
    return report(error, PSLM_ERROR_ARGUMENT, "null argument");
  if (flags & ~uint32_t{PSLM_TEXT_GOES_ON})
    return report(error, PSLM_ERROR_ARGUMENT, "unknown flags of text");
  if (const pslm_status status = check_vocabulary(tokenizer->vocabulary, tokens, count, error))
    return status;
  return guarded(error, [&] {
    const Tokenizer& own = tokenizer->tokenizer;
    std::string out;
    for (size_t i = 0; i < count; ++i) out += own.bytes(tokens[i]);
    const bool starts = !(flags & PSLM_TEXT_GOES_ON);
    const size_t skipped = starts && own.strips_space() && !out.empty() && out[0] == ' ' ? 1 : 0;
    return hand_over(out.data() + skipped, out.size() - skipped, text, capacity, bytes, error);
  });
}
