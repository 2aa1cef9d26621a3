#include "words.h"

#include "bert.h"
#include "json.h"
#include "unicode.h"

namespace pocketslm {
namespace {

constexpr size_t kNone = SIZE_MAX;
constexpr Classes kUpper = one(CharClass::upper) | one(CharClass::letter) | kMarks;
constexpr Classes kLower = one(CharClass::lower) | one(CharClass::letter) | kMarks;
constexpr Classes kSigns = one(CharClass::sign);

// Whether a character of these classes stands at `at`; at the end there is none.
bool is_in(Classes classes, std::string_view text, size_t at) {
  if (at >= text.size()) return false;
  const auto first = static_cast<unsigned char>(text[at]);
  return one(char_class(first < 0x80 ? first : next_utf8(text, at))) & classes;
}

bool is_line_end(std::string_view text, size_t at) {
  return at < text.size() && (text[at] == '\n' || text[at] == '\r');
}

size_t next(std::string_view text, size_t at) {
  next_utf8(text, at);
  return at;
}

// Past a run of at most `most` characters of these classes.
size_t run_end(std::string_view text, size_t at, Classes classes, size_t most = SIZE_MAX) {
  for (; most && is_in(classes, text, at); --most) next_utf8(text, at);
  return at;
}

// \s*[\r\n]+|\s+(?!\S)|\s+: white space up to its last line end; without one, white space leaves
// its last character to the word after it.
size_t space_end(std::string_view text, size_t start, bool lines) {
  const size_t end = run_end(text, start, kSpaces);
  for (size_t at = end; lines && at > start; --at)
    if (is_line_end(text, at - 1)) return at;
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
  const bool spaced = text[start] == ' ' && is_in(~kSpaces, text, start + 1);
  const size_t at = spaced ? start + 1 : start;
  for (Classes kind : {kLetters, kNumbers})
    if (is_in(kind, text, at)) return run_end(text, at, kind);
  if (is_in(kSpaces, text, at)) return space_end(text, start, false);
  return run_end(text, at, ~(kLetters | kNumbers | kSpaces));
}

// Contractions in any case, the long s too; `start` where there is none.
size_t contraction_end(std::string_view text, size_t start) {
  if (start + 1 >= text.size() || text[start] != '\'') return start;
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

// What the words of Llama 3 and those made after them differ in.
struct Style {
  Classes letters;                // of a word
  size_t digits;                  // of a number
  bool cased = false;             // upper-case letters come first in a word
  bool contractions_apart = true;  // before all else; otherwise at the end of a cased word
  bool contractions_end_words = false;
  bool slashes = false;           // go with the line ends after signs
};

// Letters, the upper-case ones first: [upper]*[lower]+, or kNone. Letters without case are both.
size_t lower_end(std::string_view text, size_t start) {
  size_t last = kNone;  // the last letter of the run that could be a lower-case one
  size_t at = start;
  for (; is_in(kUpper, text, at); next_utf8(text, at))
    if (is_in(kLower, text, at)) last = at;
  if (is_in(kLower, text, at)) return run_end(text, at, kLower);
  return last == kNone ? kNone : run_end(text, last, kLower);
}

// The letters at `start`, after one sign that may lead them, or kNone.
size_t letters_end(std::string_view text, size_t start, const Style& style) {
  const bool leads = !is_line_end(text, start) && !is_in(kLetters | kNumbers, text, start);
  const size_t second = leads ? next(text, start) : start;
  if (!style.cased) {
    for (size_t at : {second, start})
      if (is_in(style.letters, text, at)) return run_end(text, at, style.letters);
    return kNone;
  }
  for (size_t at : {second, start})
    if (const size_t end = lower_end(text, at); end != kNone) return end;
  for (size_t at : {second, start})
    if (is_in(kUpper, text, at)) return run_end(text, run_end(text, at, kUpper), kLower);
  return kNone;
}

size_t llama3_word_end(std::string_view text, size_t start, const Style& style) {
  if (style.contractions_apart)
    if (const size_t end = contraction_end(text, start); end > start) return end;
  if (const size_t end = letters_end(text, start, style); end != kNone)
    return style.contractions_end_words ? contraction_end(text, end) : end;
  if (is_in(kNumbers, text, start)) return run_end(text, start, kNumbers, style.digits);
  const size_t signs = text[start] == ' ' ? start + 1 : start;
  const Classes others = ~((style.cased ? kLetters : style.letters) | kNumbers | kSpaces);
  if (size_t end = run_end(text, signs, others); end > signs) {
    while (is_line_end(text, end) || (style.slashes && text.substr(end, 1) == "/")) ++end;
    return end;
  }
  return space_end(text, start, true);
}

bool is_ascii_letter(std::string_view text, size_t at) {
  return at < text.size() && ((text[at] >= 'a' && text[at] <= 'z') ||
                              (text[at] >= 'A' && text[at] <= 'Z'));
}

// DeepSeek 3's words. What no word begins with, such as control characters, stays together.
size_t deepseek3_word_end(std::string_view text, size_t start) {
  constexpr Classes letters = kLetters | kMarks;
  const auto first = static_cast<unsigned char>(text[start]);
  if (first < 0x80 && is_in(kSigns, text, start) && is_ascii_letter(text, start + 1)) {
    size_t end = start + 1;
    while (is_ascii_letter(text, end)) ++end;
    return end;
  }
  const bool leads = !is_line_end(text, start) && !is_in(kLetters | kSigns, text, start);
  const size_t second = leads ? next(text, start) : start;
  for (size_t at : {second, start})
    if (is_in(letters, text, at)) return run_end(text, at, letters);
  const size_t signs = text[start] == ' ' ? start + 1 : start;
  if (size_t end = run_end(text, signs, kSigns); end > signs) {
    while (is_line_end(text, end)) ++end;
    return end;
  }
  if (is_in(kSpaces, text, start)) return space_end(text, start, true);
  size_t at = second;
  while (at < text.size() && !is_in(letters | kSigns | kSpaces, text, at)) {
    const size_t after = next(text, at);
    if (is_in(letters, text, after)) break;
    at = after;
  }
  return at;
}

// 一-龥 and the Japanese syllables.
bool is_east_asian(std::string_view text, size_t at) {
  if (at >= text.size() || static_cast<unsigned char>(text[at]) < 0xe3) return false;
  const uint32_t code = next_utf8(text, at);
  return (code >= 0x4e00 && code <= 0x9fa5) || (code >= 0x3040 && code <= 0x30ff);
}

}  // namespace

size_t part_end(Words words, std::string_view text, size_t start) {
  const bool triples = words == Words::minicpm5 || words == Words::deepseek3;
  if (!triples && words != Words::gpt2_digits) return text.size();
  if (is_in(kNumbers, text, start)) return run_end(text, start, kNumbers, triples ? 3 : 1);
  if (words != Words::deepseek3) return run_end(text, start, ~kNumbers);
  const bool east_asian = is_east_asian(text, start);
  size_t at = start;
  while (at < text.size() && is_east_asian(text, at) == east_asian && !is_in(kNumbers, text, at))
    next_utf8(text, at);
  return at;
}

size_t word_end(Words words, std::string_view text, size_t start) {
  switch (words) {
    case Words::gpt2:
    case Words::gpt2_digits:
      return gpt2_word_end(text, start);
    case Words::llama3:
      return llama3_word_end(text, start, {kLetters, 3});
    case Words::qwen2:
      return llama3_word_end(text, start, {kLetters, 1});
    case Words::minicpm5:
      return llama3_word_end(text, start, {kLetters, SIZE_MAX});
    case Words::qwen35:
      return llama3_word_end(text, start, {kLetters | kMarks, 1});
    case Words::gpt4o:
      return llama3_word_end(text, start, {kLetters, 3, true, false, true, true});
    case Words::tekken:
      return llama3_word_end(text, start, {kLetters, 1, true, false, false, true});
    case Words::deepseek3:
      return deepseek3_word_end(text, start);
    case Words::bert:
      return bert_word_end(text, start);
    case Words::whole:
    case Words::spaces:
    case Words::count:
      break;
  }
  return text.size();
}

}  // namespace pocketslm
