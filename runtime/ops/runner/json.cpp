#include "json.h"

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>

namespace pocketslm {
namespace {

constexpr uint32_t kReplacement = 0xfffd;

class Parser {
 public:
  Parser(std::string_view text, int depth) : text_(text), max_depth_(depth) {}

  std::optional<Json> document() {
    Json value;
    if (!parse(value, 0)) return std::nullopt;
    skip_space();
    if (at_ != text_.size()) return std::nullopt;
    return value;
  }

 private:
  char peek() const { return at_ < text_.size() ? text_[at_] : '\0'; }
  void skip_space() {
    while (at_ < text_.size() && (peek() == ' ' || peek() == '\t' || peek() == '\n' || peek() == '\r'))
      ++at_;
  }
  bool take(char c) {
    skip_space();
    if (at_ >= text_.size() || text_[at_] != c) return false;
    ++at_;
    return true;
  }
  bool word(std::string_view w) {
    if (text_.substr(at_, w.size()) != w) return false;
    at_ += w.size();
    return true;
  }

  bool parse(Json& out, int depth) {
    if (depth > max_depth_ || ++values_ > kMaxValues) return false;
    skip_space();
    switch (peek()) {
      case '{':
        return object(out, depth);
      case '[':
        return array(out, depth);
      case '"':
        out.kind = Json::Kind::string;
        return string(out.string);
      case 't':
        out.kind = Json::Kind::boolean;
        out.boolean = true;
        return word("true");
      case 'f':
        out.kind = Json::Kind::boolean;
        return word("false");
      case 'n':
        return word("null");
      default:
        return number(out);
    }
  }

  bool object(Json& out, int depth) {
    out.kind = Json::Kind::object;
    ++at_;
    if (take('}')) return true;
    do {
      skip_space();
      out.fields.emplace_back();
      if (peek() != '"' || !string(out.fields.back().first) || !take(':') ||
          !parse(out.fields.back().second, depth + 1))
        return false;
    } while (take(','));
    return take('}') && distinct(out.fields);
  }

  static bool distinct(const std::vector<std::pair<std::string, Json>>& fields) {
    std::vector<std::string_view> names;
    for (const auto& field : fields) names.push_back(field.first);
    std::sort(names.begin(), names.end());
    return std::adjacent_find(names.begin(), names.end()) == names.end();
  }

  bool array(Json& out, int depth) {
    out.kind = Json::Kind::array;
    ++at_;
    if (take(']')) return true;
    do {
      out.items.emplace_back();
      if (!parse(out.items.back(), depth + 1)) return false;
    } while (take(','));
    return take(']');
  }

  bool number(Json& out) {
    const size_t start = at_;
    while (at_ < text_.size() &&
           (std::string_view("+-.eE").find(peek()) != std::string_view::npos ||
            (peek() >= '0' && peek() <= '9')))
      ++at_;
    std::string digits(text_.substr(start, at_ - start));
    if (digits.empty() || !((digits[0] >= '0' && digits[0] <= '9') || digits[0] == '-')) return false;
    char* end = nullptr;
    out.kind = Json::Kind::number;
    out.number = std::strtod(digits.c_str(), &end);
    const bool valid = *end == '\0' && std::isfinite(out.number);
    out.string = std::move(digits);
    return valid;
  }

  bool hex4(uint32_t& code) {
    if (text_.size() - at_ < 4) return false;
    code = 0;
    for (int i = 0; i < 4; ++i) {
      const char c = text_[at_++];
      const int digit = c >= '0' && c <= '9'   ? c - '0'
                        : c >= 'a' && c <= 'f' ? c - 'a' + 10
                        : c >= 'A' && c <= 'F' ? c - 'A' + 10
                                               : -1;
      if (digit < 0) return false;
      code = code * 16 + static_cast<uint32_t>(digit);
    }
    return true;
  }

