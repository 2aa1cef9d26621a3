#include "grammar/characters.h"

#include <algorithm>
#include <map>

#include "grammar/error.h"

namespace pocketslm::grammar {
namespace {

constexpr uint32_t kSurrogates = 0xd800, kAfterSurrogates = 0xe000;

ByteSet range(uint32_t first, uint32_t last) {
  ByteSet set;
  for (uint32_t byte = first; byte <= last; ++byte) set.set(byte);
  return set;
}

ByteSet one_of(std::string_view bytes) {
  ByteSet set;
  for (const char byte : bytes) set.set(static_cast<unsigned char>(byte));
  return set;
}

const ByteSet& digits_of_hex() {
  static const ByteSet set = one_of("0123456789abcdefABCDEF");
  return set;
}

// Code points of one length in UTF-8, cut where all bytes after a common beginning are ranges.
void spell_range(uint32_t first, uint32_t last, int more, std::vector<Spelling>& out) {
  for (int tail = 1; tail <= more; ++tail) {
    const uint32_t block = 1u << (6 * tail);
    if (first / block == last / block) continue;
    if (first % block) {
      spell_range(first, first | (block - 1), more, out);
      spell_range((first | (block - 1)) + 1, last, more, out);
      return;
    }
    if (last % block != block - 1) {
      spell_range(first, last / block * block - 1, more, out);
      spell_range(last / block * block, last, more, out);
      return;
    }
  }
  constexpr uint32_t kLead[] = {0, 0xc0, 0xe0, 0xf0};
  Spelling spelling;
  for (int at = more; at >= 0; --at) {
    const uint32_t mask = at == more ? ~0u : 63u, mark = at == more ? kLead[more] : 0x80u;
    spelling.push_back(range(mark | (first >> (6 * at) & mask), mark | (last >> (6 * at) & mask)));
  }
  out.push_back(std::move(spelling));
}

void append(Spelling& spelling, std::string_view text) {
  for (const char c : text) spelling.push_back(one_of({&c, 1}));
}

}  // namespace

CodeSet::CodeSet(std::initializer_list<std::pair<uint32_t, uint32_t>> ranges) {
  for (const auto& [first, last] : ranges) add(first, last);
}

CodeSet CodeSet::of(std::string_view ascii) {
  CodeSet set;
  for (const char c : ascii) set.add(static_cast<unsigned char>(c), static_cast<unsigned char>(c));
  return set;
}

void CodeSet::add(uint32_t first, uint32_t last) {
  if (first < kSurrogates && last >= kSurrogates) {
    add(first, kSurrogates - 1);
    if (last >= kAfterSurrogates) add(kAfterSurrogates, last);
    return;
  }
  if (first >= kSurrogates && first < kAfterSurrogates) first = kAfterSurrogates;
  if (last >= kSurrogates && last < kAfterSurrogates) last = kSurrogates - 1;
  if (first > last) return;
  auto from = std::lower_bound(ranges_.begin(), ranges_.end(), first,
                               [](const auto& r, uint32_t code) { return r.second + 1 < code; });
  auto to = from;
  while (to != ranges_.end() && to->first <= last + 1) {
    first = std::min(first, to->first);
    last = std::max(last, to->second);
    ++to;
  }
  from = ranges_.erase(from, to);
  ranges_.insert(from, {first, last});
}

void CodeSet::add(const CodeSet& other) {
  for (const auto& [first, last] : other.ranges_) add(first, last);
}

CodeSet CodeSet::without(const CodeSet& other) const {
  CodeSet out;
  for (auto [first, last] : ranges_) {
    for (const auto& [begin, end] : other.ranges_) {
      if (end < first || begin > last) continue;
      if (begin > first) out.add(first, begin - 1);
      first = end + 1;
      if (first > last) break;
    }
    if (first <= last) out.add(first, last);
  }
  return out;
}

CodeSet CodeSet::common(const CodeSet& other) const { return without(other.complement()); }

bool CodeSet::contains(uint32_t code) const {
  return std::any_of(ranges_.begin(), ranges_.end(),
                     [code](const auto& r) { return r.first <= code && code <= r.second; });
}

void spell_utf8(const CodeSet& set, std::vector<Spelling>& out) {
  constexpr std::pair<uint32_t, uint32_t> kLengths[] = {
      {0, 0x7f}, {0x80, 0x7ff}, {0x800, 0xffff}, {0x10000, CodeSet::kLast}};
  ByteSet ascii;
  for (const auto& [first, last] : set.ranges())
    for (uint32_t code = first; code <= std::min(last, 0x7fu); ++code) ascii.set(code);
  if (ascii.any()) out.push_back({ascii});
  for (const auto& [first, last] : set.ranges())
    for (int more = 1; more < 4; ++more) {
      const uint32_t low = std::max(first, kLengths[more].first);
      const uint32_t high = std::min(last, kLengths[more].second);
      if (low <= high) spell_range(low, high, more, out);
    }
}

std::vector<Spelling> spellings(const CodeSet& set, Writing writing) {
  std::vector<Spelling> out;
  if (writing == Writing::plain) {
    spell_utf8(set, out);
    return out;
  }
  static const CodeSet escaped = [] {
    CodeSet codes{{0, 0x1f}};
    codes.add('"', '"');
    codes.add('\\', '\\');
    return codes;
  }();
  spell_utf8(set.without(escaped), out);
  constexpr std::string_view kCodes = "\"\\\b\f\n\r\t", kLetters = "\"\\bfnrt";
  ByteSet letters;
  for (size_t i = 0; i < kCodes.size(); ++i)
    if (set.contains(static_cast<unsigned char>(kCodes[i])))
      letters.set(static_cast<unsigned char>(kLetters[i]));
  if (letters.any()) out.push_back({one_of("\\"), letters});
  for (uint32_t code = 0; code < 0x20; ++code) {
    if (!set.contains(code) || kCodes.find(static_cast<char>(code)) != std::string_view::npos)
      continue;
    Spelling spelling;
    append(spelling, code < 0x10 ? "\\u000" : "\\u001");
    spelling.push_back(one_of({&"00112233445566778899aAbBcCdDeEfF"[2 * (code & 15)], 2}));
    out.push_back(std::move(spelling));
  }
  return out;
}

std::vector<Spelling> json_character() {
  std::vector<Spelling> out;
  CodeSet plain{{0x20, CodeSet::kLast}};
  spell_utf8(plain.without(CodeSet::of("\"\\")), out);
  out.push_back({one_of("\\"), one_of("\"\\/bfnrt")});
  const ByteSet &hex = digits_of_hex(), back = one_of("\\"), u = one_of("u"), d = one_of("dD");
  out.push_back({back, u, hex & ~d, hex, hex, hex});
  out.push_back({back, u, d, one_of("01234567"), hex, hex});
  const ByteSet high = one_of("89abAB"), low = one_of("cdefCDEF");
  out.push_back({back, u, d, high, hex, hex, back, u, d, low, hex, hex});
  return out;
}

CharacterReader::CharacterReader(const std::vector<Spelling>& spellings) {
  using Places = std::vector<std::pair<size_t, size_t>>;  // of spellings, and how far in them
  std::map<Places, uint8_t> known;
  std::vector<Places> states;
  const auto state_of = [&](const Places& places) {
    const auto [at, fresh] = known.emplace(places, static_cast<uint8_t>(states.size()));
    if (fresh) {
      if (states.size() == kDead) throw GrammarError("a class of characters is too complex");
      states.push_back(places);
    }
    return at->second;
  };
  Places start;
  for (size_t i = 0; i < spellings.size(); ++i) start.emplace_back(i, 0);
  state_of(start);
  for (size_t state = 0; state < states.size(); ++state) {
    next.emplace_back();
    next.back().fill(kDead);
    for (size_t byte = 0; byte < 256; ++byte) {
      Places after;
      bool whole = false;
      for (const auto& [index, at] : states[state])
        if (spellings[index][at].test(byte)) {
          whole |= at + 1 == spellings[index].size();
          after.emplace_back(index, at + 1);
        }
      if (whole)
        next[state][byte] = 0;
      else if (!after.empty())
        next[state][byte] = state_of(after);
    }
  }
}

size_t CharacterReader::first_bytes() const {
  size_t count = 0;
  for (const uint8_t state : next[0]) count += state != kDead;
  return count;
}

}  // namespace pocketslm::grammar
