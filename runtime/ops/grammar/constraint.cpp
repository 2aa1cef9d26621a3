#include "grammar/constraint.h"

#include <algorithm>
#include <limits>

namespace pocketslm::grammar {
namespace {

// Steps of the automaton for one mask: a tenth of a second or so.
constexpr uint64_t kMaxWork = 6'000'000;
constexpr size_t kMaxMaskBytes = size_t{16} << 20, kMaxMachineBytes = size_t{24} << 20;
// A mask that took fewer nodes of the tree is found again as fast as it is kept.
constexpr size_t kWorthKeeping = 512;

void set_bit(TokenSet& set, uint32_t token) { set[token / 64] |= uint64_t{1} << (token % 64); }

}  // namespace

Constraint::Constraint(std::shared_ptr<const Automaton> automaton,
                       std::shared_ptr<const TokenTrie> trie, std::vector<uint32_t> ends, bool strip)
    : automaton_(std::move(automaton)),
      trie_(std::move(trie)),
      ends_(std::move(ends)),
      strip_(strip),
      machine_(*automaton_),
      mask_(trie_->words()),
      path_(trie_->deepest() + 1) {}

bool Constraint::is_end(uint32_t token) const {
  return std::find(ends_.begin(), ends_.end(), token) != ends_.end();
}

void Constraint::restart() {
  tidy();
  state_ = Machine::kStart;
  first_ = true;
  ended_ = false;
}

// Bounds what is kept. Never within a walk, whose states would get other numbers.
void Constraint::tidy() {
  if (known_.size() * trie_->words() * sizeof(uint64_t) > kMaxMaskBytes) known_.clear();
  if (machine_.memory() <= kMaxMachineBytes) return;
  known_.clear();
  state_ = machine_.restart_from(state_);
}

// Allows the tokens of the nodes [first, last) that can be read from `start` on; of what is under a
// node that needs at most `most` characters, nothing is left to find.
void Constraint::walk(uint32_t start, size_t first, size_t last, TokenSet& set,
                      const std::vector<uint8_t>* below, uint32_t most) {
  const auto& nodes = trie_->nodes();
  const uint64_t work = machine_.work();
  path_[first < last ? nodes[first].depth - 1u : 0] = start;
  for (size_t i = first; i < last;) {
    const TokenTrie::Node& node = nodes[i];
    ++visited_;
    if (below && (*below)[i] <= most) {
      i = node.end;
      continue;
    }
    const uint32_t state = machine_.next(path_[node.depth - 1u], node.byte);
    if (state == Machine::kDead) {
      i = node.end;
      continue;
    }
    for (uint32_t t = 0; t < node.token_count; ++t)
      set_bit(set, trie_->token_ids()[node.tokens + t]);
    path_[node.depth] = state;
    ++i;
    if (machine_.work() - work > kMaxWork)
      throw GrammarError("the grammar is too ambiguous: what may follow takes too long to find");
  }
}

void Constraint::find(TokenSet& set) {
  const auto& nodes = trie_->nodes();
  const TokenTrie::Within* within = nullptr;
  uint32_t most = 0;
  if (const Machine::Run run = machine_.run(state_); run.characters != kUnlimited)
    if ((within = trie_->within(automaton_->classes[run.characters])) != nullptr) {
      most = std::min<uint32_t>(run.most, within->most);
      set = within->of_at_most(most, trie_->words());
    }
  if (!within) std::fill(set.begin(), set.end(), 0);
  walk(state_, 0, nodes.size(), set, within ? &within->below : nullptr, most);
  if (!(strip_ && first_)) return;
  // A first token's leading space is not part of the text: what follows it starts here.
  for (size_t i = 0; i < nodes.size(); i = nodes[i].end) {
    if (nodes[i].byte != ' ') continue;
    for (size_t below = i; below < nodes[i].end; ++below)
      for (uint32_t t = 0; t < nodes[below].token_count; ++t) {
        const uint32_t token = trie_->token_ids()[nodes[below].tokens + t];
        set[token / 64] &= ~(uint64_t{1} << (token % 64));
      }
    for (uint32_t t = 0; t < nodes[i].token_count; ++t)
      set_bit(set, trie_->token_ids()[nodes[i].tokens + t]);
    walk(state_, i + 1, nodes[i].end, set, nullptr, 0);
  }
}

const TokenSet& Constraint::mask() {
  if (ended_) {
    std::fill(mask_.begin(), mask_.end(), 0);
    return mask_;
  }
  tidy();
  const bool keepable = !(strip_ && first_);
  const auto known = keepable ? known_.find(state_) : known_.end();
  if (known != known_.end()) {
    mask_ = known->second;
  } else {
    visited_ = 0;
    find(mask_);
    if (keepable && visited_ >= kWorthKeeping) known_.emplace(state_, mask_);
  }
  for (const uint32_t token : ends_) {
    mask_[token / 64] &= ~(uint64_t{1} << (token % 64));
    if (may_end()) set_bit(mask_, token);
  }
  return mask_;
}

void Constraint::apply(float* logits) {
  constexpr float kNever = -std::numeric_limits<float>::infinity();
  const TokenSet& allowed = mask();
  bool any = false;
  for (size_t word = 0; word < allowed.size(); ++word) {
    const uint64_t bits = allowed[word];
    float* const from = logits + 64 * word;
    const size_t count = std::min<size_t>(64, trie_->count() - 64 * word);
    any |= bits != 0;
    if (bits == 0)
      std::fill(from, from + count, kNever);
    else if (bits != ~uint64_t{0})
      for (size_t i = 0; i < count; ++i)
        if (!(bits >> i & 1)) from[i] = kNever;
  }
  if (!any) throw GrammarError("no token of the vocabulary may follow this text");
}

uint32_t Constraint::behind(uint32_t token) {
  std::string_view text = trie_->text(token);
  if (text.empty()) return Machine::kDead;
  if (first_ && strip_ && text[0] == ' ') text.remove_prefix(1);
  uint32_t state = state_;
  for (const char byte : text) {
    state = machine_.next(state, static_cast<uint8_t>(byte));
    if (state == Machine::kDead) break;
  }
  return state;
}

bool Constraint::advance(uint32_t token) {
  if (token >= trie_->count() || ended_) return false;
  if (is_end(token)) return ended_ = may_end();
  const uint32_t state = behind(token);
  if (state == Machine::kDead) return false;
  state_ = state;
  first_ = false;
  tidy();
  return true;
}

}  // namespace pocketslm::grammar
