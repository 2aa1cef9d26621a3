#include "engine.h"

#include <algorithm>
#include <cstdio>

#include "model_file.h"

namespace pocketslm {
namespace {

using Clock = std::chrono::steady_clock;

double milliseconds_since(Clock::time_point start) {
  return std::chrono::duration<double, std::milli>(Clock::now() - start).count();
}

int64_t nanoseconds_since(Clock::time_point start) {
  return std::chrono::duration_cast<std::chrono::nanoseconds>(Clock::now() - start).count();
}

struct ErrorLine {
  char text[512] = "";
  pslm_error argument() { return {text, sizeof text}; }
};

}  // namespace

Memory read_memory() {
  Memory memory;
  if (FILE* file = std::fopen("/proc/self/status", "r")) {
    char line[256];
    unsigned long long kilobytes = 0;
    while (std::fgets(line, sizeof line, file)) {
      if (std::sscanf(line, "VmRSS: %llu", &kilobytes) == 1) memory.resident = kilobytes * 1024;
      if (std::sscanf(line, "VmHWM: %llu", &kilobytes) == 1) memory.peak = kilobytes * 1024;
    }
    std::fclose(file);
  }
  return memory;
}

void Engine::unload() {
  pslm_session_close(session_);
  pslm_model_close(model_);
  session_ = nullptr;
  model_ = nullptr;
  tokenizer_ = Tokenizer();
  has_chat_ = false;
  chat_ = ChatParts();
  cached_.clear();
}

std::string Engine::load(const LoadOptions& options) {
  unload();
  const auto start = Clock::now();
  ErrorLine error;
  if (pslm_model_open(options.path.c_str(), &model_, error.argument()) != PSLM_OK)
    return error.text;
  pslm_model_describe(model_, &model_info_);
  const pslm_options session_options{options.context, options.threads, options.kv_type,
                                     options.pin ? 1u : 0u, options.isa.c_str()};
  std::string failure;
  if (pslm_session_open(model_, &session_options, &session_, error.argument()) != PSLM_OK)
    failure = error.text;
  size_t bytes = 0;
  if (const void* data = pslm_model_blob(model_, static_cast<uint32_t>(Role::tokenizer), &bytes);
      failure.empty() && data)
    failure = tokenizer_.load(data, bytes, model_info_.vocab_size);
  if (const void* data = pslm_model_blob(model_, static_cast<uint32_t>(Role::chat), &bytes);
      failure.empty() && data) {
    const auto chat = parse_json({static_cast<const char*>(data), bytes});
    failure = chat ? read_chat(*chat) : "the chat section is not JSON";
  }
  profiled_ = options.profile;
  restart_times();
  if (!failure.empty()) unload();
  load_ms_ = milliseconds_since(start);
  return failure;
}

std::string Engine::read_chat(const Json& chat) {
  const std::pair<const char*, std::string*> parts[] = {
      {"start_system", &chat_.start_system},           {"system_to_user", &chat_.system_to_user},
      {"start_user", &chat_.start_user},               {"user_to_assistant", &chat_.user_to_assistant},
      {"assistant_to_user", &chat_.assistant_to_user},
  };
  for (const auto& [name, target] : parts) {
    const Json* value = chat.find(name);
    if (!value || !value->is(Json::Kind::string)) return "the chat section lacks " + std::string(name);
    *target = value->string;
  }
  if (const Json* eos = chat.find("eos"))
    for (const Json& id : eos->items) {
      if (!(id.number >= 0 && id.number < model_info_.vocab_size))
        return "the chat section names an unknown token";
      chat_.eos.push_back(static_cast<int32_t>(id.number));
    }
  has_chat_ = true;
  return "";
}

pslm_session_info Engine::session_info() const {
  pslm_session_info info{};
  pslm_session_describe(session_, &info);
  return info;
}

pslm_times Engine::times() const {
  pslm_times times{};
  pslm_read_times(session_, &times);
  return times;
}

void Engine::reset() {
  pslm_truncate(session_, 0);
  cached_.clear();
}

std::string Engine::encode(std::string_view text, std::vector<int32_t>& tokens) const {
  if (!tokenizer_.loaded()) return "the model file has no tokenizer; pass tokens instead";
  tokenizer_.encode(text, true, tokens);
  return "";
}

// What the template wrote may name special tokens; what people wrote may not.
std::string Engine::encode_chat(const std::vector<Message>& messages,
                                std::vector<int32_t>& tokens) const {
  if (!tokenizer_.loaded() || !has_chat_)
    return "the model file has no chat template; pass prompt or tokens instead";
  std::string previous;
  for (const Message& message : messages) {
    const std::string* lead = nullptr;
    if (previous.empty() && message.role == "system") lead = &chat_.start_system;
    if (previous.empty() && message.role == "user") lead = &chat_.start_user;
    if (previous == "system" && message.role == "user") lead = &chat_.system_to_user;
    if (previous == "user" && message.role == "assistant") lead = &chat_.user_to_assistant;
    if (previous == "assistant" && message.role == "user") lead = &chat_.assistant_to_user;
    if (!lead)
      return "messages must be an optional system message, then user and assistant in turn; got '" +
             message.role + "' after '" + previous + "'";
    tokenizer_.encode(*lead, true, tokens);
    tokenizer_.encode(message.content, false, tokens);
    previous = message.role;
  }
  if (previous != "user") return "the last message must be the user's";
  tokenizer_.encode(chat_.user_to_assistant, true, tokens);
  return "";
}

std::string Engine::generate(const std::vector<int32_t>& prompt, const Generation& generation,
                             const std::function<bool(int32_t, std::string_view)>& on_token,
                             Outcome& outcome) {
  if (prompt.empty()) return "the prompt is empty";
  const auto started = Clock::now();
  // Keep what the session already holds of this prompt, all but the token that gives the logits.
  size_t common = 0;
  while (common < cached_.size() && common + 1 < prompt.size() && cached_[common] == prompt[common])
    ++common;
  pslm_truncate(session_, common);
  cached_.resize(common);
  outcome = {};
  outcome.prompt_tokens = prompt.size();
  outcome.reused_tokens = common;

  Sampler sampler(generation.sampling);
  std::vector<float> logits(model_info_.vocab_size);
  ErrorLine error;
  if (pslm_forward(session_, prompt.data() + common, prompt.size() - common, PSLM_LOGITS_LAST,
                   logits.data(), logits.size(), error.argument()) != PSLM_OK)
    return error.text;
  cached_ = prompt;
  int32_t token = sampler.pick(logits);
  outcome.prefill_ms = milliseconds_since(started);

  const auto decode_started = Clock::now();
  const size_t context = session_info().context;
  std::string pending;  // the beginning of a character whose end is in the next token
  outcome.reason = "length";
  while (outcome.new_tokens < generation.max_tokens) {
    if (!generation.ignore_eos &&
        std::find(chat_.eos.begin(), chat_.eos.end(), token) != chat_.eos.end()) {
      outcome.reason = "eos";
      break;
    }
    ++outcome.new_tokens;
    pending += tokenizer_.bytes(token);
    const bool last = outcome.new_tokens == generation.max_tokens;
    const size_t held = last ? 0 : incomplete_utf8(pending);
    const bool go_on = on_token(token, std::string_view(pending).substr(0, pending.size() - held));
    pending.erase(0, pending.size() - held);
    if (!go_on) {
      outcome.reason = "cancelled";
      break;
    }
    if (last) break;
    if (cached_.size() == context) {
      outcome.reason = "context";
      break;
    }
    const int32_t previous = token;
    const pslm_status status =
        sampler.greedy() ? pslm_step_greedy(session_, previous, &token, error.argument())
                         : pslm_forward(session_, &previous, 1, PSLM_LOGITS_LAST, logits.data(),
                                        logits.size(), error.argument());
    if (status != PSLM_OK) return error.text;
    cached_.push_back(previous);
    if (!sampler.greedy()) token = sampler.pick(logits);
  }
  outcome.decode_ms = milliseconds_since(decode_started);
  return "";
}

std::string Engine::logits(const std::vector<int32_t>& tokens, std::vector<float>& out) {
  reset();
  out.resize(model_info_.vocab_size);
  ErrorLine error;
  if (pslm_forward(session_, tokens.data(), tokens.size(), PSLM_LOGITS_LAST, out.data(), out.size(),
                   error.argument()) != PSLM_OK)
    return error.text;
  cached_ = tokens;
  return "";
}

std::string Engine::bench(size_t prompt, size_t fresh, size_t repeats,
                          std::vector<int64_t>& prefill_ns, std::vector<int64_t>& decode_ns) {
  ErrorLine error;
  const uint32_t vocabulary = model_info_.vocab_size;
  std::vector<int32_t> tokens(prompt);
  uint64_t state = 1;
  for (int32_t& token : tokens) {
    state = state * 6364136223846793005u + 1442695040888963407u;
    token = static_cast<int32_t>((state >> 33) % vocabulary);
  }
  std::vector<float> logits(vocabulary);
  for (size_t repeat = 0; repeat < repeats; ++repeat) {
    reset();
    if (prompt) {
      const auto start = Clock::now();
      if (pslm_forward(session_, tokens.data(), prompt, PSLM_LOGITS_LAST, logits.data(),
                       logits.size(), error.argument()) != PSLM_OK)
        return error.text;
      prefill_ns.push_back(nanoseconds_since(start));
    }
    if (!fresh) continue;
    int32_t token = 0;
    const auto start = Clock::now();
    for (size_t i = 0; i < fresh; ++i)
      if (pslm_step_greedy(session_, token, &token, error.argument()) != PSLM_OK) return error.text;
    decode_ns.push_back(nanoseconds_since(start));
  }
  reset();
  return "";
}

}  // namespace pocketslm
