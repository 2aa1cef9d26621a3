#include "tokenizer.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <deque>
#include <iterator>
#include <numeric>
#include <queue>
#include <unordered_map>
#include <utility>

#include "bert.h"
#include "json.h"
#include "unicode.h"

namespace pocketslm {
namespace {

// Written by export/lower/native_tokenizer.py: this header, then offsets [tokens + 1] into the
// text, merges [left, right, rank, result] by left and right, tokens by their bytes, added tokens
// [id, flags], ids of the prefix and the suffix, tokens of the 256 bytes, text. Before the text
// of a Unigram stand the scores of the tokens by their bytes and that of an unknown one, as doubles.
struct SectionHeader {
  uint32_t version, tokens, merges, indexed, added, prefix, suffix, words, flags, unknown, longest,
      text_bytes;
};
constexpr uint32_t kVersion = 3;
constexpr uint32_t kNoToken = UINT32_MAX;  // of a byte that encodes to nothing
constexpr std::string_view kMark = "\u2581";
constexpr size_t kCachedWords = 1 << 15, kCachedBytes = 64;  // longer words hardly come back
constexpr size_t kLongestPiece = 2048;  // bytes, which bounds the time that a character takes

// `text` with `from` replaced by `to`, in one pass.
std::string replaced(std::string_view text, std::string_view from, std::string_view to) {
  std::string out;
  out.reserve(text.size());
  for (size_t at = 0; at < text.size();) {
    const size_t found = std::min(text.find(from, at), text.size());
    out += text.substr(at, found - at);
    if (found < text.size()) out += to;
    at = found + from.size();
  }
  return out;
}

// Past the white space at the start of `text`.
size_t space_run(std::string_view text) {
  for (size_t at = 0; at < text.size();) {
    const size_t before = at;
    if (char_class(next_utf8(text, at)) != CharClass::space) return before;
  }
  return text.size();
}

// Where the white space at the end of `text` begins.
size_t trailing_space(std::string_view text) {
  size_t end = 0;
  for (size_t at = 0; at < text.size();)
    if (char_class(next_utf8(text, at)) != CharClass::space) end = at;
  return end;
}

}  // namespace

std::string Tokenizer::load(const void* data, size_t bytes, uint32_t vocabulary) {
  SectionHeader header;
  if (bytes < sizeof header) return "the tokenizer section is too short";
  std::memcpy(&header, data, sizeof header);
  if (header.version != kVersion)
    return "the tokenizer section has an unknown version; export the model again";
  const bool unigram = header.words == static_cast<uint32_t>(Words::unigram);
  const uint64_t words = uint64_t{header.tokens} + 1 + uint64_t{header.merges} * 4 +
                         header.indexed + uint64_t{header.added} * 2 + header.prefix +
                         header.suffix + 256 + (unigram ? 2 * (uint64_t{header.indexed} + 1) : 0);
  if (header.tokens == 0 || header.tokens > vocabulary ||
      sizeof header + words * 4 + header.text_bytes != bytes ||
      header.words >= static_cast<uint32_t>(Words::count))
    return "the tokenizer section has a wrong length or form";
  const auto* word = reinterpret_cast<const uint32_t*>(static_cast<const char*>(data) + sizeof header);
  offsets_ = word;
  merges_ = reinterpret_cast<const Merge*>(offsets_ + header.tokens + 1);
  index_ = reinterpret_cast<const uint32_t*>(merges_ + header.merges);
  const uint32_t* added = index_ + header.indexed;
  const uint32_t* prefix = added + 2 * size_t{header.added};
  const uint32_t* suffix = prefix + header.prefix;
  byte_tokens_ = suffix + header.suffix;
  scores_ = byte_tokens_ + 256;
  text_ = reinterpret_cast<const char*>(scores_ + (unigram ? 2 * (size_t{header.indexed} + 1) : 0));
  for (uint32_t i = 0; i <= header.tokens; ++i)
    if (offsets_[i] > header.text_bytes || (i && offsets_[i] < offsets_[i - 1]))
      return "the tokenizer section has wrong offsets";
  bool known = true;
  for (const uint32_t* id = index_; id != added; ++id) known &= *id < header.tokens;
  for (const uint32_t* id = added; id != prefix; id += 2) known &= *id < header.tokens;
  for (const uint32_t* id = prefix; id != byte_tokens_ + 256; ++id)
    known &= *id < header.tokens || (id >= byte_tokens_ && *id == kNoToken);
  first_merge_.assign(header.tokens + 1, header.merges);
  for (uint32_t i = header.merges; i-- > 0;) {
    const Merge& merge = merges_[i];
    known &= merge.left < header.tokens && merge.result < header.tokens;
    if (!known) break;
    if (i && merge.left < merges_[i - 1].left)
      return "the tokenizer section's merges are not in order";
    first_merge_[merge.left] = i;
    const std::string_view merged = stored(merge.result);
    for (size_t at = merged.find(' ', 1); at < merged.size(); at = merged.find(' ', at + 1))
      merges_a_space_[static_cast<unsigned char>(merged[at - 1])] = true;
  }
  known &= header.unknown < header.tokens;
  if (!known) return "the tokenizer section names an unknown token";
  for (uint32_t left = header.tokens; left-- > 0;)
    first_merge_[left] = std::min(first_merge_[left], first_merge_[left + 1]);
  if (unigram)
    if (std::string failure = check_pieces(header.indexed); !failure.empty()) return failure;
  count_ = header.tokens, index_count_ = header.indexed;
  words_ = static_cast<Words>(header.words), flags_ = header.flags;
  unknown_ = header.unknown, longest_ = header.longest;
  prefix_.assign(prefix, suffix);
  suffix_.assign(suffix, byte_tokens_);
  is_special_.assign(count_, false);
  for (; added != prefix; added += 2) {
    const uint32_t token = added[0], flags = added[1];
    std::string name(stored(token));
    if (flags & kSpecial) is_special_[token] = true;
    if (name.empty()) continue;
    if (flags & kMarked) name = replaced(name, " ", kMark);
    added_leads_[static_cast<unsigned char>(name[0])] = true;
    added_.push_back({token, flags, std::move(name)});
  }
  std::sort(added_.begin(), added_.end(),
            [](const Added& a, const Added& b) { return a.name < b.name; });
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

// The longest added token that `text` begins with, or null.
const Tokenizer::Added* Tokenizer::added_at(std::string_view text) const {
  const Added* longest = nullptr;
  auto low = added_.begin(), high = added_.end();
  // From `low` to `high` stand the names that begin with text[0, i) and are longer than that.
  for (size_t i = 0; i < text.size() && low != high; ++i) {
    const auto byte = static_cast<unsigned char>(text[i]);
    const auto at = [i](const Added& added) { return static_cast<unsigned char>(added.name[i]); };
    low = std::partition_point(low, high, [&](const Added& added) { return at(added) < byte; });
    high = std::partition_point(low, high, [&](const Added& added) { return at(added) == byte; });
    for (; low != high && low->name.size() == i + 1; ++low) longest = &*low;
  }
  return longest;
}

// What one call of encode() keeps: the words that came before and where their tokens stand.
struct Tokenizer::Encoding {
  std::vector<int32_t>& out;
  std::deque<std::string> texts = {};  // that `seen` points into
  std::unordered_map<std::string_view, std::pair<size_t, size_t>> seen = {};

  // The tokens of a word that outlives this: what `make` appends, or did for the same word before.
  template <typename Make>
  void append(std::string_view word, Make make) {
    const auto known = seen.find(word);
    const size_t before = out.size();
    if (known != seen.end()) {
      const auto [first, count] = known->second;
      for (size_t i = 0; i < count; ++i) out.push_back(out[first + i]);
    } else {
      make();
      if (word.size() <= kCachedBytes && seen.size() < kCachedWords)
        seen.emplace(word, std::make_pair(before, out.size() - before));
    }
  }
};

void Tokenizer::encode(const std::vector<TextPart>& parts, std::vector<int32_t>& out,
                       bool start) const {
  Encoding encoding{out};
  std::string plain;
  bool strip = false;
  const auto flush = [&](bool strip_end) {
    if (strip) plain.erase(0, space_run(plain));
    if (strip_end) plain.resize(trailing_space(plain));
    if (!plain.empty()) encode_text(std::move(plain), start, encoding);
    plain.clear();
    start = strip = false;
  };
  for (const TextPart& part : parts)
    for (size_t at = 0; at < part.text.size();) {
      const size_t from = at;
      const auto leads = [&](char c) { return added_leads_[static_cast<unsigned char>(c)]; };
      while (at < part.text.size() && !leads(part.text[at])) ++at;
      plain += part.text.substr(from, at - from);
      if (at == part.text.size()) break;
      const Added* added = added_at(part.text.substr(at));
      if (!added || (added->flags & kSpecial && !part.special)) {
        const size_t bytes = added ? added->name.size() : 1;
        plain += part.text.substr(at, bytes);
        at += bytes;
        continue;
      }
      flush(added->flags & kTakesSpaceBefore);
      out.push_back(static_cast<int32_t>(added->token));
      strip = added->flags & kTakesSpaceAfter;
      at += added->name.size();
    }
  flush(false);
}

void Tokenizer::encode_whole(TextPart text, std::vector<int32_t>& out, size_t most) const {
  out = prefix_;
  encode({text}, out);
  const size_t ends = prefix_.size() + suffix_.size();
  if (out.size() + suffix_.size() > most)
    out.resize(most > ends ? most - suffix_.size() : prefix_.size());
  out.insert(out.end(), suffix_.begin(), suffix_.end());
}

// Text without added tokens. SentencePiece's mark is a space here, in tokens too.
void Tokenizer::encode_text(std::string text, bool start, Encoding& encoding) const {
  std::vector<int32_t>& out = encoding.out;
  if (flags_ & kNfc) text = to_nfc(text);
  if (words_ == Words::bert)
    text = bert_normalized(text, {(flags_ & kClean) != 0, (flags_ & kIdeographs) != 0,
                                  (flags_ & kStripAccents) != 0, (flags_ & kLowercase) != 0});
  if (is_marked()) text = replaced(text, kMark, " ");
  if (flags_ & kSpaceAlways || (flags_ & kSpaceAtStart && start && text[0] != ' '))
    text.insert(0, 1, ' ');
  const std::string_view whole = encoding.texts.emplace_back(std::move(text));
  for (size_t at = 0; at < whole.size();) {
    const size_t end = is_marked() ? whole.size() : part_end(words_, whole, at);
    for (const std::string_view part = whole.substr(0, end); at < end;) {
      const size_t after = is_marked() ? marked_word_end(part, at) : word_end(words_, part, at);
      const std::string_view word = part.substr(at, after - at);
      encoding.append(word, [&] {
        words_ == Words::bert ? find_pieces(word, out) : merge_word(word, out);
      });
      at = after;
    }
  }
}

// Words begin with a space. Without a pre-tokenizer a text is one word, but BPE goes word by word
// all the same wherever no merge leads across the space.
size_t Tokenizer::marked_word_end(std::string_view text, size_t start) const {
  size_t at = text.find(' ', start + 1);
  if (words_ == Words::whole)
    while (at < text.size() && merges_a_space_[static_cast<unsigned char>(text[at - 1])])
      at = text.find(' ', at + 1);
  return std::min(at, text.size());
}

const Tokenizer::Merge* Tokenizer::find(int32_t left, int32_t right) const {
  const auto a = static_cast<uint32_t>(left), b = static_cast<uint32_t>(right);
  const Merge* end = merges_ + first_merge_[a + 1];
  const Merge* found =
      std::lower_bound(merges_ + first_merge_[a], end, b,
                       [](const Merge& merge, uint32_t right) { return merge.right < right; });
  return found != end && found->right == b ? found : nullptr;
}

// The token with these bytes in the index, or -1.
int32_t Tokenizer::token_of(std::string_view text) const {
  const uint32_t* end = index_ + index_count_;
  const uint32_t* found = std::lower_bound(
      index_, end, text, [&](uint32_t token, std::string_view t) { return stored(token) < t; });
  return found != end && stored(*found) == text ? static_cast<int32_t>(*found) : -1;
}

// WordPiece: the longest token that the word begins with, then that of the rest, and so on. Tokens
// that begin a word have a space before them.
void Tokenizer::find_pieces(std::string_view word, std::vector<int32_t>& out) const {
  if (space_run(word) == word.size()) return;
  std::vector<size_t> ends;  // of the characters
  for (size_t at = 0; at < word.size(); ends.push_back(at)) next_utf8(word, at);
  std::vector<int32_t> pieces;
  std::string piece = " ";
  size_t start = 0, first = 0;
  if (ends.size() <= longest_)
    for (; first < ends.size(); piece.clear()) {
      const size_t led = piece.size();
      size_t last = ends.size();
      int32_t token = -1;
      for (; last > first && token < 0; --last) {
        piece.resize(led);
        piece += word.substr(start, ends[last - 1] - start);
        token = token_of(piece);
      }
      if (token < 0) break;
      pieces.push_back(token);
      first = last + 1, start = ends[last];
    }
  if (first < ends.size()) pieces = {static_cast<int32_t>(unknown_)};
  out.insert(out.end(), pieces.begin(), pieces.end());
}

// Checks what only a Unigram has, and finds where the pieces of each first byte stand.
std::string Tokenizer::check_pieces(uint32_t indexed) {
  for (size_t i = 0; i <= indexed; ++i)
    if (!std::isfinite(score(i))) return "the tokenizer section has a score that is not finite";
  std::fill(std::begin(first_indexed_), std::end(first_indexed_), 0);
  for (size_t i = 0; i < indexed; ++i) {
    const std::string_view piece = stored(index_[i]);
    if (piece.empty() || piece.size() > kLongestPiece)
      return "the tokenizer section has an empty or a long piece";
    ++first_indexed_[static_cast<unsigned char>(piece[0]) + 1];
  }
  std::partial_sum(std::begin(first_indexed_), std::end(first_indexed_), first_indexed_);
  return "";
}

double Tokenizer::score(size_t indexed) const {
  double value;
  std::memcpy(&value, scores_ + 2 * indexed, sizeof value);
  return value;
}

void Tokenizer::encode_normalized(TextPart part, std::vector<int32_t>& out, bool start) const {
  const std::string text = marked(part.text, start);
  const std::string_view whole = text;
  std::vector<Best> best;
  Encoding encoding{out};
  for (size_t at = 0, end; at < whole.size(); at = end) {
    end = std::min(whole.find(' ', at + 1), whole.size());
    const std::string_view word = whole.substr(at, end - at);
    encoding.append(word, [&] { cut(word, part.special, best, out); });
  }
}

// SentencePiece's marks are spaces here.
std::string Tokenizer::marked(std::string_view text, bool start) const {
  std::string out;
  if (flags_ & kSplitSpaces) {
    for (size_t at = 0; at < text.size();) {
      const size_t from = at += space_run(text.substr(at));
      for (size_t next = at; at < text.size(); at = next)
        if (char_class(next_utf8(text, next)) == CharClass::space) break;
      const std::string_view word = text.substr(from, at - from);
      if (!word.empty() && word.substr(0, kMark.size()) != kMark) out += ' ';
      out += word;
    }
    return replaced(out, kMark, " ");
  }
  out = replaced(text, kMark, " ");
  const bool led = flags_ & kSpaceAlways || (flags_ & kSpaceAtStart && start);
  if (led && !out.empty() && out[0] != ' ') out.insert(0, 1, ' ');
  return out;
}

// Viterbi over the pieces that the word has from each character on. Neighbouring unknown characters
// are one unknown token.
void Tokenizer::cut(std::string_view word, bool special, std::vector<Best>& best,
                    std::vector<int32_t>& out) const {
  best.assign(word.size() + 1, Best());
  const auto known = [&](uint32_t token) { return special || !is_special_[token]; };
  const auto offer = [&](size_t start, size_t end, double score, uint32_t token) {
    const double sum = score + best[start].sum;
    if (best[end].token < 0 || sum > best[end].sum)
      best[end] = {sum, start, static_cast<int32_t>(token)};
  };
  for (size_t start = 0, next = 0; start < word.size(); start = next) {
    next_utf8(word, next);
    bool single = false;
    const auto first = static_cast<unsigned char>(word[start]);
    const uint32_t* low = index_ + first_indexed_[first];
    const uint32_t* high = index_ + first_indexed_[first + 1];
    // From `low` to `high` stand the pieces that begin with these bytes of the word.
    for (size_t bytes = 1; low < high; ++bytes) {
      for (; low < high && stored(*low).size() == bytes; ++low) {
        if (!known(*low)) continue;
        offer(start, start + bytes, score(low - index_), *low);
        single |= start + bytes == next;
      }
      if (start + bytes == word.size()) break;
      const int byte = static_cast<unsigned char>(word[start + bytes]);
      const auto at = [&](uint32_t token) {
        const std::string_view piece = stored(token);
        return bytes < piece.size() ? static_cast<unsigned char>(piece[bytes]) : -1;
      };
      low = std::partition_point(low, high, [&](uint32_t token) { return at(token) < byte; });
      high = std::partition_point(low, high, [&](uint32_t token) { return at(token) == byte; });
    }
    if (!single) offer(start, next, score(index_count_), unknown_);
  }
  const size_t before = out.size();
  const auto unknown = [&](size_t end) {
    return best[end].token == static_cast<int32_t>(unknown_);
  };
  for (size_t end = word.size(); end > 0;) {
    size_t start = best[end].start;
    int32_t token = best[end].token;
    if (unknown(end)) {
      while (start > 0 && unknown(start)) start = best[start].start;
      const int32_t whole = token_of(word.substr(start, end - start));
      if (whole >= 0 && known(static_cast<uint32_t>(whole))) token = whole;
    }
    out.push_back(token);
    end = start;
  }
  std::reverse(out.begin() + static_cast<ptrdiff_t>(before), out.end());
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
    int32_t at;
    const Merge* merge;
    bool operator<(const Candidate& other) const {
      return rank != other.rank ? rank > other.rank : at > other.at;
    }
  };
  std::vector<Symbol> symbols;
  symbols.reserve(tokens.size());
  for (int32_t token : tokens) {
    const auto at = static_cast<int32_t>(symbols.size());
    symbols.push_back({token, at - 1, at + 1});
  }
  const auto size = static_cast<int32_t>(symbols.size());
  if (size) symbols.back().next = -1;
  std::priority_queue<Candidate> queue;
  const auto propose = [&](int32_t left) {
    if (left < 0 || symbols[left].next < 0) return;
    if (const Merge* merge = find(symbols[left].token, symbols[symbols[left].next].token))
      queue.push({merge->rank, left, merge});
  };
  for (int32_t i = 0; i + 1 < size; ++i) propose(i);
  while (!queue.empty()) {
    const auto [rank, at, merge] = queue.top();
    queue.pop();
    Symbol& left = symbols[at];
    const int32_t right = left.next;
    if (left.token != static_cast<int32_t>(merge->left) || right < 0 ||
        symbols[right].token != static_cast<int32_t>(merge->right))
      continue;  // one of the two was merged meanwhile
    left.token = static_cast<int32_t>(merge->result);
    left.next = symbols[right].next;
    symbols[right].token = -1;
    if (left.next >= 0) symbols[left.next].previous = at;
    propose(left.previous);
    propose(at);
  }
  for (int32_t i = size ? 0 : -1; i >= 0; i = symbols[i].next) out.push_back(symbols[i].token);
}

}  // namespace pocketslm
