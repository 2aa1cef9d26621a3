// The C border: arguments are checked before anything is touched, exceptions end here, and a session
// is entered by one thread at a time.
#include <unistd.h>

#include <atomic>
#include <cstdio>
#include <memory>
#include <new>
#include <system_error>
#include <type_traits>

#include "cpu.h"
#include "finite.h"
#include "model_file.h"
#include "pocketslm.h"
#include "session.h"

using namespace pocketslm;

struct pslm_model {
  ModelFile file;
};
struct pslm_session {
  Session engine;
  mutable std::atomic<bool> entered{false};
  mutable std::atomic<size_t> length{0};  // the engine's, for who asks while a call runs
  const pid_t process = getpid();

  // After a fork the child has the calling thread and none of the others.
  bool lost_threads() const { return engine.threads() > 1 && process != getpid(); }
};

namespace {

constexpr uint32_t kMaxThreads = 64;

pslm_status report(pslm_error error, pslm_status status, const std::string& text) {
  if (error.text && error.capacity) std::snprintf(error.text, error.capacity, "%s", text.c_str());
  return status;
}

// Runs f, which returns a status, and turns what it may throw into one.
template <typename F>
pslm_status guarded(pslm_error error, F&& f) {
  try {
    return f();
  } catch (const std::bad_alloc&) {
    return report(error, PSLM_ERROR_MEMORY, "out of memory");
  } catch (const std::system_error& failure) {
    return report(error, PSLM_ERROR_MEMORY, std::string("cannot start threads: ") + failure.what());
  } catch (const std::exception& failure) {
    return report(error, PSLM_ERROR_MEMORY, failure.what());
  }
}

// Runs f inside a session, unless another thread is there. What fails leaves the length as it was.
template <typename S, typename F>
pslm_status enter(S* session, pslm_error error, F&& f) {
  if (session->lost_threads())
    return report(error, PSLM_ERROR_FORK,
                  "this session's threads stayed behind in a fork; open one in this process");
  if (session->entered.exchange(true, std::memory_order_acquire))
    return report(error, PSLM_ERROR_BUSY, "another thread uses this session");
  auto& engine = session->engine;
  const size_t before = engine.length();
  const pslm_status status = guarded(error, [&] { return f(engine); });
  if constexpr (!std::is_const_v<S>)
    if (status != PSLM_OK) engine.set_length(before);
  session->length.store(engine.length(), std::memory_order_relaxed);
  session->entered.store(false, std::memory_order_release);
  return status;
}

// No token can be chosen by logits that are NaN or infinite.
pslm_status check_logits(const Session& engine, pslm_error error) {
  if (engine.finite()) return PSLM_OK;
  return report(error, PSLM_ERROR_NOT_FINITE,
                "the model's logits are not finite: its weights or its adapter are damaged");
}

pslm_status check_tokens(const Session& session, const int32_t* tokens, size_t count,
                         pslm_error error) {
  const uint32_t vocabulary = session.model().config.vocab_size;
  for (size_t i = 0; i < count; ++i)
    if (static_cast<uint32_t>(tokens[i]) >= vocabulary)
      return report(error, PSLM_ERROR_ARGUMENT,
                    "token " + std::to_string(tokens[i]) + " is outside the vocabulary of " +
                        std::to_string(vocabulary));
  if (count > session.context() - session.length())
    return report(error, PSLM_ERROR_CONTEXT,
                  std::to_string(count) + " more tokens after " +
                      std::to_string(session.length()) + " do not fit the context of " +
                      std::to_string(session.context()));
  return PSLM_OK;
}

uint32_t default_threads() {
  const size_t cpus = cpus_by_speed().size();
  return cpus == 0 ? 1 : cpus < 8 ? static_cast<uint32_t>(cpus) : 8;
}

}  // namespace

