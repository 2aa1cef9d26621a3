// pocketslm-run: a small language model from one file, with no other file or library.
#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <new>
#include <string>
#include <vector>

#include "engine.h"
#include "grammar/sources.h"
#include "platform.h"
#include "protocol.h"

namespace {

using namespace pocketslm;

constexpr char kUsage[] =
    "usage: pocketslm-run --json\n"
    "       pocketslm-run MODEL.slm [-p PROMPT | --chat MESSAGE | --bench] [options]\n"
    "\n"
    "  --json             requests and events as JSON lines on standard input and output\n"
    "  -p PROMPT          continue this text\n"
    "  --chat MESSAGE     answer this message, with the model's chat template\n"
    "  --system MESSAGE   a system message before it\n"
    "  --bench            time a prompt of 512 tokens and 128 new ones, five times\n"
    "  -n COUNT           new tokens at most (128)\n"
    "  -t COUNT           threads (one per CPU, at most 8)\n"
    "  --pin              bind threads to the fastest CPUs\n"
    "  --context COUNT    positions to hold (the model's own)\n"
    "  --kv fp16|int8     type of cached keys and values (fp16)\n"
    "  --isa NAME         kernel path (the best of this CPU, or $POCKETSLM_ISA)\n"
    "  --temperature X, --top-k N, --top-p X, --min-p X, --typical-p X, --seed N\n"
    "                     sampling (greedy)\n"
    "  --json-schema FILE, --regex TEXT, --grammar FILE   what the answer must be\n";

struct Arguments {
  LoadOptions load;
  Generation generation;
  std::string prompt, chat, system;
  std::vector<std::string> options;  // the names of those that were given
  bool json = false, bench = false, help = false;
};

bool parse_number(const char* text, double low, double high, double& out) {
  char* end = nullptr;
  out = std::strtod(text, &end);
  return end != text && *end == '\0' && out >= low && out <= high;
}

// The text of a file that an option names.
bool read_file(const char* path, std::string& out) {
  FILE* file = platform::open_file(path);
  if (!file) return false;
  char part[4096];
  for (size_t got; out.size() <= grammar::kMaxText && (got = std::fread(part, 1, sizeof part, file));)
    out.append(part, got);
  const bool good = !std::ferror(file);
  std::fclose(file);
  return good;
}

// Holds the answer to what `option` says. Empty, or what is wrong.
std::string constrain(const std::string& option, const char* value, Generation& generation) {
  if (generation.grammar) return option + " beside another of its kind";
  std::string text = value;
  if (option != "--regex" && !read_file(value, text = "")) return text + value + " cannot be read";
  const uint32_t kind = option == "--regex"     ? PSLM_GRAMMAR_REGEX
                        : option == "--grammar" ? PSLM_GRAMMAR_GBNF
                                                : PSLM_GRAMMAR_JSON_SCHEMA;
  try {
    generation.grammar = grammar::read_grammar(kind, text);
  } catch (const grammar::GrammarError& error) {
    return option + ": " + error.what();
  }
  return "";
}

// Empty, or why options do nothing beside each other.
std::string conflict(const Arguments& arguments) {
  const auto given = [&names = arguments.options](const char* name) {
    return std::find(names.begin(), names.end(), name) != names.end();
  };
  if (arguments.json && (arguments.options.size() > 1 || !arguments.load.path.empty()))
    return "--json goes alone: its requests say the rest";
  if (given("-p") && given("--chat")) return "-p and --chat are two prompts";
  if (given("--system") && !given("--chat")) return "--system is for --chat";
  for (const char* name : {"-p", "--chat", "-n", "--temperature", "--top-k", "--top-p", "--min-p",
                           "--typical-p", "--seed", "--json-schema", "--regex", "--grammar"})
    if (arguments.bench && given(name)) return std::string(name) + " does nothing with --bench";
  for (const char* name : {"--top-k", "--top-p", "--min-p", "--typical-p", "--seed"})
    if (given(name) && !(arguments.generation.options.temperature > 0))
      return std::string(name) + " does nothing without a --temperature";
  return "";
}

// Empty, or what is wrong with the command line.
std::string parse(const std::vector<std::string>& words, Arguments& out) {
  for (size_t i = 1; i < words.size(); ++i) {
    const std::string& name = words[i];
    if (name[0] == '-') out.options.push_back(name);
    if (name == "--json" || name == "--bench" || name == "--pin" || name == "--help") {
      (name == "--json"    ? out.json
       : name == "--bench" ? out.bench
       : name == "--pin"   ? out.load.pin
                           : out.help) = true;
      continue;
    }
    if (name[0] != '-') {
      if (!out.load.path.empty()) return "two model files: " + out.load.path + " and " + name;
      out.load.path = name;
      continue;
    }
    if (i + 1 == words.size()) return name + " is unknown or needs a value";
    const char* value = words[++i].c_str();
    double n = 0;
    const auto whole = [&](double low, double high, uint32_t& target) {
      const bool valid = parse_number(value, low, high, n);
      target = valid ? static_cast<uint32_t>(n) : 0;
      return valid && n == target;
    };
    bool valid = true;
    if (name == "-p") {
      out.prompt = value;
    } else if (name == "--chat") {
      out.chat = value;
    } else if (name == "--system") {
      out.system = value;
    } else if (name == "--isa") {
      out.load.isa = value;
    } else if (name == "--kv") {
      valid = !std::strcmp(value, "fp16") || !std::strcmp(value, "int8");
      out.load.kv_type = std::strcmp(value, "int8") ? PSLM_KV_F16 : PSLM_KV_I8;
    } else if (name == "-n") {
      valid = whole(1, 1 << 24, out.generation.options.max_tokens);
    } else if (name == "-t") {
      valid = whole(1, 64, out.load.threads);
    } else if (name == "--context") {
      valid = whole(1, 1 << 24, out.load.context);
    } else if (name == "--top-k") {
      valid = whole(0, 1 << 24, out.generation.options.top_k);
    } else if (name == "--temperature") {
      valid = parse_number(value, 0, 1e9, n);
      out.generation.options.temperature = static_cast<float>(n);
    } else if (name == "--top-p") {
      valid = parse_number(value, 0, 1, n);
      out.generation.options.top_p = static_cast<float>(n);
    } else if (name == "--min-p") {
      valid = parse_number(value, 0, 1, n);
      out.generation.options.min_p = static_cast<float>(n);
    } else if (name == "--typical-p") {
      valid = parse_number(value, 0, 1, n);
      out.generation.options.typical_p = static_cast<float>(n);
    } else if (name == "--seed") {
      valid = parse_number(value, 0, 1e15, n) && n == std::floor(n);
      out.generation.options.seed = valid ? static_cast<uint64_t>(n) : 0;
    } else if (name == "--json-schema" || name == "--regex" || name == "--grammar") {
      if (const std::string failure = constrain(name, value, out.generation); !failure.empty())
        return failure;
    } else {
      return "unknown option " + name;
    }
    if (!valid) return std::string(value) + " is out of range for " + name;
  }
  if (!out.json && !out.help && out.load.path.empty()) return "no model file given";
  return out.help ? "" : conflict(out);
}

int fail(const std::string& message) {
  std::fprintf(stderr, "pocketslm-run: %s\n", message.c_str());
  return 2;
}

void print_rate(const char* label, size_t tokens, const std::vector<int64_t>& samples) {
  std::printf("%s", label);
  for (int64_t ns : samples)
    std::printf(" %.1f", static_cast<double>(tokens) * 1e9 / static_cast<double>(ns));
  std::printf(" tok/s\n");
}

int run(const Arguments& arguments) {
  Engine engine;
  if (const std::string failure = engine.load(arguments.load); !failure.empty())
    return fail(failure);
  const pslm_session_info info = engine.session_info();
  std::fprintf(stderr, "%s, %u threads, context %u, loaded in %.1f ms, built by %s\n", info.isa,
               info.threads, info.context, engine.load_ms(), pslm_compiler());
  if (arguments.bench) {
    Times times;
    constexpr size_t prompt = 512, fresh = 128;
    const auto go_on = [] { return true; };
    if (const std::string failure =
            engine.bench(engine.random_tokens(prompt), fresh, 5, go_on, times);
        !failure.empty())
      return fail(failure);
    print_rate("prefill", prompt, times.prefill_ns);
    print_rate("decode", fresh, times.decode_ns);
    return 0;
  }
  std::vector<int32_t> tokens;
  std::vector<Message> messages;
  if (!arguments.system.empty()) messages.push_back({"system", arguments.system});
  messages.push_back({"user", arguments.chat});
  std::string failure = arguments.chat.empty() ? engine.encode(arguments.prompt, tokens)
                                               : engine.encode_chat(messages, tokens);
  Outcome outcome;
  if (failure.empty())
    failure = engine.generate(
        tokens, arguments.generation,
        [](const NewToken& made) {
          std::fwrite(made.text.data(), 1, made.text.size(), stdout);
          std::fflush(stdout);
        },
        [] { return !std::ferror(stdout); }, outcome);
  if (!failure.empty()) return fail(failure);
  const auto rate = [](size_t count, double ms) {
    return ms > 0 ? static_cast<double>(count) * 1e3 / ms : 0.0;
  };
  const size_t steps = outcome.new_tokens ? outcome.new_tokens - 1 : 0;  // the first is prefill's
  std::fprintf(stderr, "\n%s; prompt %zu tokens at %.1f tok/s, %zu new at %.1f tok/s\n",
               outcome.reason.c_str(), outcome.prompt_tokens,
               rate(outcome.prompt_tokens, outcome.prefill_ms), outcome.new_tokens,
               rate(steps, outcome.decode_ms));
  return 0;
}

}  // namespace

int main(int count, char** values) {
  const std::vector<std::string> words = platform::begin_program(count, values);
  Arguments arguments;
  if (const std::string failure = parse(words, arguments); !failure.empty())
    return fail(failure + "\n" + kUsage);
  if (arguments.help) {
    std::fputs(kUsage, stdout);
    return 0;
  }
  if (arguments.json) {
    const int status = serve(stdin, stdout);
    std::fflush(stdout);
    std::_Exit(status);  // the thread that reads input may still be waiting for it
  }
  int status = 0;
  try {
    status = run(arguments);
  } catch (const std::bad_alloc&) {
    return fail("out of memory");
  } catch (const grammar::GrammarError& error) {
    return fail(error.what());
  }
  if (std::fflush(stdout) != 0 || std::ferror(stdout)) return fail("the answer cannot be written");
  return status;
}
