#include "kv_cache.h"

#include <cstring>

namespace pocketslm {
namespace {

std::vector<size_t> heads_before(const ModelFile& model) {
  std::vector<size_t> first{0};
  for (const Layer& layer : model.layers) first.push_back(first.back() + layer.kv_heads);
  return first;
}

}  // namespace

KvCache::KvCache(const ModelFile& model, const Kernels& kernels, size_t context, pslm_kv_type type)
    : kernels_(kernels),
      type_(type),
      first_(heads_before(model)),
      head_dim_(model.config.head_dim),
      width_(type == PSLM_KV_I8 ? 1 : 2),
      positions_(round_up(context, kPositionBlock)),
      places_(2 * model.layers.size()),
      data_(type == PSLM_KV_CALLER ? 0 : first_.back() * 2 * head_elements() * width_),
      scales_(type == PSLM_KV_I8 ? first_.back() * 2 * positions_ : 0) {
  if (type == PSLM_KV_CALLER) return;
  uint8_t* next = data_.data();
  for (size_t i = 0; i < places_.size(); ++i) {
    places_[i] = next;
    next += (first_[i / 2 + 1] - first_[i / 2]) * head_elements() * width_;
  }
}

void KvCache::bind(void* const* places, size_t positions) {
  for (size_t i = 0; i < places_.size(); ++i) places_[i] = static_cast<uint8_t*>(places[i]);
  positions_ = positions;
}

void KvCache::store(size_t layer, size_t head, size_t position, const float* key,
                    const float* value) {
  uint8_t* keys = this->keys(layer, head);
  uint8_t* values = this->values(layer, head) + position * head_dim_ * width_;
  const size_t at =
      position / kPositionBlock * kPositionBlock * head_dim_ + position % kPositionBlock;
  if (type_ != PSLM_KV_I8) {
    uint16_t half[1024];  // head_dim is at most this
    kernels_.to_f16(key, head_dim_, half);
    uint16_t* column = reinterpret_cast<uint16_t*>(keys) + at;
    for (size_t d = 0; d < head_dim_; ++d) column[d * kPositionBlock] = half[d];
    kernels_.to_f16(value, head_dim_, reinterpret_cast<uint16_t*>(values));
  } else {
    int8_t codes[1024];
    float* scales = scales_.data() + scale_index(layer, head);
    scales[position] = kernels_.to_i8(key, head_dim_, codes);
    for (size_t d = 0; d < head_dim_; ++d)
      keys[at + d * kPositionBlock] = static_cast<uint8_t>(codes[d]);
    scales[positions_ + position] =
        kernels_.to_i8(value, head_dim_, reinterpret_cast<int8_t*>(values));
  }
}

void KvCache::describe(size_t layer, size_t head, AttentionJob& job) const {
  job.keys = keys(layer, head);
  job.values = values(layer, head);
  const float* scales = scales_.data();
  job.key_scales = scales ? scales + scale_index(layer, head) : nullptr;
  job.value_scales = scales ? scales + scale_index(layer, head) + positions_ : nullptr;
}

// Calls copy(pointer, bytes) for every run of bytes that belongs to the first positions. Whole key
// blocks are saved: what lies past the last position is never read before it is overwritten.
template <typename Copy>
void KvCache::visit_saved(size_t positions, Copy&& copy) const {
  const size_t key_bytes = round_up(positions, kPositionBlock) * head_dim_ * width_;
  for (size_t layer = 0; layer + 1 < first_.size(); ++layer)
    for (size_t head = 0; head < first_[layer + 1] - first_[layer]; ++head) {
      AttentionJob part{};
      describe(layer, head, part);
      copy(part.keys, key_bytes);
      copy(part.values, positions * head_dim_ * width_);
      if (!part.key_scales) continue;
      copy(part.key_scales, positions * sizeof(float));
      copy(part.value_scales, positions * sizeof(float));
    }
}

size_t KvCache::saved_bytes(size_t positions) const {
  size_t total = 0;
  visit_saved(positions, [&](const void*, size_t bytes) { total += bytes; });
  return total;
}

void KvCache::save(size_t positions, uint8_t* out) const {
  visit_saved(positions, [&](const void* p, size_t bytes) {
    std::memcpy(out, p, bytes);
    out += bytes;
  });
}

void KvCache::restore(size_t positions, const uint8_t* in) {
  visit_saved(positions, [&](const void* p, size_t bytes) {
    std::memcpy(const_cast<void*>(p), in, bytes);
    in += bytes;
  });
}

}  // namespace pocketslm
