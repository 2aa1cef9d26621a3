#include "grammar/grammar.h"

#include <algorithm>
#include <set>

namespace pocketslm::grammar {
namespace {

// A repetition of at most so many expressions is written out; a longer one counts as it reads.
constexpr size_t kUnrolled = 64;

}  // namespace

Builder::Builder() : nodes_{{Kind::never}, {Kind::empty}} {}

Expr Builder::add(Node node) {
  if (nodes_.size() >= kMaxNodes) throw GrammarError("the grammar is too large");
  if (node.depth > kMaxExprDepth) throw GrammarError("the grammar nests too deep");
  nodes_.push_back(node);
  return static_cast<Expr>(nodes_.size() - 1);
}

Expr Builder::bytes(const ByteSet& set) {
  if (set.none()) return never();
  const auto [at, fresh] = set_index_.emplace(set.to_string(), sets_.size());
  if (fresh) sets_.push_back(set);
  return add({Kind::bytes, at->second});
}

Expr Builder::text(std::string_view text) {
  std::vector<Expr> parts;
  for (const char c : text) {
    ByteSet set;
    set.set(static_cast<unsigned char>(c));
    parts.push_back(bytes(set));
  }
  return seq(parts);
}

uint32_t Builder::class_of(const CharacterReader& reader) {
  const auto [at, fresh] = class_index_.emplace(reader.next, classes_.size());
  if (fresh) classes_.push_back(reader);
  return at->second;
}

Expr Builder::characters(const CharacterReader& reader, uint32_t min, uint32_t max) {
  if (min > max) return never();
  if (max == 0) return empty();
  if (reader.first_bytes() == 0) return min ? never() : empty();
  return add({Kind::characters, class_of(reader), 0, min, max});
}

Expr Builder::characters(const CodeSet& set, Writing writing, uint32_t min, uint32_t max) {
  const auto known = code_index_.find({set, writing});
  if (known == code_index_.end()) {
    const CharacterReader reader(spellings(set, writing));
    if (reader.first_bytes() == 0) return min ? never() : empty();
    code_index_.emplace(std::pair(set, writing), class_of(reader));
    return characters(reader, min, max);
  }
  if (min > max) return never();
  if (max == 0) return empty();
  return add({Kind::characters, known->second, 0, min, max});
}

Expr Builder::with_children(Kind kind, const std::vector<Expr>& parts) {
  Node node{kind, static_cast<uint32_t>(children_.size()), static_cast<uint32_t>(parts.size())};
  size_t size = 1;
  for (const Expr part : parts) {
    node.depth = std::max(node.depth, nodes_[part].depth + 1);
    size += nodes_[part].size;
  }
  node.size = static_cast<uint32_t>(std::min<size_t>(size, kMaxNodes));
  if (children_.size() + parts.size() > 4 * kMaxNodes)
    throw GrammarError("the grammar is too large");
  children_.insert(children_.end(), parts.begin(), parts.end());
  return add(node);
}

Expr Builder::seq(const std::vector<Expr>& parts) {
  std::vector<Expr> kept;
  for (const Expr part : parts) {
    if (part == never()) return never();
    if (part != empty()) kept.push_back(part);
  }
  if (kept.empty()) return empty();
  return kept.size() == 1 ? kept[0] : with_children(Kind::seq, kept);
}

Expr Builder::alt(std::vector<Expr> options) {
  std::sort(options.begin(), options.end());
  options.erase(std::unique(options.begin(), options.end()), options.end());
  options.erase(std::remove(options.begin(), options.end(), never()), options.end());
  if (options.empty()) return never();
  return options.size() == 1 ? options[0] : with_children(Kind::alt, options);
}

Expr Builder::repeat(Expr part, uint32_t min, uint32_t max) {
  if (min > max || (part == never() && min)) return never();
  if (max == 0 || part == never() || part == empty()) return empty();
  if (min == 1 && max == 1) return part;
  const Node& node = nodes_[part];
  if (node.kind == Kind::characters && node.min == 1 && node.max == 1)
    return add({Kind::characters, node.index, 0, min, max});
  if (min == 0 && max == 1) return optional(part);
  return add({Kind::repeat, part, 1, min, max, node.depth + 1, node.size});
}

Expr Builder::words(std::vector<std::string> texts) {
  std::sort(texts.begin(), texts.end());
  texts.erase(std::unique(texts.begin(), texts.end()), texts.end());
  return texts.empty() ? never() : words(texts, 0, texts.size(), 0, 0);
}

// Of the texts [first, last), which share their first `at` bytes.
Expr Builder::words(const std::vector<std::string>& texts, size_t first, size_t last, size_t at,
                    size_t depth) {
  if (depth > kMaxNesting) throw GrammarError("the texts of an enumeration share too much");
  const std::string& text = texts[first];
  if (last - first == 1) return this->text(std::string_view(text).substr(at));
  size_t shared = at;
  while (shared < text.size() && shared < texts[last - 1].size() &&
         text[shared] == texts[last - 1][shared])
    ++shared;
  std::vector<Expr> options;
  size_t from = first;
  if (text.size() == shared) {
    options.push_back(empty());
    ++from;
  }
  while (from < last) {
    size_t to = from;
    while (to < last && texts[to][shared] == texts[from][shared]) ++to;
    options.push_back(words(texts, from, to, shared, depth + 1));
    from = to;
  }
  return seq({this->text(std::string_view(text).substr(at, shared - at)), alt(options)});
}

uint32_t Builder::rule(std::string name) {
  if (rules_.size() >= kMaxNodes / 8) throw GrammarError("the grammar has too many rules");
  rules_.push_back({std::move(name)});
  return static_cast<uint32_t>(rules_.size() - 1);
}

void Builder::define(uint32_t rule, Expr body) {
  rules_[rule].body = body;
  rules_[rule].defined = true;
}

Expr Builder::call(uint32_t rule) { return add({Kind::call, rule}); }

bool Builder::productive(const Node& node) const {
  const auto good = [this](Expr child) { return productive_[child]; };
  const auto from = children_.begin() + node.index, to = from + node.count;
  switch (node.kind) {
    case Kind::never: return false;
    case Kind::seq: return std::all_of(from, to, good);
    case Kind::alt: return std::any_of(from, to, good);
    case Kind::repeat: return node.min == 0 || productive_[node.index];
    case Kind::call: return productive_[rules_[node.index].body];
    default: return true;
  }
}

bool Builder::nullable(const Node& node) const {
  const auto may_be_empty = [this](Expr child) { return nullable_[child]; };
  const auto from = children_.begin() + node.index, to = from + node.count;
  switch (node.kind) {
    case Kind::empty: return true;
    case Kind::characters: return node.min == 0;
    case Kind::seq: return std::all_of(from, to, may_be_empty);
    case Kind::alt: return std::any_of(from, to, may_be_empty);
    case Kind::repeat: return node.min == 0 || nullable_[node.index];
    case Kind::call: return nullable_[rules_[node.index].body];
    default: return false;
  }
}

// Which expressions match anything, and which may match nothing at all.
void Builder::analyse() {
  productive_.assign(nodes_.size(), false);
  nullable_.assign(nodes_.size(), false);
  size_t rounds = 0;
  for (bool changed = true; changed;) {
    changed = false;
    if (++rounds * nodes_.size() > (size_t{1} << 28))
      throw GrammarError("the grammar's rules depend on each other too deeply");
    for (size_t i = 0; i < nodes_.size(); ++i) {  // children stand before what holds them
      if (!productive_[i] && productive(nodes_[i])) productive_[i] = changed = true;
      if (!nullable_[i] && nullable(nodes_[i])) nullable_[i] = changed = true;
    }
  }
}

// The rules that may be called before anything was read.
std::vector<uint32_t> Builder::first_rules(Expr body) const {
  std::vector<uint32_t> out;
  std::vector<Expr> open{body};
  std::set<Expr> seen;
  while (!open.empty()) {
    const Expr expr = open.back();
    open.pop_back();
    if (!seen.insert(expr).second) continue;
    const Node& node = nodes_[expr];
    if (node.kind == Kind::call) out.push_back(node.index);
    if (node.kind == Kind::repeat) open.push_back(node.index);
    if (node.kind != Kind::alt && node.kind != Kind::seq) continue;
    for (uint32_t i = 0; i < node.count; ++i) {
      const Expr child = children_[node.index + i];
      open.push_back(child);
      if (node.kind == Kind::seq && !nullable_[child]) break;
    }
  }
  return out;
}

void Builder::refuse_left_recursion() const {
  enum : uint8_t { fresh, open, done };
  std::vector<uint8_t> marks(rules_.size(), fresh);
  std::vector<std::vector<uint32_t>> calls(rules_.size());
  for (uint32_t root = 0; root < rules_.size(); ++root) {
    std::vector<std::pair<uint32_t, size_t>> path;
    if (marks[root] == fresh) path.emplace_back(root, 0);
    while (!path.empty()) {
      auto& [rule, at] = path.back();
      if (marks[rule] == fresh) {
        marks[rule] = open;
        calls[rule] = first_rules(rules_[rule].body);
      }
      if (at == calls[rule].size()) {
        marks[rule] = done;
        path.pop_back();
        continue;
      }
      const uint32_t called = calls[rule][at++];
      if (marks[called] == open)
        throw GrammarError(rules_[called].name +
                           " begins with itself; let it begin with something else");
      if (marks[called] == fresh) path.emplace_back(called, 0);
    }
  }
}

Automaton Builder::build(Expr root, const std::string& what) {
  for (const Rule& rule : rules_)
    if (!rule.defined) throw GrammarError(rule.name + " is used and not defined");
  analyse();
  if (!productive_[root]) throw GrammarError("no text matches " + what);
  refuse_left_recursion();
  out_ = {};
  push({});  // state 0: the end
  out_.start = entry(root);
  while (!pending_.empty()) {
    const auto [state, body] = pending_.back();
    pending_.pop_back();
    const uint32_t first = compile(body, 0);
    out_.states[state] = {State::Kind::split, static_cast<uint32_t>(out_.targets.size()), 1};
    out_.targets.push_back(first);
  }
  out_.sets = sets_;
  out_.classes = classes_;
  find_symbols();
  return std::move(out_);
}

uint32_t Builder::push(State state) {
  if (out_.states.size() >= 2 * kMaxNodes) throw GrammarError("the grammar has too many states");
  out_.states.push_back(state);
  return static_cast<uint32_t>(out_.states.size() - 1);
}

uint32_t Builder::split(const std::vector<uint32_t>& targets) {
  const auto first = static_cast<uint32_t>(out_.targets.size());
  out_.targets.insert(out_.targets.end(), targets.begin(), targets.end());
  return push({State::Kind::split, first, static_cast<uint32_t>(targets.size())});
}

// The state where something that can be called starts.
uint32_t Builder::entry(Expr body) {
  const auto known = entries_.find(body);
  if (known != entries_.end()) return known->second;
  const uint32_t state = push({});
  entries_.emplace(body, state);
  pending_.emplace_back(state, body);
  return state;
}

uint32_t Builder::compile(Expr expr, uint32_t next) {
  const Node node = nodes_[expr];
  if (node.kind == Kind::empty) return next;
  const auto known = compiled_.find({expr, next});
  if (known != compiled_.end()) return known->second;
  uint32_t state = 0;
  switch (node.kind) {
    case Kind::bytes: state = push({State::Kind::bytes, node.index, 0, next}); break;
    case Kind::characters:
      state = push({State::Kind::characters, node.index, 0, next, node.min, node.max});
      break;
    case Kind::call: state = push({State::Kind::call, entry(rules_[node.index].body), 0, next}); break;
    case Kind::seq:
      state = next;
      for (uint32_t i = node.count; i-- > 0;) state = compile(children_[node.index + i], state);
      break;
    case Kind::alt: {
      std::vector<uint32_t> targets;
      for (uint32_t i = 0; i < node.count; ++i)
        if (const Expr child = children_[node.index + i]; productive_[child])
          targets.push_back(compile(child, next));
      state = split(targets);
      break;
    }
    case Kind::repeat: state = compile_repeat(node, next); break;
    default: break;
  }
  compiled_.emplace(std::pair(expr, next), state);
  return state;
}

uint32_t Builder::compile_repeat(const Node& node, uint32_t next) {
  const Expr part = node.index;
  if (!productive_[part]) return next;
  const bool may_be_empty = nullable_[part];
  const uint32_t min = may_be_empty ? 0 : node.min;
  if (node.max == kUnlimited && size_t{min} * nodes_[part].size <= kUnrolled) {
    const uint32_t again = push({});  // the part, and again; or on
    const uint32_t body = compile(part, again);
    out_.states[again] = {State::Kind::split, static_cast<uint32_t>(out_.targets.size()), 2};
    out_.targets.insert(out_.targets.end(), {body, next});
    uint32_t state = again;
    for (uint32_t i = 0; i < min; ++i) state = compile(part, state);
    return state;
  }
  if (node.max != kUnlimited && size_t{node.max} * nodes_[part].size <= kUnrolled) {
    uint32_t state = next;
    for (uint32_t i = node.max; i-- > min;) state = split({compile(part, state), next});
    for (uint32_t i = 0; i < min; ++i) state = compile(part, state);
    return state;
  }
  if (may_be_empty && node.max != kUnlimited && node.max > kUnrolled)
    throw GrammarError("what may be empty is repeated up to " + std::to_string(node.max) +
                       " times; repeat it without a bound");
  return push({State::Kind::loop, entry(part), 0, next, min, node.max});
}

// Bytes with the same column in every set and class.
void Builder::find_symbols() {
  std::array<uint32_t, 256> group{};
  uint32_t groups = 1;
  const auto refine = [&](auto&& key_of) {
    std::map<std::pair<uint32_t, uint32_t>, uint32_t> renamed;
    for (size_t byte = 0; byte < 256; ++byte) {
      const auto at = renamed.emplace(std::pair(group[byte], uint32_t{key_of(byte)}),
                                      static_cast<uint32_t>(renamed.size()));
      group[byte] = at.first->second;
    }
    groups = static_cast<uint32_t>(renamed.size());
  };
  for (const ByteSet& set : out_.sets) refine([&](size_t byte) { return set.test(byte); });
  for (const CharacterReader& reader : out_.classes)
    for (const auto& row : reader.next) refine([&](size_t byte) { return row[byte]; });
  for (size_t byte = 0; byte < 256; ++byte)
    out_.symbol_of[byte] = static_cast<uint8_t>(group[byte]);
  out_.symbols = groups;
}

}  // namespace pocketslm::grammar
