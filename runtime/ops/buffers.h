// Memory of a session: page-aligned, zero until touched, and resident only where touched.
#pragma once

#include <cstddef>
#include <cstdint>

#include "kernels.h"
#include "platform.h"

namespace pocketslm {

template <typename T>
class Buffer {
 public:
  Buffer() = default;
  explicit Buffer(size_t count) : count_(count) {
    if (count) data_ = static_cast<T*>(platform::reserve_pages(bytes()));
  }
  ~Buffer() {
    if (data_) platform::release_pages(data_, bytes());
  }
  Buffer(Buffer&& other) noexcept { *this = static_cast<Buffer&&>(other); }
  Buffer& operator=(Buffer&& other) noexcept {
    T* data = data_;
    const size_t count = count_;
    data_ = other.data_, count_ = other.count_;
    other.data_ = data, other.count_ = count;
    return *this;
  }

  T* data() { return data_; }
  const T* data() const { return data_; }
  T& operator[](size_t i) { return data_[i]; }
  size_t bytes() const { return count_ * sizeof(T); }

 private:
  T* data_ = nullptr;
  size_t count_ = 0;
};

// Memory for quantized activations, tile after tile, of up to `capacity` rows of `max_cols`: its own
// or the caller's, aligned to 64 bytes.
class Panel {
 public:
  Panel() = default;
  Panel(size_t capacity, size_t max_cols) : own_(bytes(capacity, max_cols)) {
    lie_at(own_.data(), capacity, max_cols);
  }
  Panel(uint8_t* memory, size_t capacity, size_t max_cols) { lie_at(memory, capacity, max_cols); }

  static size_t bytes(size_t capacity, size_t max_cols) {
    return round_up(capacity * max_cols, 64) + 4 * group_bytes(capacity, max_cols);
  }

 private:
  friend struct PanelView;
  // Of four bytes for each group.
  static size_t group_bytes(size_t capacity, size_t max_cols) {
    return round_up(capacity * max_cols / kGroup * 4, 64);
  }
  void lie_at(uint8_t* memory, size_t capacity, size_t max_cols) {
    const size_t step = group_bytes(capacity, max_cols);
    codes_ = reinterpret_cast<int8_t*>(memory);
    memory += round_up(capacity * max_cols, 64);
    scales_ = reinterpret_cast<float*>(memory);
    sums_ = reinterpret_cast<float*>(memory + step);
    corrections_ = reinterpret_cast<int32_t*>(memory + 2 * step);
    upper_ = reinterpret_cast<int32_t*>(memory + 3 * step);
  }

  Buffer<uint8_t> own_;
  int8_t* codes_ = nullptr;
  float *scales_ = nullptr, *sums_ = nullptr;
  int32_t *corrections_ = nullptr, *upper_ = nullptr;
};

// A matrix [tokens, cols] of activations: its float rows, and its quantized form in a panel.
struct PanelView {
  Panel* panel;
  size_t tokens, cols;
  const float* rows;

  const float* values(size_t token) const { return rows + token * cols; }
  ActivationTile tile(size_t first) const {
    const size_t at = first * (cols / kGroup);
    return {tile_size(tokens - first),
            rows + first * cols,
            cols,
            panel->codes_ + first * cols,
            panel->scales_ + at,
            panel->sums_ + at,
            panel->corrections_ + at,
            panel->upper_ + at};
  }
  // Where group `group` of token `token` of the tile that starts at `first` goes.
  QuantizedRow row(size_t first, size_t token, size_t group) const {
    const size_t width = tile_size(tokens - first);
    const size_t at = first * (cols / kGroup) + group * width + token;
    return {width, token, panel->codes_ + first * cols + (group * width + token) * kGroup,
            panel->scales_ + at, panel->sums_ + at, panel->corrections_ + at,
            panel->upper_ + at};
  }
};

}  // namespace pocketslm
