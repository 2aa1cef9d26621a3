// A context that grows: the forward pass over a model file, its buffers and its KV cache.
#pragma once

#include <utility>
#include <vector>

#include "buffers.h"
#include "kernels.h"
#include "kv_cache.h"
#include "model_file.h"
#include "operator_clock.h"
#include "thread_pool.h"

namespace pocketslm {

constexpr size_t kBatch = 256;         // tokens of a prompt that go through a layer together
constexpr size_t kScratchBlocks = 16;  // blocks of 16 outputs that a matmul call may fill

class Session {
 public:
  Session(const ModelFile& model, const Kernels& kernels, size_t context, pslm_kv_type kv_type,
          unsigned threads, bool pin);

  // Arguments are checked by the caller; logits as in pslm_forward.
  void forward(const int32_t* tokens, size_t count, pslm_logits which, float* logits);
  int32_t step_greedy(int32_t token);

  const ModelFile& model() const { return model_; }
  const Kernels& kernels() const { return kernels_; }
  KvCache& cache() { return cache_; }
  const KvCache& cache() const { return cache_; }
  OperatorClock& clock() { return clock_; }
  const OperatorClock& clock() const { return clock_; }
  unsigned threads() const { return pool_.size(); }
  size_t context() const { return context_; }
  size_t length() const { return length_; }
  void set_length(size_t length) { length_ = length; }
  // PSLM_KV_CALLER: see pslm_bind_cache.
  void bind_cache(void* const* places, size_t positions);

 private:
  // What one thread needs for itself.
  struct Member {
    Buffer<float> normed;     // one token's activations, up to the widest
    Panel panel;              // the same, quantized
    Buffer<float> outputs;    // [tile][blocks * 16] of a matmul, twice: gate and up
    Buffer<float> queries;    // [12][head_dim]
    Buffer<float> attended;   // [12][head_dim]
    // The weights of this thread's share in the order of reading, and where each phase starts.
    std::vector<ReadSpan> spans;
    std::vector<std::pair<const ReadSpan*, uint64_t>> phases;  // span, lines before it
    ReadAhead ahead{};
    float best_logit = 0;
    int32_t best_token = 0;
  };
  enum class Head { none, last_logits, all_logits, greedy };

  void run(const int32_t* tokens, size_t count, Head head, float* logits);
  void prepare_rotation(size_t count);
  void layer(unsigned m, const Layer& layer, size_t index);
  void attend_one(unsigned m, size_t index);
  void attend_many(unsigned m, size_t index);
  void rotate(float* head, size_t token) const;
  void prepare_queries(size_t token, const float* q, size_t heads, float* out);
  void run_head(unsigned m, Head head, float* logits);

  const Panel& normalized_row(unsigned m, const float* x, const float* weight);
  const Panel& normalized(unsigned m, const float* weight);
  const Panel& attention_output(unsigned m, const Layer& layer);
  template <typename Sink>
  void project(unsigned m, const Matrix& w, const Panel& panel, Sink&& sink);
  template <typename Sink>
  void project_blocks(unsigned m, const Matrix& w, const Panel& panel, size_t begin, size_t end,
                      Sink&& sink);
  void add_projection(unsigned m, const Matrix& w, const Panel& panel);
  template <typename F>
  void share(unsigned m, size_t total, size_t chunk, F&& f);
  void barrier(unsigned m);
  size_t chunk(size_t total, size_t unit_bytes) const;
  void plan_reading(unsigned m);
  void start_phase(unsigned m, size_t phase);
  void mark(unsigned m, uint64_t pslm_times::* counter) {
    if (m == 0) clock_.mark(counter);
  }

  const ModelFile& model_;
  const Kernels& kernels_;
  size_t context_;
  size_t length_ = 0;
  KvCache cache_;

  // State of the batch in progress, [token][...].
  size_t count_ = 0;
  uint64_t runs_ = 0;  // passes over all weights so far
  Buffer<float> x_, normed_, q_, k_, v_, attended_, hidden_;
  Buffer<float> cosines_, sines_;
  Panel panel_, hidden_panel_;
  // Attention of one token is cut into spans of positions; the pieces, [head][span].
  size_t span_ = 0, spans_ = 0;
  Buffer<float> piece_out_, piece_maximum_, piece_weight_;

  OperatorClock clock_;
  std::vector<Member> members_;
  ThreadPool pool_;
};

}  // namespace pocketslm
