#include "state.h"

#include <algorithm>
#include <cstring>

namespace pocketslm {

States::States(const Program& program, const Kernels& kernels, size_t context, pslm_kv_type type,
               size_t beside_window)
    : kernels_(kernels), type_(type), width_(type == PSLM_KV_I8 ? 1 : 2) {
  size_t bytes = 0, scales = 0, columns = 0;
  const size_t all = positions_ = round_up(context, kPositionBlock);
  for (const StateRecord& s : program.states) {
    Kept kept{static_cast<StateKind>(s.kind), s.sizes[0], s.sizes[1], s.sizes[2], all, 0, 0,
              nullptr,                        nullptr};
    if (kept.kind == StateKind::conv) {
      kept = {StateKind::conv, 1, s.sizes[0], s.sizes[1], 0, 0, columns, nullptr, nullptr};
      columns += s.sizes[0] * (s.sizes[1] - 1);
    } else {
      if (kept.window && type != PSLM_KV_CALLER)
        kept.room = std::min(all, round_up(kept.window + beside_window, window_piece(kept.window)));
      kept.offset = scales;
      scales += kept.heads * 2 * kept.room;
      bytes += 2 * kept.heads * head_elements(kept) * width_;
    }
    kept_.push_back(kept);
  }
  columns_ = Buffer<float>(columns);
  if (type == PSLM_KV_I8) scales_ = Buffer<float>(scales);
  if (type == PSLM_KV_CALLER) return;
  data_ = Buffer<uint8_t>(bytes);
  uint8_t* next = data_.data();
  for (Kept& kept : kept_) {
    if (kept.kind != StateKind::kv) continue;
    const size_t part = kept.heads * head_elements(kept) * width_;
    kept.keys = next, kept.values = next + part;
    next += 2 * part;
  }
}

size_t States::kv_states() const {
  return static_cast<size_t>(std::count_if(kept_.begin(), kept_.end(), [](const Kept& kept) {
    return kept.kind == StateKind::kv;
  }));
}

void States::bind(void* const* places, size_t positions) {
  for (Kept& kept : kept_) {
    if (kept.kind != StateKind::kv) continue;
    kept.keys = static_cast<uint8_t*>(*places++);
    kept.values = static_cast<uint8_t*>(*places++);
    kept.room = positions;
  }
}

void States::store(size_t state, size_t head, size_t position, const float* key,
                   const float* value) {
  const Kept& kept = kept_[state];
  const size_t dim = kept.head_dim;
  const size_t place = place_of(state, position);
  const size_t block = place / kPositionBlock * kPositionBlock * dim, in_block = place % kPositionBlock;
  uint8_t* keys = kept.keys + (head * head_elements(kept) + block) * width_;
  uint8_t* values = kept.values + head * head_elements(kept) * width_;
  if (type_ != PSLM_KV_I8) {
    uint16_t half[kMaxHeadDim];
    kernels_.to_f16(key, dim, half);
    uint16_t* column = reinterpret_cast<uint16_t*>(keys) + in_block;
    for (size_t d = 0; d < dim; ++d) column[d * kPositionBlock] = half[d];
    kernels_.to_f16(value, dim, reinterpret_cast<uint16_t*>(values) + place * dim);
    return;
  }
  int8_t codes[kMaxHeadDim];
  float* scales = scales_.data() + kept.offset + head * 2 * kept.room;
  scales[place] = kernels_.to_i8(key, dim, codes);
  for (size_t d = 0; d < dim; d += 4)
    std::memcpy(keys + d * kPositionBlock + 4 * in_block, codes + d, 4);
  scales[kept.room + place] = kernels_.to_i8(value, dim, codes);
  values += place / 4 * 4 * dim + place % 4;
  for (size_t d = 0; d < dim; ++d) values[4 * d] = static_cast<uint8_t>(codes[d]);
}

void States::describe(size_t state, size_t head, AttentionJob& job) const {
  const Kept& kept = kept_[state];
  const float* scales = scales_.data();
  job.keys = kept.keys + head * head_elements(kept) * width_;
  job.values = kept.values + head * head_elements(kept) * width_;
  job.key_scales = scales ? scales + kept.offset + head * 2 * kept.room : nullptr;
  job.value_scales = scales ? job.key_scales + kept.room : nullptr;
}

const void* States::keys_at(size_t state, size_t head, size_t position) const {
  const Kept& kept = kept_[state];
  const size_t elements = head * head_elements(kept) + place_of(state, position) * kept.head_dim;
  return kept.keys + elements * width_;
}

void States::touch(size_t state, size_t head, size_t begin, size_t end) const {
  const Kept& kept = kept_[state];
  const size_t first = (head * head_elements(kept) + place_of(state, begin) * kept.head_dim) * width_;
  for (size_t at = 0; at < (end - begin) * kept.head_dim * width_; at += kPageLines * 64) {
    __builtin_prefetch(kept.keys + first + at, 0, 2);
    __builtin_prefetch(kept.values + first + at, 0, 2);
  }
}

void States::expect(size_t state, size_t head, size_t position) const {
  const Kept& kept = kept_[state];
  const size_t dim = kept.head_dim, place = place_of(state, position);
  const size_t key = place / kPositionBlock * kPositionBlock, value = place / 4 * 4;
  const uint8_t* keys = kept.keys + (head * head_elements(kept) + key * dim) * width_;
  for (size_t at = 0; at < kPositionBlock * dim * width_; at += 64) __builtin_prefetch(keys + at, 1, 2);
  const uint8_t* values = kept.values + (head * head_elements(kept) + value * dim) * width_;
  for (size_t at = 0; at < 4 * dim * width_; at += 64) __builtin_prefetch(values + at, 1, 2);
}

void States::advance(size_t length) {
  for (Kept& kept : kept_)
    if (kept.kind == StateKind::kv && length > kept.room)
      kept.first = std::max(kept.first, length - kept.room);
  // All heads fill at the same pace, so that small pages hold only what is there. Half full, large
  // ones take at most twice that.
  if (in_large_pages_ || 2 * length < positions_) return;
  in_large_pages_ = true;
  if (data_.bytes()) platform::use_large_pages(data_.data(), data_.bytes());
}

void States::forget() {
  for (Kept& kept : kept_) kept.first = 0;
}

size_t States::rewind_limit(size_t length) const {
  size_t limit = 1;
  for (const Kept& kept : kept_) {
    if (kept.kind == StateKind::conv) limit = length;
    // What is saved there begins with a whole block, none of whose positions may be overwritten.
    if (kept.first)
      limit = std::max(limit, round_up(kept.first, kPositionBlock) + kept.window - 1);
  }
  return std::min(limit, length);
}

size_t States::saved_from(const Kept& kept, size_t count) {
  return kept.window && count >= kept.window
             ? (count - kept.window + 1) / kPositionBlock * kPositionBlock
             : 0;
}

// Calls copy(pointer, bytes) for every run of bytes that belongs to the first positions, or to the
// last of these that a window needs. Whole blocks of keys, or fours of int8 values, are saved: what
// lies past the last position counts for nothing until it is overwritten.
template <typename Copy>
void States::visit_saved(size_t count, Copy&& copy) const {
  if (!count) return;
  for (size_t state = 0; state < kept_.size(); ++state) {
    const Kept& kept = kept_[state];
    const size_t dim = kept.head_dim;
    if (kept.kind == StateKind::conv) {
      copy(columns_.data() + kept.offset, (kept.window - 1) * dim * sizeof(float));
      continue;
    }
    for (size_t head = 0; head < kept.heads; ++head) {
      AttentionJob part{};
      describe(state, head, part);
      for (size_t at = saved_from(kept, count); at < count;) {
        const size_t place = at % kept.room, live = std::min(count - at, kept.room - place);
        copy(static_cast<const uint8_t*>(part.keys) + place * dim * width_,
             round_up(live, kPositionBlock) * dim * width_);
        copy(static_cast<const uint8_t*>(part.values) + place * dim * width_,
             round_up(live, type_ == PSLM_KV_I8 ? 4 : 1) * dim * width_);
        if (part.key_scales) {
          copy(part.key_scales + place, live * sizeof(float));
          copy(part.value_scales + place, live * sizeof(float));
        }
        at += live;
      }
    }
  }
}

size_t States::saved_bytes(size_t count) const {
  size_t total = 0;
  visit_saved(count, [&](const void*, size_t bytes) { total += bytes; });
  return total;
}

void States::save(size_t count, uint8_t* out) const {
  visit_saved(count, [&](const void* p, size_t bytes) {
    std::memcpy(out, p, bytes);
    out += bytes;
  });
}

void States::restore(size_t count, const uint8_t* in) {
  visit_saved(count, [&](const void* p, size_t bytes) {
    std::memcpy(const_cast<void*>(p), in, bytes);
    in += bytes;
  });
  for (Kept& kept : kept_) kept.first = saved_from(kept, count);
}

}  // namespace pocketslm
