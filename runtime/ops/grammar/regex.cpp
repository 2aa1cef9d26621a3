#include "grammar/regex.h"

#include <algorithm>
#include <map>

#include "runner/json.h"
#include "runner/unicode.h"

namespace pocketslm::grammar {
namespace {

constexpr size_t kMaxPatternNodes = 1 << 16;
constexpr uint32_t kReplacement = 0xfffd;

const CodeSet& digits() {
  static const CodeSet set{{'0', '9'}};
  return set;
}
const CodeSet& word_characters() {
  static const CodeSet set{{'0', '9'}, {'A', 'Z'}, {'_', '_'}, {'a', 'z'}};
  return set;
}
const CodeSet& white_space() {
  static const CodeSet set{{'\t', '\r'}, {' ', ' '}};
  return set;
}

// Of all characters, those that any standard may count to a class that \d, \w or \s names.
const CodeSet& perhaps(char name) {
  static const auto all = [] {
    std::array<CodeSet, 3> sets;
    for (uint32_t code = 0x80; code <= CodeSet::kLast; ++code) {
      const CharClass kind = char_class(code);
      if (kind == CharClass::number) sets[0].add(code, code);
      if (kind == CharClass::number || kind == CharClass::mark || (one(kind) & kLetters))
        sets[1].add(code, code);
      if (kind == CharClass::space) sets[2].add(code, code);
    }
    sets[0].add(digits());
    sets[1].add(word_characters());
    sets[2].add(white_space());
    sets[2].add(0x1c, 0x1f);
    sets[2].add(0x85, 0x85);
    sets[2].add(0xfeff, 0xfeff);
    return sets;
  }();
  return all[name == 'd' ? 0 : name == 'w' ? 1 : 2];
}

int digit_of_hex(char c) {
  return c >= '0' && c <= '9'   ? c - '0'
         : c >= 'a' && c <= 'f' ? c - 'a' + 10
         : c >= 'A' && c <= 'F' ? c - 'A' + 10
                                : -1;
}

class Parser {
 public:
  Parser(std::string_view text, Dialect dialect) : text_(text), dialect_(dialect) {}

  Pattern whole() {
    Pattern pattern = alternatives(0);
    if (at_ < text_.size()) throw fault("a ')' without '('");
    return pattern;
  }

 private:
  GrammarError fault(const std::string& what) const {
    return GrammarError("the expression has " + what + " at byte " + std::to_string(at_));
  }
  bool done() const { return at_ >= text_.size(); }
  bool take(std::string_view token) {
    if (text_.substr(at_, token.size()) != token) return false;
    at_ += token.size();
    return true;
  }
  uint32_t character() {
    const size_t before = at_;
    const uint32_t code = next_utf8(text_, at_);
    if (code == kReplacement && text_.substr(before, at_ - before) != "\xef\xbf\xbd")
      throw fault("bytes that are not UTF-8");
    return code;
  }
  void count() {
    if (++nodes_ > kMaxPatternNodes) throw GrammarError("the expression is too large");
  }

  Pattern alternatives(size_t depth) {
    if (depth > kMaxNesting) throw GrammarError("the expression nests too deep");
    Pattern out;
    out.kind = Pattern::Kind::alt;
    do {
      out.parts.push_back(sequence(depth));
    } while (take("|"));
    return out.parts.size() == 1 ? std::move(out.parts[0]) : out;
  }

  Pattern sequence(size_t depth) {
    Pattern out;
    while (!done() && text_[at_] != '|' && text_[at_] != ')') out.parts.push_back(repeated(depth));
    return out;
  }

  Pattern repeated(size_t depth) {
    Pattern part = atom(depth);
    while (!done()) {
      uint32_t min = 0, max = kUnlimited;
      if (take("*")) {
      } else if (take("+")) {
        min = 1;
      } else if (take("?")) {
        max = 1;
      } else if (text_[at_] != '{' || !bounds(min, max)) {
        return part;
      }
      if (part.kind == Pattern::Kind::begin || part.kind == Pattern::Kind::end)
        throw fault("a repeated anchor");
      if (take("+")) throw fault("a possessive quantifier, which is not supported,");
      take("?");  // the same texts match
      count();
      Pattern out;
      out.kind = Pattern::Kind::repeat;
      out.min = min;
      out.max = max;
      out.parts.push_back(std::move(part));
      part = std::move(out);
      if (!done() && (text_[at_] == '*' || text_[at_] == '+' || text_[at_] == '?'))
        throw fault("a quantifier after a quantifier");
    }
    return part;
  }

