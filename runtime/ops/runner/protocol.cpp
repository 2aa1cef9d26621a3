#include "protocol.h"

#include <algorithm>
#include <condition_variable>
#include <cstdarg>
#include <deque>
#include <initializer_list>
#include <limits>
#include <mutex>
#include <new>
#include <optional>
#include <thread>

#include "engine.h"
#include "grammar/sources.h"
#include "platform.h"

namespace pocketslm {
namespace {

constexpr size_t kMaxLine = 16 << 20;
constexpr int kMaxRequestDepth = grammar::kMaxSchemaDepth + 1;

// Lines arrive on a thread of their own, so that a cancel is seen while tokens are made.
class LineReader {
 public:
  explicit LineReader(FILE* in) {
    std::thread([this, in] { read(in); }).detach();  // it may wait for input that never comes
  }

  // The next line that is not a cancel; nothing at the end of input.
  std::optional<std::string> next() {
    std::unique_lock<std::mutex> lock(mutex_);
    changed_.wait(lock, [&] { return !lines_.empty() || ended_; });
    if (lines_.empty()) return std::nullopt;
    current_ = lines_.front().number;
    std::string line = std::move(lines_.front().text);
    lines_.pop_front();
    while (!cancels_.empty() && cancels_.front().number < current_) cancels_.pop_front();
    return line;
  }

  // Whether a cancel of this id (or of any) came after the current line.
  bool cancelled(const std::string& id) {
    std::lock_guard<std::mutex> lock(mutex_);
    return std::any_of(cancels_.begin(), cancels_.end(), [&](const Line& cancel) {
      return cancel.text.empty() || cancel.text == id;
    });
  }

 private:
  struct Line {
    uint64_t number;
    std::string text;
  };

  void push(std::string&& line) {
    std::optional<Json> request;
    try {
      if (line.find("cancel") != std::string::npos) request = parse_json(line);
    } catch (const std::bad_alloc&) {  // whoever answers it says so
    }
    const Json* op = request ? request->find("op") : nullptr;
    std::lock_guard<std::mutex> lock(mutex_);
    ++count_;
    if (op && op->string == "cancel") {
      const Json* id = request->find("id");
      cancels_.push_back({count_, id ? id->string : ""});
      return;
    }
    lines_.push_back({count_, std::move(line)});
    changed_.notify_one();
  }

  // A line that is too long, or for which there is no memory, goes on as one that is no request.
  void read(FILE* in) {
    std::string line;
    for (int c; (c = std::getc(in)) != EOF;) {
      if (c == '\n') {
        if (!line.empty()) push(std::move(line));
        line.clear();
        continue;
      }
      if (line.size() > kMaxLine) continue;
      try {
        line += static_cast<char>(c);
      } catch (const std::bad_alloc&) {
        std::string("?").swap(line);
      }
    }
    if (!line.empty()) push(std::move(line));
    std::lock_guard<std::mutex> lock(mutex_);
    ended_ = true;
    changed_.notify_one();
  }

  std::mutex mutex_;
  std::condition_variable changed_;
  std::deque<Line> lines_, cancels_;  // numbered in the order of reading
  uint64_t count_ = 0, current_ = 0;
  bool ended_ = false;
};

// A request whose fields are read with their types and ranges; the first fault is kept. What nobody
// reads is a fault, too: a misspelt option would be one that does nothing.
class Request {
 public:
  explicit Request(const Json& json) : json_(json) {}

