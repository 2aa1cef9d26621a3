// How the families' pre-tokenizers cut a text into the words that BPE merges within.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string_view>

namespace pocketslm {

// As in export/lower/native_tokenizer.py. `whole` and `spaces` are SentencePiece's, `bert` is
// WordPiece's, `unigram` that of the model of this name.
enum class Words : uint32_t {
  gpt2,
  gpt2_digits,
  llama3,
  qwen2,
  whole,
  spaces,
  minicpm5,
  qwen35,
  gpt4o,
  tekken,
  deepseek3,
  bert,
  unigram,
  count
};

// The end of the part from `start` on that words do not cross: numbers, in some families, are cut
// out before words are looked for.
size_t part_end(Words words, std::string_view text, size_t start);

// The end of the word from `start` on, of a text that is one such part. Not for `whole`, `spaces` and `unigram`.
// One word after the other, a text is read a bounded number of times.
size_t word_end(Words words, std::string_view text, size_t start);

}  // namespace pocketslm
