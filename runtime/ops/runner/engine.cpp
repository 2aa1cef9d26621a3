#include "engine.h"

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <list>
#include <optional>

#include "grammar/held.h"
#include "model_file.h"
#include "platform.h"

namespace pocketslm {
namespace {

using Clock = std::chrono::steady_clock;

double milliseconds_since(Clock::time_point start) {
  return std::chrono::duration<double, std::milli>(Clock::now() - start).count();
}

struct ErrorLine {
  char text[512] = "";
  pslm_error argument() { return {text, sizeof text}; }
};

// Empty, or why these CPUs cannot be had; none: those that the process was started with.
std::string run_on(const std::vector<int>& cpus) {
  // A session that pins narrows the calling thread's.
  static const std::vector<int> initial = platform::usable_cpus();
  for (int cpu : cpus)
    if (!std::binary_search(initial.begin(), initial.end(), cpu))
      return "CPU " + std::to_string(cpu) + " is not among those that this process may use";
  return platform::run_on(cpus.empty() ? initial : cpus) ? "" : "the system refuses the choice of CPUs";
}

}  // namespace

void Engine::unload() {
  pslm_session_close(session_);
  pslm_model_close(model_);
  session_ = nullptr;
  model_ = nullptr;
  tokenizer_ = Tokenizer();
  trie_.reset();
  chat_ = Chat();
  cached_.clear();
}

std::string Engine::load(const LoadOptions& options) {
  std::string failure;
  try {
    failure = load_parts(options);
  } catch (...) {
    unload();
    throw;
  }
  if (!failure.empty()) unload();
  return failure;
}

std::string Engine::load_parts(const LoadOptions& options) {
  unload();
  if (const std::string failure = run_on(options.cpus); !failure.empty()) return failure;
  if (options.cold && !platform::drop_from_page_cache(options.path.c_str()))
    return "this system cannot drop a file from its page cache; load it without 'cold'";
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
      failure.empty() && data) {
    failure = tokenizer_.load(data, bytes, model_info_.vocab_size);
    platform::drop_mapped(data, bytes);  // all was read to check it; a text needs little
  }
  if (const void* data = pslm_model_blob(model_, static_cast<uint32_t>(Role::chat), &bytes);
      failure.empty() && data) {
    const auto chat = parse_json({static_cast<const char*>(data), bytes});
    failure = chat ? chat_.read(*chat, model_info_.vocab_size) : "the chat section is not JSON";
  }
  profiled_ = options.profile;
  restart_times();
  load_ms_ = milliseconds_since(start);
  return failure;
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

std::string Engine::encode(std::string_view text, std::vector<int32_t>& tokens,
                           const TextLimits& limits) const {
  if (!tokenizer_.loaded()) return "the model file has no tokenizer; pass tokens instead";
  if (!reads_text())
    return "the model's tokenizer normalizes text as the runner cannot; pass tokens instead";
  tokenizer_.encode_whole({text, limits.special}, tokens, limits.most);
  return "";
}

// What the template wrote may name special tokens; what people wrote may not.
std::string Engine::encode_chat(const std::vector<Message>& messages,
                                std::vector<int32_t>& tokens) const {
  if (!reads_text() || !chat_.loaded())
    return "the model file has no chat template; pass prompt or tokens instead";
  std::vector<TextPart> parts;
  std::list<std::string> written;
  if (std::string failure = chat_.compose(messages, parts, written); !failure.empty())
    return failure;
  tokenizer_.encode(parts, tokens);
  return "";
}

std::shared_ptr<const grammar::TokenTrie> Engine::token_trie() {
  if (!trie_) {
    std::vector<std::string_view> texts;
    for (uint32_t token = 0; token < model_info_.vocab_size; ++token)
      texts.push_back(tokenizer_.bytes(static_cast<int32_t>(token)));
    trie_ = std::make_shared<grammar::TokenTrie>(texts);
  }
  return trie_;
}

// Keep what the session already holds of these tokens, at most `limit` of them; none where it has
// forgotten what it knew then.
size_t Engine::keep_common(const std::vector<int32_t>& tokens, size_t limit) {
  size_t common = 0;
  while (common < cached_.size() && common < limit && cached_[common] == tokens[common]) ++common;
  if (pslm_truncate(session_, common) != PSLM_OK) pslm_truncate(session_, common = 0);
  cached_.resize(common);
  return common;
}

std::string Engine::generate(const std::vector<int32_t>& prompt, const Generation& generation,
                             const std::function<void(const NewToken&)>& on_token,
                             const std::function<bool()>& go_on, Outcome& outcome) {
  if (prompt.empty()) return "the prompt is empty";
  pslm_generation options = generation.options;
  const std::vector<int32_t>& eos = generation.eos.empty() ? chat_.eos() : generation.eos;
  if (!generation.ignore_eos) options.ends = eos.data(), options.end_count = eos.size();
  std::optional<pslm_constraint> constraint;
  if (generation.grammar) {
    if (!tokenizer_.loaded()) return "the model file has no tokenizer, whose tokens a grammar needs";
    if (generation.ignore_eos) return "'ignore_eos' with a grammar, which says where an answer ends";
    std::vector<uint32_t> ends;
    for (const int32_t token : eos)
      if (static_cast<uint32_t>(token) < model_info_.vocab_size)
        ends.push_back(static_cast<uint32_t>(token));
    constraint.emplace(pslm_constraint{
        {generation.grammar, token_trie(), ends, tokenizer_.strips_space()}});
    options.constraint = &*constraint;
  }
  auto mark = Clock::now();
  outcome = {};
  outcome.prompt_tokens = prompt.size();
  outcome.reused_tokens = keep_common(prompt, prompt.size() - 1);  // the last one gives the logits
  ErrorLine error;
  pslm_generator* opened = nullptr;
  if (pslm_generator_open(session_, prompt.data(), prompt.size(), &options, &opened,
                          error.argument()) != PSLM_OK)
    return error.text;
  cached_ = prompt;
  const auto close = [this](pslm_generator* generator) {
    pslm_generator_close(generator);
    cached_.resize(std::min(cached_.size(), length()));
  };
  const std::unique_ptr<pslm_generator, decltype(close)> generator(opened, close);
  std::string pending;  // the beginning of a character whose end is in the next token
  outcome.reason = "cancelled";
  while (go_on()) {
    pslm_made made;
    if (pslm_generator_next(opened, &made, error.argument()) != PSLM_OK) return error.text;
    if (made.token < 0) continue;
    if (cached_.size() == prompt.size()) {
      outcome.prefill_ms = milliseconds_since(mark);
      mark = Clock::now();
    }
    cached_.push_back(made.token);
    outcome.decode_ms = milliseconds_since(mark);
    static constexpr const char* kReasons[] = {"", "eos", "stop", "length", "context"};
    const auto logprob = static_cast<float>(made.logprob);
    if (made.finish) outcome.reason = kReasons[made.finish];
    if (made.finish == PSLM_FINISH_END) {
      outcome.last = made.token;
      outcome.last_logprob = logprob;
      break;
    }
    std::string_view bytes = tokenizer_.bytes(made.token);
    if (!outcome.new_tokens++ && tokenizer_.strips_space() && bytes.substr(0, 1) == " ")
      bytes.remove_prefix(1);
    pending += bytes;
    const size_t held = made.finish ? 0 : incomplete_utf8(pending);
    const bool whole = made.finish == PSLM_FINISH_STOP;
    on_token(
        {made.token, std::string_view(pending).substr(0, pending.size() - held), logprob, whole});
    pending.erase(0, pending.size() - held);
    if (made.finish) break;
  }
  return "";
}

std::string Engine::logits(const std::vector<int32_t>& tokens, size_t first,
                           std::vector<float>& out) {
  if (tokens.empty()) return "the prompt is empty";
  const size_t common = keep_common(tokens, first);
  const bool all = first + 1 < tokens.size();
  const size_t count = tokens.size() - common;
  out.resize((all ? count : 1) * model_info_.output_size);
  ErrorLine error;
  if (pslm_forward(session_, tokens.data() + common, count,
                   all ? PSLM_LOGITS_ALL : PSLM_LOGITS_LAST, out.data(), out.size(),
                   error.argument()) != PSLM_OK)
    return error.text;
  if (all)
    out.erase(out.begin(), out.begin() + static_cast<std::ptrdiff_t>((first - common) *
                                                                     model_info_.output_size));
  cached_ = tokens;
  return "";
}

std::string Engine::embed(const std::vector<int32_t>& tokens, Pooling pooling, bool normalize,
                          std::vector<float>& out) {
  if (model_info_.head_macs) return "the model generates text: it has no embeddings";
  reset();  // a text is read for itself
  const size_t first = pooling == Pooling::last ? tokens.size() - 1 : 0, size = model_info_.output_size;
  if (std::string failure = logits(tokens, first, out); !failure.empty()) return failure;
  if (pooling == Pooling::mean) {
    for (size_t i = 0; i < size; ++i) {
      double sum = 0;
      for (size_t row = 0; row < tokens.size(); ++row) sum += static_cast<double>(out[row * size + i]);
      out[i] = static_cast<float>(sum / static_cast<double>(tokens.size()));
    }
  }
  out.resize(size);
  if (!normalize) return "";
  double squares = 0;
  for (float value : out) squares += static_cast<double>(value) * static_cast<double>(value);
  if (!(squares > 0)) return "the embedding has no direction: the weights are damaged";
  for (float& value : out) value = static_cast<float>(static_cast<double>(value) / std::sqrt(squares));
  return "";
}

std::vector<int32_t> Engine::random_tokens(size_t count) const {
  std::vector<int32_t> tokens(count);
  uint64_t state = 1;
  for (int32_t& token : tokens) {
    state = state * 6364136223846793005u + 1442695040888963407u;
    token = static_cast<int32_t>((state >> 33) % model_info_.vocab_size);
  }
  return tokens;
}

std::string Engine::bench(const std::vector<int32_t>& prompt, size_t fresh, size_t repeats,
                          const std::function<bool()>& go_on, Times& times) {
  ErrorLine error;
  const bool encoder = model_info_.output_size != model_info_.vocab_size;
  std::vector<float> vector(encoder ? model_info_.output_size : 0);
  for (size_t repeat = 0; repeat < repeats; ++repeat) {
    reset();
    restart_times();
    int32_t token = 0;
    auto mark = Clock::now();
    // The nanoseconds since the last call.
    const auto lap = [&mark] {
      const auto before = mark;
      mark = Clock::now();
      return std::chrono::duration_cast<std::chrono::nanoseconds>(mark - before).count();
    };
    auto used = platform::spent();
    const auto spend = [&used](std::vector<int64_t>& cpu_ns, std::vector<int64_t>& faults) {
      const auto before = used;
      used = platform::spent();
      cpu_ns.push_back(static_cast<int64_t>(used.cpu_ns - before.cpu_ns));
      faults.push_back(static_cast<int64_t>(used.major_faults - before.major_faults));
    };
    if (!prompt.empty()) {
      // As an answer begins: of an int8 head not all is read.
      const pslm_status status =
          encoder ? pslm_forward(session_, prompt.data(), prompt.size(), PSLM_LOGITS_LAST,
                                 vector.data(), vector.size(), error.argument())
                  : pslm_forward_greedy(session_, prompt.data(), prompt.size(), 1, nullptr, &token,
                                        error.argument());
      if (status != PSLM_OK) return error.text;
      times.prefill_ns.push_back(lap());
      spend(times.prefill_cpu_ns, times.prefill_faults);
    }
    times.prefill_operators = this->times();
    restart_times();
    int64_t decode_ns = 0;
    lap();
    for (size_t i = 0; i < fresh; ++i) {
      if (!go_on()) return "cancelled";
      if (pslm_step_greedy(session_, token, &token, error.argument()) != PSLM_OK) return error.text;
      times.step_ns.push_back(lap());
      decode_ns += times.step_ns.back();
    }
    if (fresh) {
      times.decode_ns.push_back(decode_ns);
      spend(times.decode_cpu_ns, times.decode_faults);
    }
    times.decode_operators = this->times();
    if (!go_on()) return "cancelled";
  }
  reset();
  return "";
}

}  // namespace pocketslm
