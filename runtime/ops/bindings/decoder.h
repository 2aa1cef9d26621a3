// The whole decoder as one operator without state, which each framework's binding wraps: tokens and
// the caller's key and value tensors in, logits out.
#pragma once

#include <cstddef>
#include <cstdint>
#include <mutex>
#include <string>
#include <vector>

#include "pocketslm.h"

namespace pocketslm {

class Decoder {
 public:
  Decoder() = default;
  ~Decoder();
  Decoder(const Decoder&) = delete;
  Decoder& operator=(const Decoder&) = delete;

  // These return an empty string, or one line that says what was wrong. `model` is a model.slm in
  // memory and must outlive this; 0 threads means one per CPU, at most 8.
  std::string open(const void* model, size_t bytes, uint32_t threads);

  struct Step {
    const int64_t* tokens;
    size_t count;
    size_t past;                 // positions filled before
    std::vector<void*> caches;   // keys and values by state, fp16 [kv_heads][positions][head_dim]
    size_t positions;
    size_t rows;                 // of logits, for the last tokens
    float* logits;               // [rows][output_size]
  };
  std::string run(const Step& step);

  const pslm_model_info& info() const { return info_; }
  // The shape of a pair of caches.
  struct Shape {
    uint32_t kv_heads, head_dim;
  };
  Shape shape(size_t state) const {
    pslm_state_info info{};
    pslm_model_state(model_, static_cast<uint32_t>(state), &info);
    return {info.sizes[0], info.sizes[1]};
  }

 private:
  std::mutex mutex_;
  pslm_model* model_ = nullptr;
  pslm_session* session_ = nullptr;
  pslm_model_info info_{};
  std::vector<int32_t> tokens_;
};

}  // namespace pocketslm
