#include "decoder.h"

namespace pocketslm {

Decoder::~Decoder() {
  pslm_session_close(session_);
  pslm_model_close(model_);
}

std::string Decoder::open(const void* model, size_t bytes, uint32_t threads) {
  char text[512] = "";
  const pslm_error error{text, sizeof text};
  const pslm_options options{0, threads, PSLM_KV_CALLER, 0, nullptr};
  if (pslm_model_view(model, bytes, &model_, error) != PSLM_OK ||
      pslm_session_open(model_, &options, &session_, error) != PSLM_OK)
    return text;
  pslm_model_describe(model_, &info_);
  return "";
}

std::string Decoder::run(const Step& step) {
  const std::lock_guard<std::mutex> lock(mutex_);  // frameworks may run one graph on many threads
  char text[512] = "";
  const pslm_error error{text, sizeof text};
  if (step.count == 0) return "no tokens";
  if (step.rows > step.count)
    return std::to_string(step.rows) + " rows of logits for " + std::to_string(step.count) +
           " tokens";
  tokens_.clear();
  for (size_t i = 0; i < step.count; ++i) {
    if (step.tokens[i] < 0 || step.tokens[i] >= info_.vocab_size)
      return "token " + std::to_string(step.tokens[i]) + " is outside the vocabulary of " +
             std::to_string(info_.vocab_size);
    tokens_.push_back(static_cast<int32_t>(step.tokens[i]));
  }
  if (pslm_bind_cache(session_, step.caches.data(), step.caches.size(), step.positions, step.past,
                      error) != PSLM_OK)
    return text;
  // One row is a matter of the head alone; several are the logits of a call of their own.
  const size_t alone = step.rows > 1 ? step.count - step.rows : 0;
  if (alone && pslm_forward(session_, tokens_.data(), alone, PSLM_LOGITS_NONE, nullptr, 0, error) !=
                   PSLM_OK)
    return text;
  const pslm_logits which = step.rows > 1   ? PSLM_LOGITS_ALL
                            : step.rows ? PSLM_LOGITS_LAST
                                        : PSLM_LOGITS_NONE;
  if (pslm_forward(session_, tokens_.data() + alone, step.count - alone, which, step.logits,
                   step.rows * info_.output_size, error) != PSLM_OK)
    return text;
  return "";
}

}  // namespace pocketslm
