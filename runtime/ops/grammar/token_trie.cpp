#include "grammar/token_trie.h"

#include <algorithm>
#include <numeric>
#include <string>

#include "grammar/error.h"

namespace pocketslm::grammar {
namespace {

constexpr size_t kWideClass = 48;    // bytes that begin a character of a class worth a set of its own
constexpr size_t kMaxClasses = 32;   // of which that is kept

}  // namespace

TokenTrie::TokenTrie(const std::vector<std::string_view>& texts)
    : texts_(texts.begin(), texts.end()) {
  std::vector<uint32_t> order;
  for (uint32_t token = 0; token < texts_.size(); ++token) {
    if (texts_[token].size() > UINT16_MAX)
      throw GrammarError("token " + std::to_string(token) + " has more than 65535 bytes");
    if (!texts_[token].empty()) order.push_back(token);
  }
  std::sort(order.begin(), order.end(), [&](uint32_t a, uint32_t b) {
    const int compared = texts_[a].compare(texts_[b]);
    return compared ? compared < 0 : a < b;
  });
  std::vector<uint32_t> path;  // nodes from the root to the last text
  const auto close_to = [&](size_t depth) {
    for (; path.size() > depth; path.pop_back())
      nodes_[path.back()].end = static_cast<uint32_t>(nodes_.size());
  };
  for (size_t i = 0; i < order.size(); ++i) {
    const std::string& text = texts_[order[i]];
    size_t shared = 0;
    while (shared < path.size() && shared < text.size() &&
           nodes_[path[shared]].byte == static_cast<uint8_t>(text[shared]))
      ++shared;
    close_to(shared);
    for (; shared < text.size(); ++shared) {
      path.push_back(static_cast<uint32_t>(nodes_.size()));
      nodes_.push_back({0, 0, 0, static_cast<uint16_t>(shared + 1),
                        static_cast<uint8_t>(text[shared])});
    }
    Node& node = nodes_[path.back()];
    if (node.token_count++ == 0) node.tokens = static_cast<uint32_t>(token_ids_.size());
    token_ids_.push_back(order[i]);
    deepest_ = std::max(deepest_, static_cast<uint32_t>(text.size()));
  }
  close_to(0);
}

const TokenSet& TokenTrie::Within::of_at_most(uint32_t count, size_t words) const {
  count = std::min<uint32_t>(count, most);
  const std::lock_guard<std::mutex> lock(mutex_);
  std::unique_ptr<TokenSet>& set = sets_[count];
  if (!set) {
    set = std::make_unique<TokenSet>(words);
    for (size_t token = 0; token < needs.size(); ++token)
      if (needs[token] <= count) (*set)[token / 64] |= uint64_t{1} << (token % 64);
  }
  return *set;
}

const TokenTrie::Within* TokenTrie::within(const CharacterReader& reader) const {
  if (reader.first_bytes() < kWideClass) return nullptr;
  const std::lock_guard<std::mutex> lock(mutex_);
  for (const auto& known : within_)
    if (known->reader == reader) return known.get();
  if (within_.size() == kMaxClasses) return nullptr;
  std::unique_ptr<Within> found(new Within(reader));
  found->needs.assign(count(), Within::kNever);
  found->below.assign(nodes_.size(), 0);
  std::vector<std::pair<uint8_t, uint32_t>> at(deepest_ + 1);  // inner state, whole characters
  const auto give_up = [&](size_t node) { found->below[node] = Within::kNever; };
  for (size_t i = 0; i < nodes_.size();) {
    const Node& node = nodes_[i];
    const auto [inner, whole] = at[node.depth - 1u];
    const uint8_t next = reader.next[inner][node.byte];
    const uint32_t characters = whole + (next == 0), needed = characters + (next != 0);
    if (next == CharacterReader::kDead || needed >= Within::kNever) {
      give_up(i);
      for (size_t below = i + 1; below < node.end; ++below) give_up(below);
      i = node.end;
      continue;
    }
    at[node.depth] = {next, characters};
    if (node.token_count) {
      found->below[i] = static_cast<uint8_t>(needed);
      found->most = std::max(found->most, static_cast<uint8_t>(needed));
      for (uint32_t t = 0; t < node.token_count; ++t)
        found->needs[token_ids_[node.tokens + t]] = static_cast<uint8_t>(needed);
    }
    ++i;
  }
  for (size_t i = nodes_.size(); i-- > 0;)  // children first
    for (size_t child = i + 1; child < nodes_[i].end; child = nodes_[child].end)
      found->below[i] = std::max(found->below[i], found->below[child]);
  within_.push_back(std::move(found));
  return within_.back().get();
}

}  // namespace pocketslm::grammar