  // {n}, {n,} or {n,m}; false, and a plain character, for other braces.
  bool bounds(uint32_t& min, uint32_t& max) {
    size_t at = at_ + 1;
    const auto number = [&](uint32_t& out) {
      const size_t from = at;
      uint64_t value = 0;
      for (; at < text_.size() && text_[at] >= '0' && text_[at] <= '9'; ++at)
        value = std::min<uint64_t>(value * 10 + static_cast<uint64_t>(text_[at] - '0'), kUnlimited);
      out = static_cast<uint32_t>(value);
      return at > from;
    };
    if (text_.substr(at_, 2) == "{,") throw fault("'{,', which is written '{0,',");
    if (!number(min)) return false;
    max = min;
    if (at < text_.size() && text_[at] == ',') {
      ++at;
      if (!number(max)) max = kUnlimited;
    }
    if (at >= text_.size() || text_[at] != '}') return false;
    if (min > max) throw fault("bounds of which the first is larger");
    if (min > kMaxRepeats || (max > kMaxRepeats && max != kUnlimited))
      throw fault("a repetition of more than " + std::to_string(kMaxRepeats));
    at_ = at + 1;
    return true;
  }

  Pattern atom(size_t depth) {
    count();
    Pattern out;
    out.kind = Pattern::Kind::set;
    const char c = text_[at_];
    if (c == '(') return group(depth);
    if (c == '[') {
      ++at_;
      out.set = bracket();
    } else if (c == '.') {
      ++at_;
      out.set = any();
    } else if (c == '^' || c == '$') {
      ++at_;
      out.kind = c == '^' ? Pattern::Kind::begin : Pattern::Kind::end;
    } else if (c == '*' || c == '+' || c == '?') {
      throw fault("a quantifier with nothing before it");
    } else if (c == '\\') {
      ++at_;
      out.set = escaped();
    } else {
      const uint32_t code = character();
      out.set.add(code, code);
    }
    return out;
  }

  CodeSet any() const {
    CodeSet breaks = CodeSet::of("\n");
    if (dialect_ == Dialect::search) {
      breaks.add('\r', '\r');
      breaks.add(0x2028, 0x2029);
    }
    return breaks.complement();
  }

  Pattern group(size_t depth) {
    ++at_;
    if (take("?")) {
      if (take("=") || take("!")) throw fault("a lookahead, which is not supported,");
      if (take("<=") || take("<!")) throw fault("a lookbehind, which is not supported,");
      if (take("P<") || take("<")) {
        const size_t end = text_.find('>', at_);
        if (end == std::string_view::npos) throw fault("a name without '>'");
        at_ = end + 1;
      } else if (!take(":")) {
        throw fault("a kind of group that is not supported");
      }
    }
    Pattern inside = alternatives(depth + 1);
    if (!take(")")) throw fault("a '(' without ')'");
    return inside;
  }

  // After a backslash: a class, or one character.
  CodeSet escaped() {
    if (done()) throw fault("a backslash and nothing after it");
    const char c = text_[at_];
    const char lower = static_cast<char>(c | 0x20);
    if (lower == 'd' || lower == 'w' || lower == 's') {
      ++at_;
      const CodeSet& set = lower == 'd' ? digits() : lower == 'w' ? word_characters() : white_space();
      if (c == lower) return set;
      return dialect_ == Dialect::whole ? set.complement() : perhaps(lower).complement();
    }
    if (c == 'b' || c == 'B') throw fault("a word boundary, which is not supported,");
    if (c == 'p' || c == 'P') throw fault("a Unicode property, which is not supported,");
    if (c == 'k' || (c >= '1' && c <= '9')) throw fault("a back reference, which is not supported,");
    if (c == 'A' || c == 'Z' || c == 'z' || c == 'G')
      throw fault("an anchor other than '^' and '$'");
    return one_code(escape());
  }

  uint32_t escape() {
    try {
      return read_escape(text_, at_);
    } catch (const GrammarError& error) {
      throw fault(error.what());
    }
  }

  static CodeSet one_code(uint32_t code) {
    CodeSet set;
    set.add(code, code);
    if (set.empty()) throw GrammarError("the expression has a surrogate");
    return set;
  }

