// BPE over bytes or over SentencePiece's characters, WordPiece or Unigram, from the section that
// export packed out of a tokenizer.json.
#pragma once

#include <cstdint>
#include <limits>
#include <string>
#include <string_view>
#include <vector>

#include "words.h"

namespace pocketslm {

// Text of a prompt, and whether the text of special tokens in it means those tokens.
struct TextPart {
  std::string_view text;
  bool special;
};

class Tokenizer {
 public:
  // Empty, or what is wrong with the section. The bytes must outlive the tokenizer.
  std::string load(const void* data, size_t bytes, uint32_t vocabulary);
  bool loaded() const { return count_ != 0; }

  // Neighbouring parts are one text. Takes time in proportion to it, or to n log n of a word.
  // `start`: nothing stands before them.
  void encode(const std::vector<TextPart>& parts, std::vector<int32_t>& out,
              bool start = true) const;
  // The same between what stands before and after a text that is not a chat, commonly the
  // beginning-of-sequence token; an encoder has two. Of a text of more than `most` tokens with
  // these, the first ones are kept.
  void encode_whole(TextPart text, std::vector<int32_t>& out,
                    size_t most = std::numeric_limits<size_t>::max()) const;

  // Whether texts have to come to encode_normalized(), as those of a Unigram do.
  bool takes_normalized() const { return words_ == Words::unigram; }
  // Of a text that is normalized, between added tokens. `special`: pieces that are special tokens
  // mean them.
  void encode_normalized(TextPart text, std::vector<int32_t>& out, bool start) const;

  // Token i is bytes[offsets[i]] up to bytes[offsets[i + 1]].
  void pieces(const char** bytes, const uint32_t** offsets, size_t* count) const {
    *bytes = text_, *offsets = offsets_, *count = count_;
  }
  // The bytes of one token; empty for special ones.
  std::string_view bytes(int32_t token) const;
  // Whether one space at the start of an answer is the tokenizer's and not the text's.
  bool strips_space() const { return flags_ & kStripSpace; }

 private:
  enum Flag : uint32_t {
    kWholeWords = 1,    // a word that is in the vocabulary is not merged
    kNfc = 2,           // text is normalized to NFC
    kSpaceAlways = 4,   // a space goes before each text
    kSpaceAtStart = 8,  // a space goes before a prompt's first text, if it has none
    kStripSpace = 16,
    kClean = 32,  // of BertNormalization, to the end
    kIdeographs = 64,
    kStripAccents = 128,
    kLowercase = 256,
    kSplitSpaces = 512,  // of a Unigram: white space goes, and each word has a space before it
  };
  enum AddedFlag : uint32_t {
    kSpecial = 1,
    kTakesSpaceBefore = 2,  // white space before it goes with it
    kTakesSpaceAfter = 4,
    kMarked = 8,  // its spaces are marks in a text
  };
  struct Merge {
    uint32_t left, right, rank, result;
  };
  struct Added {
    uint32_t token, flags;
    std::string name;
  };

  struct Encoding;
  struct Best {  // the cut with the highest sum of scores up to a place, and its last piece
    double sum = 0;
    size_t start = 0;
    int32_t token = -1;  // none yet
  };

  void encode_text(std::string text, bool start, Encoding& encoding) const;
  size_t marked_word_end(std::string_view text, size_t start) const;
  void merge_word(std::string_view word, std::vector<int32_t>& out) const;
  void find_pieces(std::string_view word, std::vector<int32_t>& out) const;
  std::string check_pieces(uint32_t indexed);
  double score(size_t indexed) const;
  std::string marked(std::string_view text, bool start) const;
  void cut(std::string_view word, bool special, std::vector<Best>& best,
           std::vector<int32_t>& out) const;
  void merge(const std::vector<int32_t>& tokens, std::vector<int32_t>& out) const;
  bool is_marked() const { return words_ == Words::whole || words_ == Words::spaces; }
  const Merge* find(int32_t left, int32_t right) const;
  const Added* added_at(std::string_view text) const;
  int32_t token_of(std::string_view text) const;
  std::string_view stored(uint32_t token) const;

  uint32_t count_ = 0, index_count_ = 0, flags_ = 0;
  uint32_t unknown_ = 0, longest_ = 0;  // WordPiece's: the unknown token, characters of a word
  Words words_ = Words::gpt2;
  const uint32_t* offsets_ = nullptr;
  const Merge* merges_ = nullptr;      // by left and right
  std::vector<uint32_t> first_merge_;  // of each left token, and the end
  const uint32_t* index_ = nullptr;    // tokens by their bytes
  const uint32_t* byte_tokens_ = nullptr;
  // Unigram's: scores of the tokens in `index_` and of an unknown one, and where the tokens stand
  // there that begin with each byte.
  const uint32_t* scores_ = nullptr;
  uint32_t first_indexed_[257] = {};
  const char* text_ = nullptr;
  std::vector<int32_t> prefix_, suffix_;
  std::vector<Added> added_;       // by name
  bool added_leads_[256] = {};     // bytes that an added token begins with
  bool merges_a_space_[256] = {};  // bytes that some merge puts a space after
  std::vector<bool> is_special_;
};

}  // namespace pocketslm