  std::string text(const char* name, const std::string& otherwise) {
    const Json* value = find(name);
    if (!value) return otherwise;
    if (!value->is(Json::Kind::string)) return fail(name, "a string"), otherwise;
    return value->string;
  }
  double number(const char* name, double otherwise, double low, double high, bool whole = false) {
    const Json* value = find(name);
    if (!value) return otherwise;
    const double n = value->number;
    const bool valid = value->is(Json::Kind::number) && n >= low && n <= high;
    if (!valid || (whole && n != static_cast<double>(static_cast<int64_t>(n)))) {
      char expected[96];
      std::snprintf(expected, sizeof expected, "a %snumber from %g to %g", whole ? "whole " : "",
                    low, high);
      return fail(name, expected), otherwise;
    }
    return n;
  }
  uint32_t count(const char* name, uint32_t otherwise, double low, double high) {
    return static_cast<uint32_t>(number(name, otherwise, low, high, true));
  }
  bool flag(const char* name) {
    const Json* value = find(name);
    if (!value) return false;
    if (!value->is(Json::Kind::boolean)) fail(name, "true or false");
    return value->boolean;
  }
  const Json* list(const char* name) {
    const Json* value = find(name);
    if (value && !value->is(Json::Kind::array)) return fail(name, "a list"), nullptr;
    return value;
  }
  const Json* value(const char* name) { return find(name); }
  void fail(const std::string& name, const std::string& expected) {
    if (fault_.empty()) fault_ = "'" + name + "' must be " + expected;
  }
  // Once all fields are read: empty, or what is wrong.
  std::string fault() const {
    if (!fault_.empty()) return fault_;
    for (const auto& field : json_.fields)
      if (std::find(read_.begin(), read_.end(), field.first) == read_.end())
        return "'" + field.first + "' is unknown here, or says what another field says";
    return "";
  }

 private:
  const Json* find(const char* name) {
    read_.push_back(name);
    return json_.find(name);
  }

  const Json& json_;
  std::string fault_;
  std::vector<std::string_view> read_{"op"};
};

std::string logprob(float value) {
  char text[48];
  std::snprintf(text, sizeof text, ",\"logprob\":%.7g", static_cast<double>(value));
  return text;
}

// Of the values' bytes, little-endian fp32.
std::string base64(const std::vector<float>& values) {
  constexpr char kDigits[] = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/";
  const auto* bytes = reinterpret_cast<const unsigned char*>(values.data());
  const size_t size = values.size() * sizeof(float);
  std::string out;
  out.reserve((size + 2) / 3 * 4);
  for (size_t i = 0; i < size; i += 3) {
    const size_t have = std::min<size_t>(3, size - i);
    uint32_t word = uint32_t{bytes[i]} << 16;
    if (have > 1) word |= uint32_t{bytes[i + 1]} << 8;
    if (have > 2) word |= bytes[i + 2];
    for (size_t digit = 0; digit < 4; ++digit)
      out += digit <= have ? kDigits[word >> (18 - 6 * digit) & 63] : '=';
  }
  return out;
}

std::string numbers(const std::vector<int64_t>& values) {
  std::string out = "[";
  for (int64_t value : values) out += (out.size() > 1 ? "," : "") + std::to_string(value);
  return out + "]";
}

class Server {
 public:
  Server(LineReader& reader, FILE* out) : reader_(reader), out_(out) {}

  // 0, or 1 where an answer could not be written.
  int run() {
    while (auto line = reader_.next()) {
      id_.clear();
      try {
        const auto json = line->size() > kMaxLine ? std::nullopt : parse_json(*line, kMaxRequestDepth);
        const Json* op = json && json->is(Json::Kind::object) ? json->find("op") : nullptr;
        if (op && op->is(Json::Kind::string)) {
          if (op->string == "quit") break;
          Request request(*json);
          id_ = request.text("id", "");
          if (const std::string failure = handle(op->string, request); !failure.empty())
            error(failure);
        } else {
          error("a request is one line with a JSON object that has 'op', no field twice, at most " +
                std::to_string(kMaxLine >> 20) + " MB and " + std::to_string(kMaxValues) +
                " values");
        }
      } catch (const std::bad_alloc&) {
        error("out of memory");
      } catch (const std::exception& failure) {
        error(failure.what());
      }
      if (!written_) {
        std::fputs("pocketslm-run: the answer cannot be written\n", stderr);
        return 1;
      }
    }
    return 0;
  }

