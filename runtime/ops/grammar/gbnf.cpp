#include "grammar/gbnf.h"

#include <map>
#include <string>

#include "grammar/regex.h"
#include "runner/json.h"

namespace pocketslm::grammar {
namespace {

bool is_name(char c) {
  return (c >= 'a' && c <= 'z') || (c >= 'A' && c <= 'Z') || (c >= '0' && c <= '9') || c == '-' ||
         c == '_';
}

class GbnfParser {
 public:
  explicit GbnfParser(std::string_view text) : text_(text) {}

  Automaton whole() {
    for (space(true); at_ < text_.size(); space(true)) rule();
    const auto root = rules_.find("root");
    if (root == rules_.end()) throw GrammarError("the grammar has no rule 'root'");
    return builder_.build(builder_.call(root->second), "the grammar");
  }

 private:
  GrammarError fault(const std::string& what) const {
    size_t line = 1;
    for (size_t i = 0; i < at_ && i < text_.size(); ++i) line += text_[i] == '\n';
    return GrammarError("the grammar has " + what + " in line " + std::to_string(line));
  }
  char peek() const { return at_ < text_.size() ? text_[at_] : '\0'; }
  bool take(std::string_view token) {
    if (text_.substr(at_, token.size()) != token) return false;
    at_ += token.size();
    return true;
  }
  void space(bool lines) {
    while (at_ < text_.size()) {
      const char c = text_[at_];
      if (c == '#') {
        while (at_ < text_.size() && text_[at_] != '\n') ++at_;
      } else if (c == ' ' || c == '\t' || (lines && (c == '\n' || c == '\r'))) {
        ++at_;
      } else {
        break;
      }
    }
  }

  std::string name() {
    const size_t from = at_;
    while (is_name(peek())) ++at_;
    return std::string(text_.substr(from, at_ - from));
  }
  uint32_t rule_of(const std::string& name) {
    const auto known = rules_.find(name);
    if (known != rules_.end()) return known->second;
    return rules_[name] = builder_.rule("the rule '" + name + "'");
  }

  void rule() {
    const std::string name = this->name();
    if (name.empty()) throw fault("something other than a rule");
    space(false);
    if (!take("::=")) throw fault("a rule without '::='");
    if (defined_[name]) throw fault("a second rule '" + name + "'");
    defined_[name] = true;
    space(true);
    const Expr body = alternatives(0);
    builder_.define(rule_of(name), body);
    space(false);
    if (at_ < text_.size() && peek() != '\n' && peek() != '\r')
      throw fault(std::string("'") + peek() + "', which is not supported there,");
  }

  Expr alternatives(size_t depth) {
    if (depth > kMaxNesting) throw GrammarError("the grammar nests too deep");
    std::vector<Expr> options{sequence(depth)};
    for (;;) {
      const size_t before = at_;
      space(true);  // an alternative may stand on the next line
      if (!take("|")) {
        if (depth == 0) at_ = before;
        return builder_.alt(options);
      }
      space(true);
      options.push_back(sequence(depth));
    }
  }

  Expr sequence(size_t depth) {
    std::vector<Expr> parts;
    for (;;) {
      space(depth > 0);
      const char c = peek();
      Expr part;
      if (c == '"') {
        part = quoted();
      } else if (c == '[') {
        part = builder_.characters(bracket(), Writing::plain);
      } else if (c == '.') {
        ++at_;
        part = builder_.characters(CodeSet::all(), Writing::plain);
      } else if (c == '(') {
        ++at_;
        space(true);
        part = alternatives(depth + 1);
        space(true);
        if (!take(")")) throw fault("a '(' without ')'");
      } else if (is_name(c)) {
        part = builder_.call(rule_of(name()));
      } else {
        return builder_.seq(parts);
      }
      parts.push_back(repeated(part));
    }
  }

  Expr repeated(Expr part) {
    for (;;) {
      space(false);
      if (take("*"))
        part = builder_.repeat(part, 0, kUnlimited);
      else if (take("+"))
        part = builder_.repeat(part, 1, kUnlimited);
      else if (take("?"))
        part = builder_.optional(part);
      else if (take("{"))
        part = bounded(part);
      else
        return part;
    }
  }

  Expr bounded(Expr part) {
    const auto number = [&](uint32_t& out) {
      space(false);
      const size_t from = at_;
      for (out = 0; peek() >= '0' && peek() <= '9'; ++at_)
        if ((out = out * 10 + static_cast<uint32_t>(peek() - '0')) > kMaxRepeats)
          throw fault("a repetition of more than " + std::to_string(kMaxRepeats));
      const bool found = at_ > from;
      space(false);
      return found;
    };
    uint32_t min = 0, max = 0;
    if (!number(min)) throw fault("'{' without a number");
    max = min;
    if (take(",") && !number(max)) max = kUnlimited;
    if (!take("}")) throw fault("a '{' without '}'");
    if (min > max) throw fault("bounds of which the first is larger");
    return builder_.repeat(part, min, max);
  }

  uint32_t character() {
    if (at_ >= text_.size() || peek() == '\n') throw fault("a text or class without its end");
    if (!take("\\")) {
      const size_t before = at_;
      const uint32_t code = next_utf8(text_, at_);
      if (code == 0xfffd && text_.substr(before, at_ - before) != "\xef\xbf\xbd")
        throw fault("bytes that are not UTF-8");
      return code;
    }
    if (peek() == 'U') throw fault("\\U, which is not supported; write \\u{...},");
    try {
      return read_escape(text_, at_);
    } catch (const GrammarError& error) {
      throw fault(error.what());
    }
  }

  Expr quoted() {
    ++at_;
    std::string text;
    while (peek() != '"' || at_ >= text_.size()) append_utf8(text, character());
    ++at_;
    return builder_.text(text);
  }

  CodeSet bracket() {
    ++at_;
    const bool inverted = take("^");
    CodeSet out;
    while (!take("]")) {
      const uint32_t low = character();
      if (peek() != '-' || text_.substr(at_, 2) == "-]") {
        out.add(low, low);
        continue;
      }
      ++at_;
      const uint32_t high = character();
      if (low > high) throw fault("a range of a class whose ends are not in order");
      out.add(low, high);
    }
    return inverted ? out.complement() : out;
  }

  std::string_view text_;
  size_t at_ = 0;
  Builder builder_;
  std::map<std::string, uint32_t> rules_;
  std::map<std::string, bool> defined_;
};

}  // namespace

Automaton read_gbnf(std::string_view text) {
  if (text.size() > kMaxText) throw GrammarError("the grammar is longer than a megabyte");
  return GbnfParser(text).whole();
}

}  // namespace pocketslm::grammar
