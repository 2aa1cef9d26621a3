// Contexts that grow: a model file's program run over tokens, its buffers, and the state of each
// context.
#pragma once

#include <algorithm>
#include <array>
#include <vector>

#include "buffers.h"
#include "kernels.h"
#include "low_rank.h"
#include "model_file.h"
#include "operator_clock.h"
#include "places.h"
#include "read_plan.h"
#include "state.h"
#include "thread_pool.h"

namespace pocketslm {

constexpr size_t kBatch = 128;         // tokens of a prompt that go through a layer together
constexpr size_t kTakenBack = 256;     // tokens that windows allow to take back at least
constexpr size_t kMaxWhole = 8192;     // the same where each of them sees all others
constexpr size_t kFewTokens = 8;       // whose attention is cut into pieces for threads
constexpr size_t kScratchBlocks = 16;  // blocks of 16 outputs that a matmul call may fill
constexpr size_t kMaxSlots = PSLM_MAX_SLOTS;
constexpr size_t kMaxAdapters = PSLM_MAX_ADAPTERS;
static_assert(kMaxSlots <= kMaxTile);

struct Candidate {
  float logit;
  int32_t token;
  // The higher logit comes first, of equals the lower token.
  bool operator<(const Candidate& other) const {
    return logit != other.logit ? logit > other.logit : token < other.token;
  }
};

// What threads do at a barrier: ask for a few lines between two looks at whether it is over.
struct ReadWhileWaiting {
  ReadAhead& ahead;
  void operator()() const {
    if (ahead.asked.lines < ahead.used + kMaxLeadLines) ask_lines(ahead, 4);
  }
};

class Session {
 public:
  Session(const ModelFile& model, const Kernels& kernels, size_t context, pslm_kv_type kv_type,
          unsigned threads, bool pin, size_t slots);

  // Arguments are checked by the caller; logits as in pslm_forward.
  void forward(const int32_t* tokens, size_t count, pslm_logits which, float* logits);
  // The most probable token after each of the last `following` of these; as pslm_forward_greedy.
  void forward_greedy(const int32_t* tokens, size_t count, size_t following,
                      const pslm_penalty* penalty, int32_t* next);
  // The `top` most probable tokens after these, with their logits; returns the logarithm of the sum
  // of exp over all logits.
  double forward_top(const int32_t* tokens, size_t count, size_t top, int32_t* best, float* logits);
  // As pslm_forward_slots.
  void forward_slots(pslm_entry* entries, size_t count);

  const ModelFile& model() const { return model_; }
  const Kernels& kernels() const { return kernels_; }
  const States& states() const { return used_->states; }
  // Of any slot, for what is the same in all of them and never changes.
  const States& shape() const { return contexts_.front().states; }
  size_t slots() const { return contexts_.size(); }
  OperatorClock& clock() { return clock_; }
  const OperatorClock& clock() const { return clock_; }
  unsigned threads() const { return pool_.size(); }
  size_t context() const { return context_; }
  size_t length() const { return used_->length; }
  size_t length(size_t slot) const { return contexts_[slot].length; }
  // The smallest length above 0 that truncate() accepts.
  size_t rewind_limit() const { return used_->rewind_limit(); }
  bool can_rewind(size_t length) const { return used_->can_rewind(length); }
  void truncate(size_t length) { used_->truncate(length); }
  size_t rewind_limit(size_t slot) const { return contexts_[slot].rewind_limit(); }
  bool can_rewind(size_t slot, size_t length) const { return contexts_[slot].can_rewind(length); }
  void truncate(size_t slot, size_t length) { contexts_[slot].truncate(length); }
  size_t slot() const { return static_cast<size_t>(used_ - contexts_.data()); }
  // What follows, and the calls above but forward_slots, mean this context.
  void use_slot(size_t slot) { used_ = &contexts_[slot]; }
  // The lengths of all slots, and the way back to them, or to 0 where a state has none.
  using Lengths = std::array<size_t, kMaxSlots>;
  Lengths lengths() const;
  void rewind(const Lengths& lengths);
  void save(size_t count, uint8_t* out) const { used_->states.save(count, out); }
  void restore(size_t count, const uint8_t* in);
  // Whether the last call's logits were, those of rows included that screening passed over.
  bool finite() const;
  // PSLM_KV_CALLER: see pslm_bind_cache; what the context is of that many positions.
  size_t context_of(size_t positions) const {
    return std::min<size_t>(positions / kPositionBlock * kPositionBlock, model_.config.max_context);
  }
  void bind_cache(void* const* places, size_t positions, size_t length);
  // Replaces an adapter, 1 to kMaxAdapters; slots that use it forget what came of other weights.
  void set_updates(size_t adapter, std::vector<StepUpdates> steps);
  bool has_adapter(size_t adapter) const {
    return adapter == 0 || (adapter <= kMaxAdapters && !adapters_[adapter].steps.empty());
  }
  // What the context takes from now on, 0: the weights as they are. It forgets what came of others.
  void use_adapter(size_t adapter);

