// Keys and values of one session. Keys lie in blocks of 16 positions, [head_dim][16], so that a
// query row meets 16 positions in one vector; values lie by position.
#pragma once

#include <cstdint>
#include <vector>

#include "buffers.h"
#include "model_file.h"

namespace pocketslm {

class KvCache {
 public:
  // PSLM_KV_CALLER: fp16 in memory that bind() names.
  KvCache(const ModelFile& model, const Kernels& kernels, size_t context, pslm_kv_type type);

  // Keys and values of each layer in turn, [kv_heads][positions][head_dim] each.
  void bind(void* const* places, size_t positions);

  size_t bytes() const { return data_.bytes() + scales_.bytes(); }
  pslm_kv_type type() const { return type_; }

  // Stores one head's key (already rotated) and value.
  void store(size_t layer, size_t head, size_t position, const float* key, const float* value);

  // Fills the cache's part of a job over positions from 0 on.
  void describe(size_t layer, size_t head, AttentionJob& job) const;

  size_t saved_bytes(size_t positions) const;
  void save(size_t positions, uint8_t* out) const;
  void restore(size_t positions, const uint8_t* in);

 private:
  // Elements of one head's keys or values; scales of the same.
  size_t head_elements() const { return positions_ * head_dim_; }
  uint8_t* keys(size_t layer, size_t head) const {
    return places_[2 * layer] + head * head_elements() * width_;
  }
  uint8_t* values(size_t layer, size_t head) const {
    return places_[2 * layer + 1] + head * head_elements() * width_;
  }
  size_t scale_index(size_t layer, size_t head) const {
    return (first_[layer] + head) * 2 * positions_;
  }
  template <typename Copy>
  void visit_saved(size_t positions, Copy&& copy) const;

  const Kernels& kernels_;
  const pslm_kv_type type_;
  const std::vector<size_t> first_;  // KV heads before each layer's, then all
  const size_t head_dim_, width_;
  size_t positions_;              // room for each head
  std::vector<uint8_t*> places_;  // keys and values of each layer, [head][positions][head_dim]
  Buffer<uint8_t> data_;   // [layer]{keys, values}, fp16 or int8
  Buffer<float> scales_;   // int8 only: [layer][head]{keys, values}[position]
};

}  // namespace pocketslm