uint32_t pslm_abi_version(void) { return PSLM_ABI_VERSION; }
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
  const FileHeader& c = file.config;
  *info = {};
  info->hidden_size = c.hidden_size, info->layers = c.layers, info->heads = c.heads;
  info->kv_heads = c.kv_heads, info->head_dim = c.head_dim;
  info->intermediate_size = c.intermediate_size, info->vocab_size = c.vocab_size;
  info->max_context = c.max_context, info->file_bytes = c.file_bytes;
  const Matrix& head = file.head.data ? file.head : file.embedding;
  // Of a split head the greedy token needs the high nibbles and the scales.
  info->bytes_per_token = head.kind == WeightKind::q8_split
                              ? head.blocks() * block_layout(WeightKind::q4_sym, head.cols).bytes
                              : head.bytes();
  info->head_macs = uint64_t{head.rows} * head.cols;
  const uint8_t* before = nullptr;
  for (const Layer& layer : file.layers) {
    // A layer on the weights of the one before it finds them in a cache.
    const bool again = layer.query.data == before;
    before = layer.query.data;
    for (const Matrix* w : {&layer.query, &layer.key, &layer.value, &layer.output, &layer.gate,
                            &layer.up, &layer.down}) {
      if (!again) info->bytes_per_token += w->bytes();
      info->macs_per_token += uint64_t{w->rows} * w->cols;
    }
  }
  return PSLM_OK;
}

uint32_t pslm_layer_kv_heads(const pslm_model* model, uint32_t layer) {
  return model && layer < model->file.layers.size() ? model->file.layers[layer].kv_heads : 0;
}

const void* pslm_model_blob(const pslm_model* model, uint32_t role, size_t* bytes) {
  if (!model || !bytes) return nullptr;
  const Blob blob = role == static_cast<uint32_t>(Role::tokenizer) ? model->file.tokenizer
                    : role == static_cast<uint32_t>(Role::chat)    ? model->file.chat
                                                                   : Blob{};
  *bytes = blob.bytes;
  return blob.data;
}

pslm_status pslm_session_open(const pslm_model* model, const pslm_options* options,
                              pslm_session** session, pslm_error error) {
  if (!model || !options || !session) return report(error, PSLM_ERROR_ARGUMENT, "null argument");
  *session = nullptr;
  const uint32_t maximum = model->file.config.max_context;
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
  const Kernels* kernels = select_kernels(options->isa);
  if (!kernels)
    return report(error, PSLM_ERROR_ISA, "kernel path is unknown or not supported by this CPU");
  return guarded(error, [&] {
    *session = new pslm_session{Session(model->file, *kernels, context,
                                        static_cast<pslm_kv_type>(options->kv_type), threads,
                                        options->pin != 0)};
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
    if (engine.cache().type() != PSLM_KV_CALLER)
      return report(error, PSLM_ERROR_ARGUMENT, "the session has a cache of its own");
    const FileHeader& config = engine.model().config;
    if (const size_t expected = 2 * size_t{config.layers}; count != expected)
      return report(error, PSLM_ERROR_ARGUMENT,
                    std::to_string(count) + " cache tensors, expected " + std::to_string(expected));
    for (size_t i = 0; i < count; ++i)
      if (!tensors[i]) return report(error, PSLM_ERROR_ARGUMENT, "a cache tensor is null");
    const size_t context = engine.context_of(positions);
    if (length > context)
      return report(error, PSLM_ERROR_CONTEXT,
                    std::to_string(length) + " positions do not fit the context of " +
                        std::to_string(context));
    engine.bind_cache(tensors, positions);
    engine.set_length(length);
    return PSLM_OK;
  });
}