 private:
  // One text.
  struct Context {
    States states;
    size_t length = 0;
    size_t adapter = 0;
    size_t rewind_limit() const { return states.rewind_limit(length); }
    bool can_rewind(size_t to) const { return to == 0 || (to <= length && to >= rewind_limit()); }
    void truncate(size_t to);
  };
  // Rows of the batch, from `first` on, whose tokens follow each other in a context.
  struct Run {
    Context* context;
    size_t first, count;
    size_t last() const { return first + count; }
    size_t position(size_t row) const { return context->length + row - first; }
  };
  // What the head looks for behind a token.
  struct Found {
    std::vector<Candidate> top;  // a heap of the highest logits
    Candidate best;              // the highest
    float peak = 0, sum = 0;     // of all logits: sum of exp(logit - peak)
  };
  // What one thread needs for itself.
  struct Member {
    Buffer<uint8_t> nibbles;  // of one block, read from the file
    Buffer<float> normed;     // activations of a tile of tokens, up to the widest
    Panel panel;              // the same, quantized
    Buffer<float> normed_row;  // of one token, while the tile's are in use
    Panel row_panel;
    Buffer<float> outputs;    // [tile][blocks * 16] of a matmul, twice: gate and up
    Buffer<float> queries;    // [12][head_dim]
    Buffer<float> attended;   // [12][head_dim]
    std::vector<float> lowered;  // of one token, as lowered_
    ReadPlan plan;
    uint64_t read_bytes = 0;  // of weights, since shares were balanced
    Found found[kMaxTile];  // of each token that the head is run over, in this thread's part
    bool finite = true;     // no logit was NaN or infinite
    // What screening a split head by its high nibbles takes of the activations: [group][token] of a
    // tile, and [token][group].
    std::vector<int32_t> corrections;
    std::vector<float> energies;
    std::vector<size_t> open;  // blocks that screening leaves to be judged by their rows
  };
  // What is wanted behind a token: where its logits go, or how many of the highest; 0: the best.
  struct Asked {
    float* logits;
    size_t top;
  };
  // asked: what `asked_` says.
  enum class Head { none, last_logits, all_logits, greedy, asked };

  void run(const int32_t* tokens, size_t count, Head head, float* logits);
  void begin(const int32_t* tokens, size_t count);
  void run_layers(unsigned m);
  void end();
  void embed(unsigned m, const int32_t* tokens, size_t begin, size_t end);
  void embed_row(unsigned m, const Matrix& w, size_t row, float* out);
  void rotation(size_t position, size_t row);
  void run_step(unsigned m, size_t index);
  void normalize_buffer(unsigned m, const Step& step);
  void project(unsigned m, const Step& step, size_t index);
  void attend(unsigned m, const Step& step);
  void add_projection(unsigned m, const Step& step, size_t index);
  void gated(unsigned m, const Step& step, size_t index);
  void short_conv(unsigned m, const Step& step);
  void trust_logits() {
    for (Member& member : members_) member.finite = true;
  }
  void run_head(unsigned m, Head head, float* logits);

