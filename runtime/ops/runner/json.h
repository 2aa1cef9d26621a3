// Just enough JSON for one message a line.
#pragma once

#include <optional>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

namespace pocketslm {

struct Json {
  enum class Kind { null, boolean, number, string, array, object };
  Kind kind = Kind::null;
  bool boolean = false;
  double number = 0;
  std::string string;                                // of a number, its digits as written
  std::vector<Json> items;                           // array
  std::vector<std::pair<std::string, Json>> fields;  // object, in order

  bool is(Kind k) const { return kind == k; }
  // A whole number within these bounds.
  bool is_whole(double low, double high) const;
  const Json* find(std::string_view key) const;
};

// Values in one text, at most: each takes about a hundred bytes.
constexpr size_t kMaxValues = 1 << 18;

// Values in each other, at most.
constexpr int kMaxJsonDepth = 32;

// Nothing where the text is not exactly one valid JSON value, names a field twice, is too large or
// nests deeper than `depth`.
std::optional<Json> parse_json(std::string_view text, int depth = kMaxJsonDepth);

// A quoted JSON string; invalid UTF-8 becomes U+FFFD.
std::string quote(std::string_view text);

// Appends a code point as UTF-8.
void append_utf8(std::string& out, uint32_t code);

// Decodes one code point at `at` and moves past it; the longest beginning of a sequence that goes
// wrong gives one U+FFFD.
uint32_t next_utf8(std::string_view text, size_t& at);

// Bytes at the end of `text` that begin a UTF-8 sequence which is not complete yet.
size_t incomplete_utf8(std::string_view text);

}  // namespace pocketslm