pslm_status pslm_set_updates(pslm_session* session, const pslm_update* updates, size_t count,
                             pslm_error error) {
  if (!session || (count && !updates)) return report(error, PSLM_ERROR_ARGUMENT, "null argument");
  return enter(session, error, [&](Session& engine) {
    const ModelFile& model = engine.model();
    std::vector<LayerUpdates> layers(count ? model.layers.size() : 0);
    for (size_t i = 0; i < count; ++i) {
      const pslm_update& u = updates[i];
      if (u.layer >= layers.size())
        return report(error, PSLM_ERROR_ARGUMENT,
                      "update of layer " + std::to_string(u.layer) + ", the model has " +
                          std::to_string(layers.size()));
      const Layer& layer = model.layers[u.layer];
      LayerUpdates& of = layers[u.layer];
      const Matrix* matrix = nullptr;
      LowRank* slot = nullptr;
      switch (static_cast<Role>(u.role)) {
        case Role::query: matrix = &layer.query, slot = &of.query; break;
        case Role::key: matrix = &layer.key, slot = &of.key; break;
        case Role::value: matrix = &layer.value, slot = &of.value; break;
        case Role::output: matrix = &layer.output, slot = &of.output; break;
        case Role::gate: matrix = &layer.gate, slot = &of.gate; break;
        case Role::up: matrix = &layer.up, slot = &of.up; break;
        case Role::down: matrix = &layer.down, slot = &of.down; break;
        default: break;
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
      slot->rank = u.rank, slot->rows = matrix->rows;
      slot->a.assign(u.a, u.a + matrix->cols * u.rank);
      slot->b.assign(u.b, u.b + u.rank * matrix->rows);
      if (!all_finite(slot->a.data(), slot->a.size()) ||
          !all_finite(slot->b.data(), slot->b.size()))
        return report(error, PSLM_ERROR_ARGUMENT,
                      "update of role " + std::to_string(u.role) + ", layer " +
                          std::to_string(u.layer) + " has numbers that are not finite");
    }
    engine.set_updates(std::move(layers));
    return PSLM_OK;
  });
}

pslm_status pslm_session_describe(const pslm_session* session, pslm_session_info* info) {
  if (!session || !info) return PSLM_ERROR_ARGUMENT;
  return enter(session, {}, [&](const Session& engine) {
    *info = {};
    info->context = static_cast<uint32_t>(engine.context());
    info->threads = engine.threads();
    info->kv_type = engine.cache().type();
    info->kv_bytes = engine.cache().bytes();
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
  const uint32_t vocabulary = session->engine.model().config.vocab_size;
  if (rows && (!logits || capacity / vocabulary < rows))
    return report(error, PSLM_ERROR_ARGUMENT, "the logits buffer is too small");
  return enter(session, error, [&](Session& engine) {
    if (const pslm_status status = check_tokens(engine, tokens, count, error)) return status;
    engine.forward(tokens, count, which, logits);
    return check_logits(engine, error);
  });
}

pslm_status pslm_step_greedy(pslm_session* session, int32_t token, int32_t* next,
                             pslm_error error) {
  if (!session || !next) return report(error, PSLM_ERROR_ARGUMENT, "null argument");
  return enter(session, error, [&](Session& engine) {
    if (const pslm_status status = check_tokens(engine, &token, 1, error)) return status;
    *next = engine.step_greedy(token);
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
  const uint32_t vocabulary = session->engine.model().config.vocab_size;
  if (top == 0 || top > vocabulary)
    return report(error, PSLM_ERROR_ARGUMENT,
                  "the " + std::to_string(top) + " most probable tokens of " +
                      std::to_string(vocabulary));
  return enter(session, error, [&](Session& engine) {
    if (const pslm_status status = check_tokens(engine, tokens, count, error)) return status;
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
    if (length > engine.length()) return PSLM_ERROR_ARGUMENT;
    engine.set_length(length);
    return PSLM_OK;
  });
}

// The shape of a cache of the session's own never changes, so that this needs no turn.
size_t pslm_kv_bytes(const pslm_session* session, size_t count) {
  if (!session || session->engine.cache().type() == PSLM_KV_CALLER) return 0;
  return count > session->engine.context() ? 0 : session->engine.cache().saved_bytes(count);
}

pslm_status pslm_kv_save(const pslm_session* session, size_t count, void* buffer,
                         size_t capacity) {
  if (!session || !buffer) return PSLM_ERROR_ARGUMENT;
  return enter(session, {}, [&](const Session& engine) {
    if (count > engine.length() || capacity < engine.cache().saved_bytes(count))
      return PSLM_ERROR_ARGUMENT;
    engine.cache().save(count, static_cast<uint8_t*>(buffer));
    return PSLM_OK;
  });
}

pslm_status pslm_kv_restore(pslm_session* session, size_t count, const void* buffer,
                            size_t bytes) {
  if (!session || !buffer) return PSLM_ERROR_ARGUMENT;
  return enter(session, {}, [&](Session& engine) {
    if (count > engine.context() || bytes != engine.cache().saved_bytes(count))
      return PSLM_ERROR_ARGUMENT;
    engine.cache().restore(count, static_cast<const uint8_t*>(buffer));
    engine.set_length(count);
    return PSLM_OK;
  });
}