  CodeSet bracket() {
    const bool inverted = take("^");
    CodeSet out;
    for (bool first = true;; first = false) {
      if (done()) throw fault("a '[' without ']'");
      if (take("]")) {
        if (first && !inverted) throw fault("an empty class");
        break;
      }
      count();
      if (text_.substr(at_, 2) == "[:") throw fault("a named class, which is not supported,");
      const CodeSet low = member();
      const bool range = text_.substr(at_, 1) == "-" && at_ + 1 < text_.size() && text_[at_ + 1] != ']';
      if (!range) {
        out.add(low);
        continue;
      }
      ++at_;
      const CodeSet high = member();
      const auto single = [](const CodeSet& set) {
        return set.ranges().size() == 1 && set.ranges()[0].first == set.ranges()[0].second;
      };
      if (!single(low) || !single(high) || low.ranges()[0].first > high.ranges()[0].first)
        throw fault("a range of a class whose ends are not in order");
      out.add(low.ranges()[0].first, high.ranges()[0].first);
    }
    return inverted ? out.complement() : out;
  }

  CodeSet member() {
    if (done()) throw fault("a '[' without ']'");
    if (take("\\")) {
      if (take("b")) return one_code('\b');
      return escaped();
    }
    return one_code(character());
  }

  std::string_view text_;
  Dialect dialect_;
  size_t at_ = 0, nodes_ = 0;
};

Pattern any_text() {
  Pattern set, out;
  set.kind = Pattern::Kind::set;
  set.set = CodeSet::all();
  out.kind = Pattern::Kind::repeat;
  out.max = kUnlimited;
  out.parts.push_back(std::move(set));
  return out;
}

void refuse_anchors(const Pattern& pattern) {
  if (pattern.kind == Pattern::Kind::begin || pattern.kind == Pattern::Kind::end)
    throw GrammarError("the expression has an anchor within, where only its ends may have one");
  for (const Pattern& part : pattern.parts) refuse_anchors(part);
}

// Takes the anchors off the ends; where one is missing, `search` lets any text stand.
void anchor(Pattern& pattern, bool search) {
  if (pattern.kind == Pattern::Kind::alt) {
    for (Pattern& part : pattern.parts) anchor(part, search);
    return;
  }
  if (pattern.kind == Pattern::Kind::seq && pattern.parts.size() == 1 &&
      (pattern.parts[0].kind == Pattern::Kind::alt || pattern.parts[0].kind == Pattern::Kind::seq)) {
    anchor(pattern.parts[0], search);
    return;
  }
  if (pattern.kind != Pattern::Kind::seq) {
    Pattern wrapped;
    wrapped.parts.push_back(std::move(pattern));
    pattern = std::move(wrapped);
  }
  auto& parts = pattern.parts;
  bool begins = false, ends = false;
  while (!parts.empty() && parts.front().kind == Pattern::Kind::begin) {
    parts.erase(parts.begin());
    begins = true;
  }
  while (!parts.empty() && parts.back().kind == Pattern::Kind::end) {
    parts.pop_back();
    ends = true;
  }
  refuse_anchors(pattern);
  if (search && !begins) parts.insert(parts.begin(), any_text());
  if (search && !ends) parts.push_back(any_text());
}

// The fewest and the most characters of a text that matches.
std::pair<uint64_t, uint64_t> lengths(const Pattern& pattern) {
  constexpr uint64_t kMany = kUnlimited;
  switch (pattern.kind) {
    case Pattern::Kind::set: return {1, 1};
    case Pattern::Kind::seq: {
      std::pair<uint64_t, uint64_t> out{0, 0};
      for (const Pattern& part : pattern.parts) {
        const auto [low, high] = lengths(part);
        out = {std::min(kMany, out.first + low), std::min(kMany, out.second + high)};
      }
      return out;
    }
    case Pattern::Kind::alt: {
      std::pair<uint64_t, uint64_t> out{kMany, 0};
      for (const Pattern& part : pattern.parts) {
        const auto [low, high] = lengths(part);
        out = {std::min(out.first, low), std::max(out.second, high)};
      }
      return out;
    }
    default: {
      const auto [low, high] = lengths(pattern.parts[0]);
      return {std::min(kMany, low * pattern.min),
              high == 0 ? 0 : pattern.max == kUnlimited ? kMany : std::min(kMany, high * pattern.max)};
    }
  }
}

constexpr size_t kMaxProduct = 1 << 15;

// A pattern as an automaton over characters: from each state, sets with targets; empty sets go on
// without reading. State 0 is the last.
struct Steps {
  std::vector<std::vector<std::pair<CodeSet, uint32_t>>> from{1};

