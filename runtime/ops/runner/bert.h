// BERT's text: what its normalizer makes of one, and where its words end.
#pragma once

#include <cstddef>
#include <string>
#include <string_view>

namespace pocketslm {

struct BertNormalization {
  bool clean;           // controls are left out, white space becomes spaces
  bool ideographs;      // are set apart with spaces
  bool strip_accents;   // after canonical decomposition
  bool lowercase;
};

std::string bert_normalized(std::string_view text, const BertNormalization& options);

// The end of the word or of the white space from `start` on; a sign is a word by itself.
size_t bert_word_end(std::string_view text, size_t start);

}  // namespace pocketslm
