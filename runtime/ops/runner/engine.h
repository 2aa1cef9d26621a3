// What both modes of the runner share: a loaded model, one session, and generation from it.
#pragma once

#include <chrono>
#include <functional>
#include <string>
#include <vector>

#include "json.h"
#include "pocketslm.h"
#include "sampler.h"
#include "tokenizer.h"

namespace pocketslm {

struct LoadOptions {
  std::string path;
  uint32_t context = 0, threads = 0, kv_type = PSLM_KV_F16;
  bool pin = false, profile = false;
  std::string isa = "auto";
};

struct Message {
  std::string role, content;
};

struct Generation {
  uint32_t max_tokens = 128;
  bool ignore_eos = false;
  Sampling sampling;
};

struct Outcome {
  std::string reason;  // eos, length, context, cancelled
  size_t prompt_tokens = 0, reused_tokens = 0, new_tokens = 0;
  double prefill_ms = 0, decode_ms = 0;
};

// The strings of a chat template around the messages of a conversation that alternates.
struct ChatParts {
  std::string start_system, system_to_user, start_user, user_to_assistant, assistant_to_user;
  std::vector<int32_t> eos;
};

class Engine {
 public:
  Engine() = default;
  ~Engine() { unload(); }
  Engine(const Engine&) = delete;
  Engine& operator=(const Engine&) = delete;

  // These return an empty string, or one line that says what was wrong.
  std::string load(const LoadOptions& options);
  std::string encode(std::string_view text, std::vector<int32_t>& tokens) const;
  std::string encode_chat(const std::vector<Message>& messages, std::vector<int32_t>& tokens) const;
  // Calls on_token for each new token with the text that it completes; stops when that is false.
  std::string generate(const std::vector<int32_t>& prompt, const Generation& generation,
                       const std::function<bool(int32_t, std::string_view)>& on_token,
                       Outcome& outcome);
  std::string logits(const std::vector<int32_t>& tokens, std::vector<float>& out);
  // Nanoseconds of `repeats` prompts of that length, and of as many new tokens after each.
  std::string bench(size_t prompt, size_t fresh, size_t repeats, std::vector<int64_t>& prefill_ns,
                    std::vector<int64_t>& decode_ns);

  bool loaded() const { return session_ != nullptr; }
  bool has_tokenizer() const { return tokenizer_.loaded(); }
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
  std::string read_chat(const Json& chat);

  pslm_model* model_ = nullptr;
  pslm_session* session_ = nullptr;
  pslm_model_info model_info_{};
  Tokenizer tokenizer_;
  bool has_chat_ = false, profiled_ = false;
  ChatParts chat_;
  std::vector<int32_t> cached_;  // the tokens that the session holds
  double load_ms_ = 0;
};

// Resident and peak resident memory of this process in bytes, from /proc.
struct Memory {
  uint64_t resident = 0, peak = 0;
};
Memory read_memory();

}  // namespace pocketslm
