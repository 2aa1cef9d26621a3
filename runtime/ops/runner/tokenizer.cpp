#include "tokenizer.h"

#include <algorithm>
#include <cstring>
#include <queue>

#include "json.h"
#include "unicode.h"

namespace pocketslm {
namespace {

// Written by export/lower/native_tokenizer.py: this header, then offsets [tokens + 1] into the
// text, merges [left, right, rank, result] by left and right, tokens by their bytes, added tokens
// (their ids, the special ones first), ids of the prefix, tokens of the 256 bytes, text.
struct SectionHeader {
  uint32_t version, tokens, merges, indexed, special, ordinary, prefix, words, flags, text_bytes;
};
constexpr uint32_t kVersion = 2;
constexpr uint32_t kNoToken = UINT32_MAX;  // of a byte that encodes to nothing

CharClass class_at(std::string_view text, size_t at) {
  return at < text.size() ? char_class(next_utf8(text, at)) : CharClass::space;
}

bool is_line_end(std::string_view text, size_t at) {
  return at < text.size() && (text[at] == '\n' || text[at] == '\r');
}

// Past a run of at most `most` characters of a class.
size_t run_end(std::string_view text, size_t at, CharClass kind, size_t most = SIZE_MAX) {
  for (; most && at < text.size() && class_at(text, at) == kind; --most) next_utf8(text, at);
  return at;
}

// \s+(?!\S)|\s+: white space leaves its last character to the word after it.
size_t space_end(std::string_view text, size_t start) {
  const size_t end = run_end(text, start, CharClass::space);
  if (end == text.size()) return end;
  size_t last = start;
  for (size_t at = start; at < end; next_utf8(text, at)) last = at;
  return last > start ? last : end;
}

// GPT-2's words: contractions, letters, numbers or other signs with a space before, and space.
size_t gpt2_word_end(std::string_view text, size_t start) {
  static constexpr std::string_view contractions[] = {"'s", "'t", "'re", "'ve", "'m", "'ll", "'d"};
  for (std::string_view c : contractions)
    if (text.substr(start, c.size()) == c) return start + c.size();
  size_t at = start;
  if (text[at] == ' ' && class_at(text, at + 1) != CharClass::space) ++at;
  const CharClass kind = class_at(text, at);
  return kind == CharClass::space ? space_end(text, start) : run_end(text, at, kind);
}

// Contractions in any case, the long s too; `start` where there is none.
size_t contraction_end(std::string_view text, size_t start) {
  if (text[start] != '\'' || start + 1 == text.size()) return start;
  const auto lower = [&](size_t at) {
    const char c = at < text.size() ? text[at] : ' ';
    return c >= 'A' && c <= 'Z' ? static_cast<char>(c + 32) : c;
  };
  const char first = lower(start + 1), second = lower(start + 2);
  if (first == 's' || first == 't' || first == 'm' || first == 'd') return start + 2;
  if ((first == 'r' && second == 'e') || (first == 'v' && second == 'e') ||
      (first == 'l' && second == 'l'))
    return start + 3;
  constexpr std::string_view long_s = "\u017f";
  return text.substr(start + 1, long_s.size()) == long_s ? start + 1 + long_s.size() : start;
}

// The words of Llama 3 and Qwen 2, which differ in the digits of a number.
size_t llama3_word_end(std::string_view text, size_t start, size_t digits) {
  if (const size_t end = contraction_end(text, start); end > start) return end;
  size_t second = start;
  next_utf8(text, second);
  const CharClass kind = class_at(text, start);
  if (kind == CharClass::letter) return run_end(text, start, CharClass::letter);
  if (kind == CharClass::number) return run_end(text, start, CharClass::number, digits);
  if (!is_line_end(text, start) && second < text.size() &&
      class_at(text, second) == CharClass::letter)
    return run_end(text, second, CharClass::letter);
  const size_t signs = text[start] == ' ' ? start + 1 : start;
  if (size_t end = run_end(text, signs, CharClass::other); end > signs) {
    while (is_line_end(text, end)) ++end;
    return end;
  }
  // \s*[\r\n]+: up to the last line end of the space.
  for (size_t end = run_end(text, start, CharClass::space); end > start; --end)
    if (is_line_end(text, end - 1)) return end;
  return space_end(text, start);
}

}  // namespace

std::string Tokenizer::load(const void* data, size_t bytes, uint32_t vocabulary) {
  SectionHeader header;
  if (bytes < sizeof header) return "the tokenizer section is too short";
  std::memcpy(&header, data, sizeof header);
  if (header.version != kVersion)
    return "the tokenizer section has an unknown version; export the model again";
  const uint64_t words = uint64_t{header.tokens} + 1 + uint64_t{header.merges} * 4 +
                         header.indexed + header.special + header.ordinary + header.prefix + 256;
  if (header.tokens == 0 || header.tokens > vocabulary ||
      sizeof header + words * 4 + header.text_bytes != bytes ||
      header.words > static_cast<uint32_t>(Words::spaces))
    return "the tokenizer section has a wrong length or form";
  const auto* word = reinterpret_cast<const uint32_t*>(static_cast<const char*>(data) + sizeof header);
  offsets_ = word;
  merges_ = reinterpret_cast<const Merge*>(offsets_ + header.tokens + 1);
  index_ = reinterpret_cast<const uint32_t*>(merges_ + header.merges);
  const uint32_t* added = index_ + header.indexed;
  const uint32_t* prefix = added + header.special + header.ordinary;
  byte_tokens_ = prefix + header.prefix;
  text_ = reinterpret_cast<const char*>(byte_tokens_ + 256);
  for (uint32_t i = 0; i <= header.tokens; ++i)
    if (offsets_[i] > header.text_bytes || (i && offsets_[i] < offsets_[i - 1]))
      return "the tokenizer section has wrong offsets";
  bool known = true;
  for (uint32_t i = 0; i < header.merges; ++i) known &= merges_[i].result < header.tokens;
  for (const uint32_t* id = index_; id != byte_tokens_ + 256; ++id)
    known &= *id < header.tokens || (id >= byte_tokens_ && *id == kNoToken);
  if (!known) return "the tokenizer section names an unknown token";
  count_ = header.tokens, merge_count_ = header.merges, index_count_ = header.indexed;
  words_ = static_cast<Words>(header.words), flags_ = header.flags;
  prefix_.assign(prefix, prefix + header.prefix);
  is_special_.assign(count_, false);
  for (uint32_t i = 0; i < header.special + header.ordinary; ++i) {
    const std::string_view name = stored(added[i]);
    if (i < header.special) is_special_[added[i]] = true;
    if (name.empty()) continue;
    added_.push_back({added[i], i < header.special});
    added_leads_[static_cast<unsigned char>(name[0])] = true;
  }
  // The longest first: one may begin with another.
  std::stable_sort(added_.begin(), added_.end(), [&](const Added& a, const Added& b) {
    return stored(a.token).size() > stored(b.token).size();
  });
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

// The added token that `text` begins with, or null.
const Tokenizer::Added* Tokenizer::added_at(std::string_view text, bool special) const {
  if (!added_leads_[static_cast<unsigned char>(text[0])]) return nullptr;
  for (const Added& added : added_) {
    const std::string_view name = stored(added.token);
    if ((special || !added.special) && text.substr(0, name.size()) == name) return &added;
  }
  return nullptr;
}

void Tokenizer::encode(const std::vector<TextPart>& parts, std::vector<int32_t>& out) const {
  std::string plain;
  bool start = true;
  const auto flush = [&] {
    if (!plain.empty()) encode_text(std::move(plain), start, out);
    plain.clear();
    start = false;
  };
  for (const TextPart& part : parts)
    for (size_t at = 0; at < part.text.size();) {
      const Added* added = added_at(part.text.substr(at), part.special);
      if (!added) {
        plain += part.text[at++];
        continue;
      }
      flush();
      out.push_back(static_cast<int32_t>(added->token));
      at += stored(added->token).size();
    }
  flush();
}

// Text without added tokens. SentencePiece's mark is a space here, in tokens too.
void Tokenizer::encode_text(std::string text, bool start, std::vector<int32_t>& out) const {
  if (flags_ & kNfc) text = to_nfc(text);
  if (is_marked()) {
    constexpr std::string_view mark = "\u2581";
    for (size_t at = 0; (at = text.find(mark, at)) != std::string::npos; ++at)
      text.replace(at, mark.size(), " ");
  }
  if (flags_ & kSpaceAlways || (flags_ & kSpaceAtStart && start && text[0] != ' '))
    text.insert(0, 1, ' ');
  const std::string_view view = text;
  for (size_t at = 0; at < view.size();) {
    const size_t end = word_end(view, at);
    merge_word(view.substr(at, end - at), out);
    at = end;
  }
}

size_t Tokenizer::word_end(std::string_view text, size_t start) const {
  switch (words_) {
    case Words::gpt2:
      return gpt2_word_end(text, start);
    case Words::gpt2_digits: {
      // Numbers are cut out, character by character, before words are looked for.
      size_t end = start;
      if (class_at(text, start) == CharClass::number) {
        next_utf8(text, end);
        return end;
      }
      while (end < text.size() && class_at(text, end) != CharClass::number) next_utf8(text, end);
      return gpt2_word_end(text.substr(0, end), start);
    }
    case Words::llama3:
      return llama3_word_end(text, start, 3);
    case Words::qwen2:
      return llama3_word_end(text, start, 1);
    case Words::whole:
      return text.size();
    case Words::spaces:
      return std::min(text.find(' ', start + 1), text.size());
  }
  return text.size();
}

const Tokenizer::Merge* Tokenizer::find(int32_t left, int32_t right) const {
  const auto a = static_cast<uint32_t>(left), b = static_cast<uint32_t>(right);
  const Merge* end = merges_ + merge_count_;
  const Merge* found = std::lower_bound(merges_, end, 0, [&](const Merge& merge, int) {
    return merge.left != a ? merge.left < a : merge.right < b;
  });
  return found != end && found->left == a && found->right == b ? found : nullptr;
}

// The token with these bytes in the index, or -1.
int32_t Tokenizer::token_of(std::string_view text) const {
  const uint32_t* end = index_ + index_count_;
  const uint32_t* found = std::lower_bound(
      index_, end, text, [&](uint32_t token, std::string_view t) { return stored(token) < t; });
  return found != end && stored(*found) == text ? static_cast<int32_t>(*found) : -1;
}

void Tokenizer::merge_word(std::string_view word, std::vector<int32_t>& out) const {
  if (flags_ & kWholeWords)
    if (const int32_t token = token_of(word); token >= 0) {
      out.push_back(token);
      return;
    }
  std::vector<int32_t> tokens;
  for (size_t at = 0; at < word.size();) {
    size_t end = at + 1;
    if (is_marked()) {  // a character where the vocabulary has it, else its bytes
      next_utf8(word, end = at);
      if (const int32_t token = token_of(word.substr(at, end - at)); token >= 0) {
        tokens.push_back(token);
        at = end;
      }
    }
    for (; at < end; ++at)
      if (const uint32_t token = byte_tokens_[static_cast<unsigned char>(word[at])];
          token != kNoToken)
        tokens.push_back(static_cast<int32_t>(token));
  }
  merge(tokens, out);
}

// Lowest rank first, leftmost among equals; a heap keeps long words from costing their square.
void Tokenizer::merge(const std::vector<int32_t>& tokens, std::vector<int32_t>& out) const {
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
  for (int32_t token : tokens) {
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
    left.token = static_cast<int32_t>(find(best.left, best.right)->result);
    left.next = symbols[right].next;
    symbols[right].token = -1;
    if (left.next >= 0) symbols[left.next].previous = best.at;
    propose(left.previous);
    propose(best.at);
  }
  for (int32_t i = size ? 0 : -1; i >= 0; i = symbols[i].next) out.push_back(symbols[i].token);
}

}  // namespace pocketslm
