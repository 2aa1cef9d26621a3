// What both modes of the runner share: a loaded model, one session, and generation from it.
#pragma once

#include <chrono>
#include <functional>
#include <limits>
#include <memory>
#include <string>
#include <string_view>
#include <vector>

#include "chat.h"
#include "grammar/grammar.h"
#include "grammar/token_trie.h"
#include "lookup.h"
#include "pocketslm.h"
#include "tokenizer.h"

namespace pocketslm {

struct LoadOptions {
  std::string path;
  uint32_t context = 0, threads = 0, kv_type = PSLM_KV_F16;
  bool pin = false, profile = false;
  bool cold = false;      // drop the file from the page cache first
  std::vector<int> cpus;  // run on these only; empty: on those that the process was started with
  std::string isa = "auto";
};

struct Generation {
  Generation() {
    options.max_tokens = 128;
    options.top_p = options.repetition_penalty = 1;
    options.guesses = PromptLookup::kMost;
  }
  pslm_generation options{};  // but for ends and a constraint
  bool ignore_eos = false;
  std::vector<int32_t> eos;  // empty: the model file's own
  std::shared_ptr<const grammar::Automaton> grammar;  // that holds the answer, where there is one
};

// Whether the text of special tokens means those tokens, and how many tokens of a text are kept.
struct TextLimits {
  bool special = true;
  size_t most = std::numeric_limits<size_t>::max();
};

// The mean of the hidden states of a text's tokens, or the first's or the last's.
enum class Pooling { mean, cls, last };

struct NewToken {
  int32_t token;
  std::string_view text;  // what became certain with it
  float logprob;          // of its probability before any penalty, where asked for
  bool whole;             // nothing may follow by the grammar
};

struct Outcome {
  std::string reason;  // eos, stop (nothing may follow), length, context, cancelled
  size_t prompt_tokens = 0, reused_tokens = 0, new_tokens = 0;
  double prefill_ms = 0, decode_ms = 0;
  int32_t last = -1;  // the token that ended it, where that was eos
  float last_logprob = 0;
};

// Nanoseconds of every prompt, of every run of new tokens after one, and of each of those tokens;
// of the first two also processor time, page faults that had to read from storage and, of a model
// that was loaded with 'profile', the time by operator in the last repetition.
struct Times {
  std::vector<int64_t> prefill_ns, decode_ns, step_ns;
  std::vector<int64_t> prefill_cpu_ns, decode_cpu_ns, prefill_faults, decode_faults;
  pslm_times prefill_operators{}, decode_operators{};
};

class Engine {
 public:
  Engine() = default;
  ~Engine() { unload(); }
  Engine(const Engine&) = delete;
  Engine& operator=(const Engine&) = delete;

  // These return an empty string, or one line that says what was wrong.
  std::string load(const LoadOptions& options);
  std::string encode(std::string_view text, std::vector<int32_t>& tokens,
                     const TextLimits& limits = {}) const;
  std::string encode_chat(const std::vector<Message>& messages, std::vector<int32_t>& tokens) const;
  // Calls on_token for each new token; go_on is asked before each part of the prompt and after
  // each token, and ends the generation when it is false.
  std::string generate(const std::vector<int32_t>& prompt, const Generation& generation,
                       const std::function<void(const NewToken&)>& on_token,
                       const std::function<bool()>& go_on, Outcome& outcome);
  // Of the last token, or of each from position `first` on.
  std::string logits(const std::vector<int32_t>& tokens, size_t first, std::vector<float>& out);
  // The hidden states of a text, pooled; of a model without an output head.
  std::string embed(const std::vector<int32_t>& tokens, Pooling pooling, bool normalize,
                    std::vector<float>& out);
  // Runs `repeats` times, each from an empty cache: the prompt, which may be empty, in one call,
  // then `fresh` greedy tokens. Ends early, with an error, once go_on is false.
  std::string bench(const std::vector<int32_t>& prompt, size_t fresh, size_t repeats,
                    const std::function<bool()>& go_on, Times& times);
  std::vector<int32_t> random_tokens(size_t count) const;  // always the same ones

  bool loaded() const { return session_ != nullptr; }
  bool reads_text() const { return tokenizer_.loaded() && !tokenizer_.takes_normalized(); }
  void reset();
  bool profiled() const { return profiled_; }
  void restart_times() { pslm_set_profiling(session_, profiled_); }
  pslm_times times() const;
  const pslm_model_info& model_info() const { return model_info_; }
  pslm_session_info session_info() const;
  size_t length() const { return pslm_length(session_); }
  double load_ms() const { return load_ms_; }

 private:
  void unload();
  std::string load_parts(const LoadOptions& options);
  std::shared_ptr<const grammar::TokenTrie> token_trie();
  size_t keep_common(const std::vector<int32_t>& tokens, size_t limit);

  pslm_model* model_ = nullptr;
  pslm_session* session_ = nullptr;
  pslm_model_info model_info_{};
  Tokenizer tokenizer_;
  std::shared_ptr<const grammar::TokenTrie> trie_;  // once a grammar asked for it
  bool profiled_ = false;
  Chat chat_;
  std::vector<int32_t> cached_;  // the tokens that the session holds
  double load_ms_ = 0;
};

}  // namespace pocketslm