  struct Seen {
    size_t begin, end;
  };
  struct Pieces {
    size_t first, count;
  };
  static Seen seen_by(const Step& step, const Run& run, size_t row);
  static size_t piece_at(const Step& step, size_t position);
  static size_t piece_begin(const Step& step, size_t piece);
  static Pieces pieces_of(const Step& step, const Seen& seen);
  static size_t most_pieces(const Step& step, size_t context);
  static const void* keys_of(const Step& step, const States& states, size_t head, size_t piece,
                             const Seen& all);
  static void touch(const Step& step, const States& states, size_t head, size_t piece,
                    const Seen& all) {
    states.touch(step.state, head, piece_begin(step, piece),
                 std::min(piece_begin(step, piece + 1), all.end));
  }
  // Of the query rows of a job.
  struct Rows {
    Seen seen[kMaxQueryRows];
    float maximum[kMaxQueryRows], weight[kMaxQueryRows];
  };
  AttentionJob job_of(unsigned m, const Step& step, const Run& run, size_t first, size_t last,
                      size_t query_head, size_t heads, bool prepared, Rows& rows);
  void prepare_all(unsigned m, const Step& step);
  void attend_few(unsigned m, const Step& step);
  void attend_many(unsigned m, const Step& step);
  void attend_piece(const Step& step, const States& states, size_t head, size_t piece,
                    const Seen& all, const Seen* seen, AttentionJob& job);
  void join(const Step& step, size_t count, size_t row, float* out) const;
  void rotate(const Step& step, float* head, size_t row) const;
  void prepare_head(const Step& step, const float* norm, float* head, size_t row) const;
  void prepare_queries(const Step& step, const Run& run, size_t row, size_t heads, float* queries);
  void store(const Step& step, const Run& run, size_t head, size_t row);
  void expect_stores(unsigned m, const Step& step);

  void offer(Member& member, size_t token, const float* logits, size_t count, size_t first_token);
  void offer_best(Member& member, size_t token, const float* logits, size_t count,
                  size_t first_token);
  void ask(const std::vector<Asked>& asked);
  void penalize(size_t row, const pslm_penalty* penalty, size_t count);
  int32_t best(size_t token) const;
  double highest(size_t token, int32_t* best, float* logits) const;
  void finish_logits(bool ranked, float* logits, size_t count, size_t first_token) const;
  void write_output(unsigned m, Head head, float* output);
  void screen(unsigned m, const PanelView& input, const Norm& norm);
  void screen_blocks(unsigned m, const PanelView& input, size_t begin, size_t end);
  void settle(unsigned m, size_t token, const ActivationTile& input);

  float* floats(size_t part) { return reinterpret_cast<float*>(work_memory_.data() + places_.at[part]); }
  float* buffer(BufferId id) { return floats(static_cast<size_t>(id)); }
  void apply(const Norm& norm, const float* x, size_t n, float* out) const;
  PanelView normalized_row(unsigned m, const Norm& norm, const float* x);
  // Input of so few tokens is cheaper to make ready again in each thread than to wait for.
  bool few() const { return count_ <= kMaxTile; }
  PanelView normalized(unsigned m, const Norm& norm, bool want_floats);
  template <typename Prepare>
  PanelView quantized(unsigned m, Panel& panel, const float* rows, size_t width,
                      Prepare&& prepare);
  PanelView product_input(unsigned m, const Step& step);
  template <typename Sink>
  void multiply(unsigned m, const Matrix& w, const PanelView& panel, Sink&& sink);
  template <typename Sink>
  void multiply_blocks(unsigned m, const Matrix& w, const PanelView& panel, size_t begin,
                       size_t end, Sink&& sink);
  const float* lower(unsigned m, size_t index, const PanelView& panel);
  // out[j] += row `first + j` of what the update of matrix `part` of a step makes of `row`, for
  // `count` rows of the matrix; low is what lower() gave, not null.
  void add_update(const float* low, size_t row, size_t index, size_t part, size_t first,
                  size_t count, float* out) const {
    const Updates& updates = *row_updates_[row];
    if (updates.steps.empty()) return;
    const StepUpdates& step = updates.steps[index];
    step.of[part].add(kernels_, low + row * widest_ + step.before(part), first, count, out);
  }
  template <typename F>
  void share(unsigned m, size_t total, size_t chunk, F&& f);
  template <typename F>
  void share_weights(unsigned m, size_t total, size_t unit_bytes, F&& f);
  size_t chunk(size_t total, size_t unit_bytes) const;
  void balance();
  void mark(unsigned m, uint64_t pslm_times::* counter) {
    if (m == 0) clock_.mark(counter);
  }

