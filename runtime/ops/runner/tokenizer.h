// Byte-level BPE from the section that export packed out of a tokenizer.json.
#pragma once

#include <cstdint>
#include <string>
#include <string_view>
#include <unordered_map>
#include <vector>

namespace pocketslm {

class Tokenizer {
 public:
  // Empty, or what is wrong with the section. The bytes must outlive the tokenizer.
  std::string load(const void* data, size_t bytes, uint32_t vocabulary);
  bool loaded() const { return count_ != 0; }

  // With `special`, the text of special tokens becomes those tokens.
  void encode(std::string_view text, bool special, std::vector<int32_t>& out) const;

  // The bytes of one token; empty for special ones.
  std::string_view bytes(int32_t token) const;

 private:
  struct Merge {
    uint32_t rank;
    int32_t result;
  };

  void encode_plain(std::string_view text, std::vector<int32_t>& out) const;
  void encode_words(std::string_view text, std::vector<int32_t>& out) const;
  void merge_word(std::string_view word, std::vector<int32_t>& out) const;
  const Merge* find(int32_t left, int32_t right) const;
  std::string_view stored(uint32_t token) const;

  uint32_t count_ = 0;
  bool split_digits_ = false;
  const uint32_t* offsets_ = nullptr;
  const char* text_ = nullptr;
  int32_t byte_tokens_[256] = {};
  std::unordered_map<uint64_t, Merge> merges_;
  std::vector<int32_t> special_;
  std::vector<bool> is_special_;
};

}  // namespace pocketslm
