// Memory of a session: page-aligned, zero until touched, and resident only where touched.
#pragma once

#include <sys/mman.h>

#include <cstddef>
#include <cstdint>
#include <new>

#include "kernels.h"

namespace pocketslm {

template <typename T>
class Buffer {
 public:
  Buffer() = default;
  explicit Buffer(size_t count) : count_(count) {
    if (!count) return;
    void* p = mmap(nullptr, bytes(), PROT_READ | PROT_WRITE,
                   MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (p == MAP_FAILED) throw std::bad_alloc();
    data_ = static_cast<T*>(p);
  }
  ~Buffer() {
    if (data_) munmap(data_, bytes());
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

// Quantized activations of up to `capacity` tokens, tile after tile.
class Panel {
 public:
  Panel() = default;
  Panel(size_t capacity, size_t max_cols)
      : codes_(capacity * max_cols),
        scales_(capacity * max_cols / kGroup),
        sums_(capacity * max_cols / kGroup),
        corrections_(capacity * max_cols / kGroup) {}

  // The matrix that the panel holds now: `values` are its float rows.
  void describe(size_t tokens, size_t cols, const float* values) {
    tokens_ = tokens;
    cols_ = cols;
    values_ = values;
  }
  size_t tokens() const { return tokens_; }
  const float* values(size_t token) const { return values_ + token * cols_; }

  ActivationTile tile(size_t first) const {
    const size_t at = first * (cols_ / kGroup);
    return {tile_size(tokens_ - first),  values_ + first * cols_, cols_,
            codes_.data() + first * cols_, scales_.data() + at,   sums_.data() + at,
            corrections_.data() + at};
  }
  // Where group `group` of token `token` of the tile that starts at `first` goes.
  QuantizedRow row(size_t first, size_t token, size_t group) {
    const size_t width = tile_size(tokens_ - first);
    const size_t at = first * (cols_ / kGroup) + group * width + token;
    return {width, codes_.data() + first * cols_ + (group * width + token) * kGroup,
            scales_.data() + at, sums_.data() + at, corrections_.data() + at};
  }

 private:
  Buffer<int8_t> codes_;
  Buffer<float> scales_, sums_;
  Buffer<int32_t> corrections_;
  const float* values_ = nullptr;
  size_t tokens_ = 0, cols_ = 0;
};

}  // namespace pocketslm
