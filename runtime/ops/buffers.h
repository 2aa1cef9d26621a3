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

// Memory for quantized activations, tile after tile, of up to `capacity` rows of `max_cols`.
class Panel {
 public:
  Panel() = default;
  Panel(size_t capacity, size_t max_cols)
      : codes_(capacity * max_cols),
        scales_(capacity * max_cols / kGroup),
        sums_(capacity * max_cols / kGroup),
        corrections_(capacity * max_cols / kGroup),
        upper_(capacity * max_cols / kGroup) {}

 private:
  friend struct PanelView;
  Buffer<int8_t> codes_;
  Buffer<float> scales_, sums_;
  Buffer<int32_t> corrections_, upper_;
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
            panel->codes_.data() + first * cols,
            panel->scales_.data() + at,
            panel->sums_.data() + at,
            panel->corrections_.data() + at,
            panel->upper_.data() + at};
  }
  // Where group `group` of token `token` of the tile that starts at `first` goes.
  QuantizedRow row(size_t first, size_t token, size_t group) const {
    const size_t width = tile_size(tokens - first);
    const size_t at = first * (cols / kGroup) + group * width + token;
    return {width, token, panel->codes_.data() + first * cols + (group * width + token) * kGroup,
            panel->scales_.data() + at, panel->sums_.data() + at, panel->corrections_.data() + at,
            panel->upper_.data() + at};
  }
};

}  // namespace pocketslm