 private:
  // One event, with the id of its request; `format` gives its further fields, each after a comma.
  void emit(const char* event, const char* format, ...) __attribute__((format(printf, 3, 4))) {
    std::fprintf(out_, "{\"event\":\"%s\",\"id\":%s", event, quote(id_).c_str());
    va_list arguments;
    va_start(arguments, format);
    std::vfprintf(out_, format, arguments);
    va_end(arguments);
    std::fputs("}\n", out_);
    if (std::fflush(out_) != 0 || std::ferror(out_)) written_ = false;
  }

  void error(const std::string& message) {
    emit("error", ",\"message\":%s", quote(message).c_str());
  }

  std::string handle(const std::string& op, Request& request) {
    if (op == "load") return load(request);
    if (op == "stats") return stats(request);
    if (op == "probe") return probe(request);
    if (!engine_.loaded()) return "no model is loaded; send {\"op\":\"load\",\"path\":...} first";
    if (op == "generate") return generate(request);
    if (op == "logits") return logits(request);
    if (op == "embed") return embed(request);
    if (op == "encode") return encode(request);
    if (op == "bench") return bench(request);
    if (op == "reset") {
      if (!request.fault().empty()) return request.fault();
      engine_.reset();
      engine_.restart_times();
      emit("reset", "%s", "");
      return "";
    }
    return "unknown op '" + op +
           "'; known: load, generate, cancel, encode, logits, embed, bench, stats, probe, reset, "
           "quit";
  }

  std::string load(Request& request) {
    LoadOptions options;
    options.path = request.text("path", "");
    options.context = request.count("context", 0, 1, 1 << 24);
    options.threads = request.count("threads", 0, 1, 64);
    options.isa = request.text("isa", "auto");
    options.pin = request.flag("pin");
    options.profile = request.flag("profile");
    options.cold = request.flag("cold");
    if (const Json* list = request.list("cpus"))
      for (const Json& item : list->items) {
        if (!item.is_whole(0, platform::kMaxCpus - 1))
          return "'cpus' must be numbers of CPUs";
        options.cpus.push_back(static_cast<int>(item.number));
      }
    const std::string kv = request.text("kv", "fp16");
    if (kv != "fp16" && kv != "int8") request.fail("kv", "fp16 or int8");
    options.kv_type = kv == "int8" ? PSLM_KV_I8 : PSLM_KV_F16;
    if (!request.fault().empty()) return request.fault();
    if (std::string failure = engine_.load(options); !failure.empty()) return failure;
    const pslm_session_info session = engine_.session_info();
    const pslm_model_info& model = engine_.model_info();
    emit("loaded", ",\"isa\":\"%s\",\"threads\":%u,\"context\":%u,\"kv\":\"%s\","
         "\"vocab_size\":%u,\"layers\":%u,\"file_bytes\":%llu,\"bytes_per_token\":%llu,"
         "\"macs_per_token\":%llu,\"tokenizer\":%s,\"load_ms\":%.3f,\"compiler\":%s",
         session.isa, session.threads, session.context, kv.c_str(), model.vocab_size, model.layers,
         static_cast<unsigned long long>(model.file_bytes),
         static_cast<unsigned long long>(model.bytes_per_token),
         static_cast<unsigned long long>(model.macs_per_token),
         engine_.reads_text() ? "true" : "false", engine_.load_ms(),
         quote(pslm_compiler()).c_str());
    return "";
  }

  // The prompt as 'tokens', 'messages' or 'prompt', a text within these limits.
  std::string prompt(Request& request, std::vector<int32_t>& tokens, const TextLimits& limits = {}) {
    if (const Json* list = request.list("tokens")) {
      const uint32_t vocabulary = engine_.model_info().vocab_size;
      for (const Json& item : list->items) {
        if (!item.is_whole(0, vocabulary - 1.0))
          return "'tokens' must be ids below " + std::to_string(vocabulary);
        tokens.push_back(static_cast<int32_t>(item.number));
      }
      return tokens.empty() ? "'tokens' must not be empty" : "";
    }
    if (const Json* list = request.list("messages")) {
      std::vector<Message> messages;
      for (const Json& item : list->items) {
        const Json* role = item.find("role");
        const Json* content = item.find("content");
        if (!role || !content || !role->is(Json::Kind::string) ||
            !content->is(Json::Kind::string))
          return "each of 'messages' must have a role and a content";
        messages.push_back({role->string, content->string});
      }
      return engine_.encode_chat(messages, tokens);
    }
    return engine_.encode(request.text("prompt", ""), tokens, limits);
  }