  bool escape(std::string& out) {
    const char c = peek();
    ++at_;
    static constexpr std::string_view from = "\"\\/bfnrt", to = "\"\\/\b\f\n\r\t";
    if (const size_t i = from.find(c); i != std::string_view::npos) {
      out += to[i];
      return true;
    }
    uint32_t code = 0;
    if (c != 'u' || !hex4(code)) return false;
    if (code >= 0xd800 && code < 0xdc00 && text_.substr(at_, 2) == "\\u") {
      at_ += 2;
      uint32_t low = 0;
      if (!hex4(low)) return false;
      if (low >= 0xdc00 && low < 0xe000) {
        append_utf8(out, 0x10000 + ((code - 0xd800) << 10) + (low - 0xdc00));
        return true;
      }
      append_utf8(out, kReplacement);
      code = low;
    }
    append_utf8(out, code >= 0xd800 && code < 0xe000 ? kReplacement : code);
    return true;
  }

  bool string(std::string& out) {
    ++at_;
    while (at_ < text_.size()) {
      const char c = text_[at_++];
      if (c == '"') return true;
      if (static_cast<unsigned char>(c) < 0x20) return false;
      if (c != '\\') {
        out += c;
      } else if (at_ >= text_.size() || !escape(out)) {
        return false;
      }
    }
    return false;
  }

  std::string_view text_;
  int max_depth_;
  size_t at_ = 0, values_ = 0;
};

}  // namespace

const Json* Json::find(std::string_view key) const {
  for (const auto& field : fields)
    if (field.first == key) return &field.second;
  return nullptr;
}

bool Json::is_whole(double low, double high) const {
  return is(Kind::number) && number >= low && number <= high && number == std::floor(number);
}

std::optional<Json> parse_json(std::string_view text, int depth) {
  return Parser(text, depth).document();
}

void append_utf8(std::string& out, uint32_t code) {
  const auto put = [&](uint32_t byte) { out += static_cast<char>(byte); };
  if (code < 0x80) {
    put(code);
  } else if (code < 0x800) {
    put(0xc0 | code >> 6), put(0x80 | (code & 63));
  } else if (code < 0x10000) {
    put(0xe0 | code >> 12), put(0x80 | (code >> 6 & 63)), put(0x80 | (code & 63));
  } else {
    put(0xf0 | code >> 18), put(0x80 | (code >> 12 & 63));
    put(0x80 | (code >> 6 & 63)), put(0x80 | (code & 63));
  }
}

uint32_t next_utf8(std::string_view text, size_t& at) {
  const auto lead = static_cast<unsigned char>(text[at++]);
  if (lead < 0x80) return lead;
  if (lead < 0xc2 || lead > 0xf4) return kReplacement;
  const int more = lead >= 0xf0 ? 3 : lead >= 0xe0 ? 2 : 1;
  // The second byte is narrower after some leads: no overlong forms, surrogates or past 0x10ffff.
  unsigned char low = lead == 0xe0 ? 0xa0 : lead == 0xf0 ? 0x90 : 0x80;
  unsigned char high = lead == 0xed ? 0x9f : lead == 0xf4 ? 0x8f : 0xbf;
  uint32_t code = lead & (0x3fu >> more);
  for (int i = 0; i < more; ++i) {
    if (at >= text.size()) return kReplacement;
    const auto byte = static_cast<unsigned char>(text[at]);
    if (byte < low || byte > high) return kReplacement;
    code = code << 6 | (byte & 63);
    low = 0x80, high = 0xbf;
    ++at;
  }
  return code;
}

size_t incomplete_utf8(std::string_view text) {
  for (size_t back = 1; back <= 3 && back <= text.size(); ++back) {
    const auto byte = static_cast<unsigned char>(text[text.size() - back]);
    if ((byte & 0xc0) == 0x80) continue;
    const size_t length = byte >= 0xf0 ? 4 : byte >= 0xe0 ? 3 : byte >= 0xc0 ? 2 : 1;
    return length > back ? back : 0;
  }
  return 0;
}

std::string quote(std::string_view text) {
  std::string out = "\"";
  for (size_t at = 0; at < text.size();) {
    const uint32_t code = next_utf8(text, at);
    if (code == '"' || code == '\\') {
      out += '\\';
      out += static_cast<char>(code);
    } else if (code < 0x20) {
      char escaped[8];
      std::snprintf(escaped, sizeof escaped, "\\u%04x", static_cast<unsigned>(code));
      out += escaped;
    } else {
      append_utf8(out, code);
    }
  }
  return out + '"';
}

}  // namespace pocketslm