  const ModelFile& model_;
  const Program& program_;
  const Kernels& kernels_;
  const size_t batch_;  // tokens at a time
  size_t context_;
  std::vector<Context> contexts_;  // one a slot
  Context* used_;

  // State of the batch in progress, [token][...].
  size_t count_ = 0;
  std::vector<Run> runs_;
  Places places_;
  Buffer<uint8_t> work_memory_;  // of the parts
  std::vector<Buffer<float>> cosines_, sines_;  // by rotary table
  Panel panel_, hidden_panel_;
  // Attention of a few tokens, [token][head][piece].
  Buffer<float> piece_out_, piece_maximum_, piece_weight_;

  size_t head_rows_ = 1;  // the last ones of the batch, that the head is run over: 1 or all
  std::vector<Asked> asked_;  // for each of them
  // What is less probable behind a row of the head, a bit a token; of none with a factor of 1.
  struct Penalized {
    float factor = 1;
    std::vector<uint64_t> seen;
  };
  Penalized penalized_[kMaxTile];
  bool penalizes_ = false;
  std::vector<int32_t> tokens_;  // of several contexts
  // Of a split head by its high nibbles: [token] logits in parts of 16, and the highest of each
  // block. fp16 [16 blocks][group][of them]: the largest scale.
  Buffer<float> screened_, highest_;
  Buffer<uint16_t> spreads_;

  std::array<Updates, kMaxAdapters + 1> adapters_;  // the first one is empty
  std::vector<const Updates*> row_updates_;         // what each row of the batch takes of them
  bool of_hidden_ = false;  // some row's adapter reads hidden values as floats
  size_t widest_ = 0;       // ranks of a step's updates, of any adapter
  std::vector<float> lowered_;  // [row][widest_]: a^T x of updates that read the same, see lower()

  OperatorClock clock_;
  std::vector<uint64_t> work_;
  std::vector<Member> members_;
  ThreadPool pool_;
};

// Units that a thread takes at a time. Decoding, about a microsecond of reading, so that threads
// reach the barrier together; for a batch more, since each unit is much work.
inline size_t Session::chunk(size_t total, size_t unit_bytes) const {
  constexpr size_t bytes = 16384;
  if (count_ > 1) return std::clamp<size_t>(total / (pool_.size() * 6), 2, kScratchBlocks);
  return std::clamp<size_t>(bytes / unit_bytes, 1, kScratchBlocks);
}

template <typename F>
void Session::share(unsigned m, size_t total, size_t chunk, F&& f) {
  pool_.share(m, total, chunk, f, ReadWhileWaiting{members_[m].plan.ahead});
}

template <typename F>
void Session::share_weights(unsigned m, size_t total, size_t unit_bytes, F&& f) {
  share(m, total, chunk(total, unit_bytes), [&](size_t begin, size_t end) {
    members_[m].read_bytes += (end - begin) * unit_bytes;
    f(begin, end);
  });
}

// Calls sink(first token, tokens, first block, blocks, outputs) with outputs [token][blocks * 16].
template <typename Sink>
void Session::multiply_blocks(unsigned m, const Matrix& w, const PanelView& panel, size_t begin,
                              size_t end, Sink&& sink) {
  const MatmulFunction matmul = kernels_.matmul[kernel_of(w.kind)];
  float* outputs = members_[m].outputs.data();
  // Two blocks of weights stay in the first-level cache while several tiles pass.
  const size_t step = tile_size(panel.tokens) == panel.tokens ? kScratchBlocks : 2;
  for (size_t b = begin; b < end; b += step) {
    const size_t blocks = std::min(step, end - b);
    for (size_t t = 0; t < panel.tokens;) {
      ActivationTile tile = panel.tile(t);
      if (t == 0) tile.ahead = &members_[m].plan.ahead;
      matmul(w.from(b), blocks, w.cols, tile, outputs, blocks * kBlockRows);
      sink(t, tile.tokens, b, blocks, outputs);
      t += tile.tokens;
    }
  }
}

template <typename Sink>
void Session::multiply(unsigned m, const Matrix& w, const PanelView& panel, Sink&& sink) {
  share_weights(m, w.blocks(), w.block_bytes, [&](size_t begin, size_t end) {
    multiply_blocks(m, w, panel, begin, end, sink);
  });
}

}  // namespace pocketslm