  // What the answer is held to: 'json_schema', 'regex' or 'grammar', one of them at most.
  static std::string constraint(Request& request,
                                std::shared_ptr<const grammar::Automaton>& automaton) {
    const char* kind = "";
    try {
      if (const Json* schema = request.value(kind = "json_schema"))
        automaton = std::make_shared<grammar::Automaton>(grammar::read_json_schema(*schema));
      for (const auto& [name, number] :
           {std::pair("regex", PSLM_GRAMMAR_REGEX), std::pair("grammar", PSLM_GRAMMAR_GBNF)}) {
        const std::string text = request.text(kind = name, "");
        if (!request.value(name)) continue;
        if (automaton) return "an answer is held to one of 'json_schema', 'regex' and 'grammar'";
        automaton = grammar::read_grammar(number, text);
      }
    } catch (const grammar::GrammarError& error) {
      return std::string(kind) + ": " + error.what();
    }
    return "";
  }

  std::string generate(Request& request) {
    Generation generation;
    pslm_generation& options = generation.options;
    options.max_tokens = request.count("max_tokens", 128, 1, 1 << 24);
    generation.ignore_eos = request.flag("ignore_eos");
    options.temperature = static_cast<float>(request.number("temperature", 0, 0, 1e9));
    options.top_k = request.count("top_k", 0, 0, 1 << 24);
    options.top_p = static_cast<float>(request.number("top_p", 1, 0, 1));
    options.min_p = static_cast<float>(request.number("min_p", 0, 0, 1));
    options.typical_p = static_cast<float>(request.number("typical_p", 1, 0, 1));
    options.seed = static_cast<uint64_t>(request.number("seed", 0, 0, 1e15, true));
    options.repetition_penalty =
        static_cast<float>(request.number("repetition_penalty", 1, 0.01, 100));
    options.spare_prompt = request.flag("spare_prompt");
    options.logprobs = request.flag("logprobs");
    options.guesses = request.count("prompt_lookup", PromptLookup::kMost, 0, 1 << 24);
    if (const Json* list = request.list("eos"))
      for (const Json& item : list->items) {
        if (!item.is_whole(0, std::numeric_limits<int32_t>::max()))
          return "'eos' must be ids of tokens";
        generation.eos.push_back(static_cast<int32_t>(item.number));
      }
    if (std::string failure = constraint(request, generation.grammar); !failure.empty())
      return failure;
    std::vector<int32_t> tokens;
    if (std::string failure = prompt(request, tokens); !failure.empty()) return failure;
    if (!request.fault().empty()) return request.fault();
    Outcome outcome;
    const std::string failure = engine_.generate(
        tokens, generation,
        [&](const NewToken& made) {
          emit("token", ",\"token\":%d,\"text\":%s%s%s", made.token, quote(made.text).c_str(),
               options.logprobs ? logprob(made.logprob).c_str() : "",
               made.whole ? ",\"whole\":true" : "");
        },
        [&] { return written_ && !reader_.cancelled(id_); }, outcome);
    if (!failure.empty()) return failure;
    std::string last;
    if (outcome.reason == "eos") {
      last = ",\"token\":" + std::to_string(outcome.last);
      if (options.logprobs) last += logprob(outcome.last_logprob);
    }
    emit("done",
         ",\"reason\":\"%s\",\"prompt_tokens\":%zu,\"reused_tokens\":%zu,\"tokens\":%zu,"
         "\"prefill_ms\":%.3f,\"decode_ms\":%.3f%s",
         outcome.reason.c_str(), outcome.prompt_tokens, outcome.reused_tokens, outcome.new_tokens,
         outcome.prefill_ms, outcome.decode_ms, last.c_str());
    return "";
  }

