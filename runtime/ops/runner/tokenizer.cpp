#include "tokenizer.h"

#include <algorithm>
#include <cstring>
#include <queue>

#include "json.h"
#include "unicode.h"

namespace pocketslm {
namespace {

// Written by export/lower/native_tokenizer.py: this header, then offsets [tokens + 1] into the
// text, merges [left, right, result] by rank, ids of special tokens, tokens of the 256 bytes, text.
struct SectionHeader {
  uint32_t version, tokens, merges, specials, split_digits, text_bytes;
};
constexpr uint32_t kVersion = 1;
constexpr uint32_t kNoToken = UINT32_MAX;  // of a byte that encodes to nothing

uint64_t pair_key(int32_t left, int32_t right) {
  return uint64_t{static_cast<uint32_t>(left)} << 32 | static_cast<uint32_t>(right);
}

// GPT-2's words: contractions, letters, numbers or other signs with a space before, and space that
// leaves its last character to the next word.
size_t word_end(std::string_view text, size_t start) {
  static constexpr std::string_view contractions[] = {"'s", "'t", "'re", "'ve", "'m", "'ll", "'d"};
  for (std::string_view c : contractions)
    if (text.substr(start, c.size()) == c) return start + c.size();
  const auto class_at = [&](size_t at) {
    return at < text.size() ? char_class(next_utf8(text, at)) : CharClass::space;
  };
  size_t at = start;
  if (text[at] == ' ' && at + 1 < text.size() && class_at(at + 1) != CharClass::space) ++at;
  const CharClass kind = class_at(at);
  size_t last = at;  // where the last character begins
  while (at < text.size() && class_at(at) == kind) {
    last = at;
    next_utf8(text, at);
  }
  if (kind == CharClass::space && at < text.size() && last > start) return last;
  return at;
}

}  // namespace

std::string Tokenizer::load(const void* data, size_t bytes, uint32_t vocabulary) {
  SectionHeader header;
  if (bytes < sizeof header) return "the tokenizer section is too short";
  std::memcpy(&header, data, sizeof header);
  if (header.version != kVersion) return "the tokenizer section has an unknown version";
  const uint64_t words = uint64_t{header.tokens} + 1 + uint64_t{header.merges} * 3 +
                         header.specials + 256;
  if (header.tokens == 0 || header.tokens > vocabulary ||
      sizeof header + words * 4 + header.text_bytes != bytes)
    return "the tokenizer section has a wrong length";
  const auto* word = reinterpret_cast<const uint32_t*>(static_cast<const char*>(data) + sizeof header);
  offsets_ = word;
  const uint32_t* merges = word + header.tokens + 1;
  const uint32_t* specials = merges + size_t{header.merges} * 3;
  const uint32_t* byte_tokens = specials + header.specials;
  text_ = reinterpret_cast<const char*>(byte_tokens + 256);
  for (uint32_t i = 0; i <= header.tokens; ++i)
    if (offsets_[i] > header.text_bytes || (i && offsets_[i] < offsets_[i - 1]))
      return "the tokenizer section has wrong offsets";
  for (const uint32_t* id = merges; id != byte_tokens + 256; ++id)
    if (*id >= header.tokens && !(id >= byte_tokens && *id == kNoToken))
      return "the tokenizer section names an unknown token";
  count_ = header.tokens;
  split_digits_ = header.split_digits != 0;
  merges_.reserve(header.merges);
  for (uint32_t rank = 0; rank < header.merges; ++rank, merges += 3)
    merges_.emplace(pair_key(static_cast<int32_t>(merges[0]), static_cast<int32_t>(merges[1])),
                    Merge{rank, static_cast<int32_t>(merges[2])});
  special_.assign(specials, specials + header.specials);
  is_special_.assign(count_, false);
  for (int32_t id : special_) is_special_[static_cast<size_t>(id)] = true;
  // The longest first: one may begin with another.
  std::sort(special_.begin(), special_.end(), [&](int32_t a, int32_t b) {
    return stored(static_cast<uint32_t>(a)).size() > stored(static_cast<uint32_t>(b)).size();
  });
  std::copy(byte_tokens, byte_tokens + 256, byte_tokens_);
  return "";
}

std::string_view Tokenizer::stored(uint32_t token) const {
  return {text_ + offsets_[token], offsets_[token + 1] - offsets_[token]};
}

std::string_view Tokenizer::bytes(int32_t token) const {
  const auto index = static_cast<uint32_t>(token);
  if (index >= count_ || is_special_[index]) return {};
  return stored(index);
}

void Tokenizer::encode(std::string_view text, bool special, std::vector<int32_t>& out) const {
  size_t plain = 0;
  for (size_t at = 0; special && at < text.size();) {
    int32_t found = -1;
    for (int32_t id : special_) {
      const std::string_view name = stored(static_cast<uint32_t>(id));
      if (!name.empty() && text.substr(at, name.size()) == name) {
        found = id;
        break;
      }
    }
    if (found < 0) {
      ++at;
      continue;
    }
    encode_plain(text.substr(plain, at - plain), out);
    out.push_back(found);
    plain = at += stored(static_cast<uint32_t>(found)).size();
  }
  encode_plain(text.substr(plain), out);
}

// Where digits stand alone they are cut out before words are looked for.
void Tokenizer::encode_plain(std::string_view text, std::vector<int32_t>& out) const {
  size_t start = 0;
  for (size_t at = 0; split_digits_ && at < text.size();) {
    const size_t begin = at;
    if (char_class(next_utf8(text, at)) != CharClass::number) continue;
    encode_words(text.substr(start, begin - start), out);
    merge_word(text.substr(begin, at - begin), out);
    start = at;
  }
  encode_words(text.substr(start), out);
}

void Tokenizer::encode_words(std::string_view text, std::vector<int32_t>& out) const {
  for (size_t at = 0; at < text.size();) {
    const size_t end = word_end(text, at);
    merge_word(text.substr(at, end - at), out);
    at = end;
  }
}

const Tokenizer::Merge* Tokenizer::find(int32_t left, int32_t right) const {
  const auto found = merges_.find(pair_key(left, right));
  return found == merges_.end() ? nullptr : &found->second;
}

// Lowest rank first, leftmost among equals; a heap keeps long words from costing their square.
void Tokenizer::merge_word(std::string_view word, std::vector<int32_t>& out) const {
  struct Symbol {
    int32_t token, previous, next;
  };
  struct Candidate {
    uint32_t rank;
    int32_t at, left, right;
    bool operator<(const Candidate& other) const {
      return rank != other.rank ? rank > other.rank : at > other.at;
    }
  };
  std::vector<Symbol> symbols;
  for (char c : word)
    if (const int32_t token = byte_tokens_[static_cast<unsigned char>(c)]; token >= 0) {
      const auto at = static_cast<int32_t>(symbols.size());
      symbols.push_back({token, at - 1, at + 1});
    }
  const auto size = static_cast<int32_t>(symbols.size());
  if (size) symbols.back().next = -1;
  std::priority_queue<Candidate> queue;
  const auto propose = [&](int32_t left) {
    if (left < 0 || symbols[left].next < 0) return;
    const int32_t a = symbols[left].token, b = symbols[symbols[left].next].token;
    if (const Merge* merge = find(a, b)) queue.push({merge->rank, left, a, b});
  };
  for (int32_t i = 0; i + 1 < size; ++i) propose(i);
  while (!queue.empty()) {
    const Candidate best = queue.top();
    queue.pop();
    Symbol& left = symbols[best.at];
    if (left.token != best.left || left.next < 0 || symbols[left.next].token != best.right)
      continue;  // one of the two was merged meanwhile
    const int32_t right = left.next;
    left.token = find(best.left, best.right)->result;
    left.next = symbols[right].next;
    symbols[right].token = -1;
    if (left.next >= 0) symbols[left.next].previous = best.at;
    propose(left.previous);
    propose(best.at);
  }
  for (int32_t i = size ? 0 : -1; i >= 0; i = symbols[i].next) out.push_back(symbols[i].token);
}

}  // namespace pocketslm