  uint32_t add() {
    if (from.size() >= kMaxProduct)
      throw GrammarError("a pattern with bounds on the length, or with another one, is too large");
    from.emplace_back();
    return static_cast<uint32_t>(from.size() - 1);
  }
  uint32_t build(const Pattern& pattern, uint32_t next) {
    switch (pattern.kind) {
      case Pattern::Kind::seq:
        for (auto part = pattern.parts.rbegin(); part != pattern.parts.rend(); ++part)
          next = build(*part, next);
        return next;
      case Pattern::Kind::set: {
        const uint32_t state = add();
        if (!pattern.set.empty()) from[state].emplace_back(pattern.set, next);
        return state;
      }
      case Pattern::Kind::alt: {
        const uint32_t state = add();
        for (const Pattern& part : pattern.parts) {
          const uint32_t target = build(part, next);
          from[state].emplace_back(CodeSet(), target);
        }
        return state;
      }
      default: {
        const Pattern& part = pattern.parts[0];
        uint32_t state = next;
        if (pattern.max == kUnlimited) {
          state = add();
          const uint32_t body = build(part, state);
          from[state].emplace_back(CodeSet(), body);
          from[state].emplace_back(CodeSet(), next);
        } else {
          for (uint32_t i = pattern.max; i-- > pattern.min;) {
            const uint32_t option = add(), body = build(part, state);
            from[option].emplace_back(CodeSet(), body);
            from[option].emplace_back(CodeSet(), next);
            state = option;
          }
        }
        for (uint32_t i = 0; i < pattern.min; ++i) state = build(part, state);
        return state;
      }
    }
  }
};

}  // namespace

uint32_t read_escape(std::string_view text, size_t& at) {
  const size_t before = at;
  const uint32_t code = next_utf8(text, at);
  const auto hex = [&](size_t count) {
    uint32_t value = 0;
    for (size_t i = 0; i < count; ++i) {
      const int digit = at < text.size() ? digit_of_hex(text[at]) : -1;
      if (digit < 0) throw GrammarError("an escape without its digits");
      value = value * 16 + static_cast<uint32_t>(digit);
      ++at;
    }
    if (value > CodeSet::kLast || (value >= 0xd800 && value < 0xe000))
      throw GrammarError("an escape of what is no character");
    return value;
  };
  switch (code) {
    case 'n': return '\n';
    case 't': return '\t';
    case 'r': return '\r';
    case 'f': return '\f';
    case 'v': return '\v';
    case '0': return 0;
    case 'x': return hex(2);
    case 'u': {
      if (at >= text.size() || text[at] != '{') return hex(4);
      const size_t end = text.find('}', at);
      if (end == std::string_view::npos || end - at < 2 || end - at > 7)
        throw GrammarError("an escape without its digits");
      ++at;
      const uint32_t value = hex(end - at);
      ++at;
      return value;
    }
    default:
      if (code < 0x80 && ((code >= '0' && code <= '9') || ((code | 0x20) >= 'a' && (code | 0x20) <= 'z'))) {
        at = before;
        throw GrammarError("an escape that is not known");
      }
      return code;
  }
}

Pattern parse_regex(std::string_view text, Dialect dialect) {
  if (text.size() > kMaxText) throw GrammarError("the expression is longer than a megabyte");
  Pattern pattern = Parser(text, dialect).whole();
  anchor(pattern, dialect == Dialect::search);
  return pattern;
}

Expr write(Builder& builder, const Pattern& pattern, Writing writing) {
  switch (pattern.kind) {
    case Pattern::Kind::set: return builder.characters(pattern.set, writing);
    case Pattern::Kind::seq: {
      std::vector<Expr> parts;
      for (const Pattern& part : pattern.parts) parts.push_back(write(builder, part, writing));
      return builder.seq(parts);
    }
    case Pattern::Kind::alt: {
      std::vector<Expr> options;
      for (const Pattern& part : pattern.parts) options.push_back(write(builder, part, writing));
      return builder.alt(std::move(options));
    }
    default:
      return builder.repeat(write(builder, pattern.parts[0], writing), pattern.min, pattern.max);
  }
}

Expr write_common(Builder& builder, const std::vector<Pattern>& patterns, uint32_t min,
                  uint32_t max, Writing writing) {
  if (min > max) return builder.never();
  if (patterns.size() == 1) {
    const auto [low, high] = lengths(patterns[0]);
    if (low >= min && high <= max) return write(builder, patterns[0], writing);
  }
  // Characters that no set tells apart are one letter of the alphabet.
  std::vector<Steps> automata(patterns.size());
  std::vector<uint32_t> starts;
  std::vector<CodeSet> letters{CodeSet::all()};
  for (size_t i = 0; i < patterns.size(); ++i) {
    starts.push_back(automata[i].build(patterns[i], 0));
    std::vector<CodeSet> sets;
    for (const auto& steps : automata[i].from)
      for (const auto& step : steps)
        if (!step.first.empty()) sets.push_back(step.first);
    std::sort(sets.begin(), sets.end());
    sets.erase(std::unique(sets.begin(), sets.end()), sets.end());
    for (const CodeSet& set : sets) {
      std::vector<CodeSet> finer;
      for (const CodeSet& letter : letters)
        for (CodeSet& half : std::vector<CodeSet>{letter.common(set), letter.without(set)})
          if (!half.empty()) finer.push_back(std::move(half));
      letters = std::move(finer);
      if (letters.size() > 256) throw GrammarError("the patterns have too many classes together");
    }
  }
  using Places = std::vector<std::vector<uint32_t>>;  // of each pattern, sorted
  const auto close = [&](size_t pattern, std::vector<uint32_t> open) {
    std::vector<uint32_t> seen;
    std::vector<bool> known(automata[pattern].from.size());
    while (!open.empty()) {
      const uint32_t state = open.back();
      open.pop_back();
      if (known[state]) continue;
      known[state] = true;
      seen.push_back(state);
      for (const auto& [set, target] : automata[pattern].from[state])
        if (set.empty()) open.push_back(target);
    }
    std::sort(seen.begin(), seen.end());
    return seen;
  };
  const uint32_t counted = max == kUnlimited ? min : max;
  std::map<std::pair<Places, uint32_t>, uint32_t> index;
  std::vector<std::pair<Places, uint32_t>> states;
  std::vector<uint32_t> rules;
  size_t work = 0;
  const auto state_of = [&](Places places, uint32_t count) {
    for (const auto& place : places) work += 1 + place.size();
    const auto [at, fresh] = index.emplace(std::pair(std::move(places), count), states.size());
    if (fresh) {
      if (states.size() == kMaxProduct || work > (size_t{1} << 23))
        throw GrammarError("a pattern with bounds on the length, or with another one, is too large");
      states.push_back(at->first);
      rules.push_back(builder.rule("a pattern"));
    }
    return at->second;
  };
  Places start;
  for (size_t i = 0; i < patterns.size(); ++i) start.push_back(close(i, {starts[i]}));
  state_of(std::move(start), 0);
  std::vector<std::vector<std::pair<uint32_t, CodeSet>>> steps;
  for (size_t state = 0; state < states.size(); ++state) {
    steps.emplace_back();
    const auto [places, count] = states[state];
    if (count == counted && max != kUnlimited) continue;
    std::map<uint32_t, CodeSet> targets;
    for (const CodeSet& letter : letters) {
      const uint32_t code = letter.ranges()[0].first;
      Places after;
      for (size_t i = 0; i < patterns.size(); ++i) {
        std::vector<uint32_t> next;
        for (const uint32_t place : places[i])
          for (const auto& [set, target] : automata[i].from[place]) {
            ++work;
            if (set.contains(code)) next.push_back(target);
          }
        if (next.empty()) break;
        after.push_back(close(i, std::move(next)));
      }
      if (after.size() < patterns.size()) continue;
      targets[state_of(std::move(after), std::min(count + 1, counted))].add(letter);
    }
    steps.back().assign(targets.begin(), targets.end());
  }
  for (size_t state = states.size(); state-- > 0;) {  // later states first: most steps go there
    std::vector<Expr> options;
    const auto& [places, count] = states[state];
    const bool whole = std::all_of(places.begin(), places.end(),
                                   [](const auto& place) { return place[0] == 0; });
    if (whole && count >= min) options.push_back(builder.empty());
    for (const auto& [target, set] : steps[state])
      options.push_back(
          builder.seq({builder.characters(set, writing), builder.call(rules[target])}));
    builder.define(rules[state], builder.alt(std::move(options)));
  }
  return builder.call(rules[0]);
}

}  // namespace pocketslm::grammar