  std::string encode(Request& request) {
    std::vector<int32_t> tokens;
    if (std::string failure = prompt(request, tokens); !failure.empty()) return failure;
    if (!request.fault().empty()) return request.fault();
    emit("encoded", ",\"tokens\":%s",
         numbers(std::vector<int64_t>(tokens.begin(), tokens.end())).c_str());
    return "";
  }

  std::string logits(Request& request) {
    std::vector<int32_t> tokens;
    std::vector<float> values;
    if (std::string failure = prompt(request, tokens); !failure.empty()) return failure;
    if (tokens.empty()) return "the prompt is empty";
    const uint32_t first = request.count("first", static_cast<uint32_t>(tokens.size() - 1), 0,
                                         static_cast<double>(tokens.size() - 1));
    const bool packed = request.flag("base64");
    if (!request.fault().empty()) return request.fault();
    if (std::string failure = engine_.logits(tokens, first, values); !failure.empty())
      return failure;
    emit("logits", ",%s", floats("logits", values, packed).c_str());
    return "";
  }

  // As a list under this name, or as their bytes.
  static std::string floats(const char* name, const std::vector<float>& values, bool packed) {
    if (packed) return "\"base64\":\"" + base64(values) + "\"";
    std::string list;
    for (float value : values) {
      char text[32];
      std::snprintf(text, sizeof text, "%s%.9g", list.empty() ? "" : ",", static_cast<double>(value));
      list += text;
    }
    return "\"" + std::string(name) + "\":[" + list + "]";
  }

  // 'pooling' and 'normalize' are what the bundle's manifest says of the model.
  std::string embed(Request& request) {
    const std::string kind = request.text("pooling", "");
    if (kind != "mean" && kind != "cls" && kind != "last")
      request.fail("pooling", "mean, cls or last");
    const bool normalize = request.flag("normalize"), packed = request.flag("base64");
    const bool cut = request.flag("truncate");
    const uint32_t context = engine_.session_info().context;
    const uint32_t most = request.count("max_tokens", context, 1, context);
    std::vector<int32_t> tokens;
    TextLimits limits{false};
    if (cut) limits.most = most;
    if (std::string failure = prompt(request, tokens, limits); !failure.empty()) return failure;
    if (!request.fault().empty()) return request.fault();
    if (tokens.empty()) return "the text has no tokens";
    if (tokens.size() > most)
      return std::to_string(tokens.size()) + " tokens, at most " + std::to_string(most) +
             "; split the text, or let its first tokens stand for it with 'truncate'";
    const Pooling pooling = kind == "mean" ? Pooling::mean
                            : kind == "cls" ? Pooling::cls
                                            : Pooling::last;
    std::vector<float> values;
    if (std::string failure = engine_.embed(tokens, pooling, normalize, values); !failure.empty())
      return failure;
    emit("embedding", ",\"prompt_tokens\":%zu,%s", tokens.size(),
         floats("embedding", values, packed).c_str());
    return "";
  }

