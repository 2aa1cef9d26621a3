// The C border: arguments are checked before anything is touched, exceptions end here.
#include <algorithm>
#include <cstdio>
#include <cstring>
#include <memory>
#include <new>
#include <string>
#include <system_error>
#include <vector>

#include "cpu.h"
#include "model_file.h"
#include "pocketslm.h"
#include "runner/tokenizer.h"
#include "session.h"

using namespace pocketslm;

struct pslm_model {
  ModelFile file;
};
struct pslm_session {
  Session engine;
};
struct pslm_tokenizer {
  Tokenizer tokenizer;
  uint32_t vocabulary;
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
  }
}

pslm_status check_vocabulary(uint32_t vocabulary, const int32_t* tokens, size_t count,
                             pslm_error error) {
  for (size_t i = 0; i < count; ++i)
    if (static_cast<uint32_t>(tokens[i]) >= vocabulary)
      return report(error, PSLM_ERROR_ARGUMENT,
                    "token " + std::to_string(tokens[i]) + " is outside the vocabulary of " +
                        std::to_string(vocabulary));
  return PSLM_OK;
}

pslm_status check_tokens(const Session& session, const int32_t* tokens, size_t count,
                         pslm_error error) {
  const uint32_t vocabulary = session.model().config.vocab_size;
  if (const pslm_status status = check_vocabulary(vocabulary, tokens, count, error)) return status;
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

void pslm_session_close(pslm_session* session) { delete session; }

pslm_status pslm_bind_cache(pslm_session* session, void* const* tensors, size_t count,
                            size_t positions, size_t length, pslm_error error) {
  if (!session || !tensors) return report(error, PSLM_ERROR_ARGUMENT, "null argument");
  Session& engine = session->engine;
  if (engine.cache().type() != PSLM_KV_CALLER)
    return report(error, PSLM_ERROR_ARGUMENT, "the session has a cache of its own");
  if (const size_t expected = 2 * size_t{engine.model().config.layers}; count != expected)
    return report(error, PSLM_ERROR_ARGUMENT,
                  std::to_string(count) + " cache tensors, expected " + std::to_string(expected));
  for (size_t i = 0; i < count; ++i)
    if (!tensors[i]) return report(error, PSLM_ERROR_ARGUMENT, "a cache tensor is null");
  engine.bind_cache(tensors, positions);
  if (length > engine.context())
    return report(error, PSLM_ERROR_CONTEXT,
                  std::to_string(length) + " positions do not fit the context of " +
                      std::to_string(engine.context()));
  engine.set_length(length);
  return PSLM_OK;
}

pslm_status pslm_set_updates(pslm_session* session, const pslm_update* updates, size_t count,
                             pslm_error error) {
  if (!session || (count && !updates)) return report(error, PSLM_ERROR_ARGUMENT, "null argument");
  const ModelFile& model = session->engine.model();
  return guarded(error, [&] {
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
    }
    session->engine.set_updates(std::move(layers));
    return PSLM_OK;
  });
}

pslm_status pslm_session_describe(const pslm_session* session, pslm_session_info* info) {
  if (!session || !info) return PSLM_ERROR_ARGUMENT;
  const Session& engine = session->engine;
  *info = {};
  info->context = static_cast<uint32_t>(engine.context());
  info->threads = engine.threads();
  info->kv_type = engine.cache().type();
  info->kv_bytes = engine.cache().bytes();
  info->isa = engine.kernels().name;
  return PSLM_OK;
}

pslm_status pslm_forward(pslm_session* session, const int32_t* tokens, size_t count,
                         pslm_logits which, float* logits, size_t capacity, pslm_error error) {
  if (!session || (count && !tokens)) return report(error, PSLM_ERROR_ARGUMENT, "null argument");
  if (count == 0) return report(error, PSLM_ERROR_ARGUMENT, "no tokens");
  if (which < PSLM_LOGITS_NONE || which > PSLM_LOGITS_ALL)
    return report(error, PSLM_ERROR_ARGUMENT, "unknown choice of logits");
  Session& engine = session->engine;
  if (const pslm_status status = check_tokens(engine, tokens, count, error)) return status;
  const size_t rows = which == PSLM_LOGITS_ALL ? count : which == PSLM_LOGITS_LAST ? 1 : 0;
  if (rows && (!logits || capacity / engine.model().config.vocab_size < rows))
    return report(error, PSLM_ERROR_ARGUMENT, "the logits buffer is too small");
  engine.forward(tokens, count, which, logits);
  return PSLM_OK;
}