  std::string bench(Request& request) {
    const uint32_t fresh = request.count("new_tokens", 128, 0, 1 << 20);
    const uint32_t repeats = request.count("repeats", 3, 1, 1000);
    std::vector<int32_t> tokens;
    if (request.list("tokens")) {
      if (std::string failure = prompt(request, tokens); !failure.empty()) return failure;
    } else {
      tokens = engine_.random_tokens(request.count("prompt_tokens", 512, 0, 1 << 20));
    }
    if (!request.fault().empty()) return request.fault();
    Times times;
    const auto go_on = [&] { return !reader_.cancelled(id_) && somebody_reads(); };
    if (std::string failure = engine_.bench(tokens, fresh, repeats, go_on, times); !failure.empty())
      return failure;
    std::string lists;
    for (const auto& [name, values] : std::initializer_list<
             std::pair<const char*, const std::vector<int64_t>*>>{
             {"prefill_ns", &times.prefill_ns},
             {"decode_ns", &times.decode_ns},
             {"step_ns", &times.step_ns},
             {"prefill_cpu_ns", &times.prefill_cpu_ns},
             {"decode_cpu_ns", &times.decode_cpu_ns},
             {"prefill_faults", &times.prefill_faults},
             {"decode_faults", &times.decode_faults},
         })
      lists += ",\"" + std::string(name) + "\":" + numbers(*values);
    if (engine_.profiled())
      lists += ",\"prefill_times\":" + operators(times.prefill_operators) +
               ",\"decode_times\":" + operators(times.decode_operators);
    emit("bench", ",\"prompt_tokens\":%zu,\"new_tokens\":%u%s", tokens.size(), fresh,
         lists.c_str());
    return "";
  }

  // Whether the other end of the output is still open: a cut cable must not leave us running.
  bool somebody_reads() const { return platform::has_reader(out_); }

  std::string stats(const Request& request) {
    if (!request.fault().empty()) return request.fault();
    const platform::Memory memory = platform::memory();
    const platform::Spent spent = platform::spent();
    std::string fields;
    for (const auto& [name, value] : std::initializer_list<std::pair<const char*, uint64_t>>{
             {"rss_bytes", memory.resident},
             {"peak_rss_bytes", memory.peak},
             {"rss_anon_bytes", memory.anonymous},
             {"rss_file_bytes", memory.file_backed},
             {"pss_bytes", memory.proportional},
             {"pss_file_bytes", memory.proportional_file},
             {"cpu_ns", spent.cpu_ns},
             {"major_faults", spent.major_faults},
         })
      fields += ",\"" + std::string(name) + "\":" + std::to_string(value);
    emit("stats", ",\"loaded\":%s,\"length\":%zu%s%s",
         engine_.loaded() ? "true" : "false", engine_.length(), fields.c_str(),
         engine_.profiled() ? (",\"times\":" + operators(engine_.times())).c_str() : "");
    return "";
  }

  // What this machine can do, for a roofline.
  std::string probe(Request& request) {
    const uint32_t threads = request.count("threads", 1, 1, 64);
    const uint32_t bytes = request.count("bytes", 64 << 20, 1 << 20, 1 << 30);
    const std::string isa = request.text("isa", "auto");
    if (!request.fault().empty()) return request.fault();
    emit("probe", ",\"bandwidth_bytes_per_s\":%.0f,\"int8_macs_per_s\":%.0f",
         pslm_measure_bandwidth(threads, bytes), pslm_measure_int8_peak(isa.c_str(), threads));
    return "";
  }

  // The time by operator since a model was loaded with 'profile', a reset or a part of a benchmark.
  static std::string operators(const pslm_times& times) {
    std::string out = "{\"calls\":" + std::to_string(times.calls) +
                      ",\"tokens\":" + std::to_string(times.tokens);
    const std::pair<const char*, uint64_t> counters[] = {
        {"embedding", times.embedding_ns}, {"qkv", times.qkv_ns},
        {"attention", times.attention_ns}, {"output", times.output_ns},
        {"gate_up", times.gate_up_ns},     {"down", times.down_ns},
        {"head", times.head_ns},
    };
    for (const auto& [name, value] : counters)
      out += ",\"" + std::string(name) + "_ns\":" + std::to_string(value);
    return out + "}";
  }

  LineReader& reader_;
  Engine engine_;
  FILE* out_;
  std::string id_;       // of the request that is answered
  bool written_ = true;  // every event so far
};

}  // namespace

int serve(FILE* in, FILE* out) {
  // Never destroyed: its thread may wait for input until the process ends.
  LineReader* reader = new LineReader(in);
  return Server(*reader, out).run();
}

}  // namespace pocketslm