pslm_status pslm_step_greedy(pslm_session* session, int32_t token, int32_t* next,
                             pslm_error error) {
  if (!session || !next) return report(error, PSLM_ERROR_ARGUMENT, "null argument");
  if (const pslm_status status = check_tokens(session->engine, &token, 1, error)) return status;
  *next = session->engine.step_greedy(token);
  return PSLM_OK;
}

pslm_status pslm_set_profiling(pslm_session* session, uint32_t on) {
  if (!session) return PSLM_ERROR_ARGUMENT;
  session->engine.clock().set(on != 0);
  return PSLM_OK;
}

pslm_status pslm_read_times(const pslm_session* session, pslm_times* times) {
  if (!session || !times) return PSLM_ERROR_ARGUMENT;
  *times = session->engine.clock().times();
  return PSLM_OK;
}

pslm_status pslm_forward_top(pslm_session* session, const int32_t* tokens, size_t count, size_t top,
                             int32_t* best, float* logits, double* log_total, pslm_error error) {
  if (!session || (count && !tokens) || !best || !logits || !log_total)
    return report(error, PSLM_ERROR_ARGUMENT, "null argument");
  if (count == 0) return report(error, PSLM_ERROR_ARGUMENT, "no tokens");
  Session& engine = session->engine;
  const uint32_t vocabulary = engine.model().config.vocab_size;
  if (top == 0 || top > vocabulary)
    return report(error, PSLM_ERROR_ARGUMENT,
                  "the " + std::to_string(top) + " most probable tokens of " +
                      std::to_string(vocabulary));
  if (const pslm_status status = check_tokens(engine, tokens, count, error)) return status;
  return guarded(error, [&] {
    *log_total = engine.forward_top(tokens, count, top, best, logits);
    return PSLM_OK;
  });
}

size_t pslm_length(const pslm_session* session) { return session ? session->engine.length() : 0; }

pslm_status pslm_truncate(pslm_session* session, size_t length) {
  if (!session || length > session->engine.length()) return PSLM_ERROR_ARGUMENT;
  session->engine.set_length(length);
  return PSLM_OK;
}

size_t pslm_kv_bytes(const pslm_session* session, size_t count) {
  if (!session || count > session->engine.context()) return 0;
  return session->engine.cache().saved_bytes(count);
}

pslm_status pslm_kv_save(const pslm_session* session, size_t count, void* buffer,
                         size_t capacity) {
  if (!session || !buffer || count > session->engine.length() ||
      capacity < session->engine.cache().saved_bytes(count))
    return PSLM_ERROR_ARGUMENT;
  session->engine.cache().save(count, static_cast<uint8_t*>(buffer));
  return PSLM_OK;
}

pslm_status pslm_kv_restore(pslm_session* session, size_t count, const void* buffer,
                            size_t bytes) {
  if (!session || !buffer || count > session->engine.context() ||
      bytes != session->engine.cache().saved_bytes(count))
    return PSLM_ERROR_ARGUMENT;
  session->engine.cache().restore(count, static_cast<const uint8_t*>(buffer));
  session->engine.set_length(count);
  return PSLM_OK;
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
    *tokenizer = opened.release();
    return PSLM_OK;
  });
}

void pslm_tokenizer_close(pslm_tokenizer* tokenizer) { delete tokenizer; }

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
  if (flags & ~uint32_t{PSLM_TEXT_SPECIAL | PSLM_TEXT_WHOLE})
    return report(error, PSLM_ERROR_ARGUMENT, "unknown flags of text");
  return guarded(error, [&] {
    const Tokenizer& own = tokenizer->tokenizer;
    std::vector<int32_t> out;
    const TextPart part{{text, bytes}, (flags & PSLM_TEXT_SPECIAL) != 0};
    flags & PSLM_TEXT_WHOLE ? own.encode_whole(part, out) : own.encode({part}, out);
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
