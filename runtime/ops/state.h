// What a session keeps of the tokens before, as its program declares it: keys and values, of all
// positions or of a window, and the last columns of convolutions.
//
// Keys lie in blocks of 16 positions, so that a query row meets 16 positions in one vector: fp16 as
// [head_dim][16], int8 as [head_dim / 4][16][4], whose four products are added at once. Values lie by
// position, of int8 four positions together, [head_dim][4]. A window is kept in a ring: position p lies
// at p % room.
#pragma once

#include <cstdint>
#include <vector>

#include "buffers.h"
#include "program.h"

namespace pocketslm {

// Attention over a window is summed up in pieces of so many positions, which no ring splits.
inline size_t window_piece(size_t window) {
  return round_up(window < 8 ? 1 : window / 8, 64);
}

class States {
 public:
  // PSLM_KV_CALLER: fp16 in memory that bind() names, all positions of it. `beside_window`: positions
  // that are kept beyond a window; no fewer than are stored before the first of them attends.
  States(const Program& program, const Kernels& kernels, size_t context, pslm_kv_type type,
         size_t beside_window);

  // Keys and values of each KV state in turn, [kv_heads][positions][head_dim] each.
  void bind(void* const* places, size_t positions);
  size_t kv_states() const;

  size_t bytes() const { return data_.bytes() + scales_.bytes() + columns_.bytes(); }
  pslm_kv_type type() const { return type_; }

  // Stores one head's key (already rotated) and value.
  void store(size_t state, size_t head, size_t position, const float* key, const float* value);
  // Fills the state's part of a job, whose positions are places.
  void describe(size_t state, size_t head, AttentionJob& job) const;
  // Where a head's keys lie from a position on that begins a block.
  const void* keys_at(size_t state, size_t head, size_t position) const;
  // Touches the pages of a head's keys and values of these positions, see ReadAhead.
  void touch(size_t state, size_t head, size_t begin, size_t end) const;
  // Asks for the lines that store() will write.
  void expect(size_t state, size_t head, size_t position) const;
  // Where a position lies for each head.
  size_t place_of(size_t state, size_t position) const {
    const size_t room = kept_[state].room;
    return position < room ? position : position % room;
  }

  // The last columns of a convolution, [taps - 1][width], the oldest first.
  float* columns(size_t state) { return columns_.data() + kept_[state].offset; }

  // Positions below `length` have been written.
  void advance(size_t length);
  void forget();
  // The smallest length above 0 that a context of `length` can be cut back to.
  size_t rewind_limit(size_t length) const;

  // For a context of `length`, cut back to its first `count` positions, at least rewind_limit().
  size_t saved_bytes(size_t count) const;
  void save(size_t count, uint8_t* out) const;
  void restore(size_t count, const uint8_t* in);

 private:
  struct Kept {
    StateKind kind;
    size_t heads, head_dim, window;  // of a convolution: 1, width and taps
    size_t room;                     // positions for each head
    size_t first;                    // the oldest position that is still there
    size_t offset;              // where its scales, or columns, begin
    uint8_t *keys, *values;          // [head][room][head_dim]
  };
  size_t head_elements(const Kept& kept) const { return kept.room * kept.head_dim; }
  // The first position that a snapshot of `count` needs.
  static size_t saved_from(const Kept& kept, size_t count);
  template <typename Copy>
  void visit_saved(size_t count, Copy&& copy) const;

  const Kernels& kernels_;
  const pslm_kv_type type_;
  const size_t width_;  // bytes of an element
  std::vector<Kept> kept_;
  size_t positions_ = 0;  // of a whole context
  bool in_large_pages_ = false;
  Buffer<uint8_t> data_;   // {keys, values} of each state, fp16 or int8
  Buffer<float> scales_;   // int8 only: [state][head]{keys, values}[room]
  Buffer<float> columns_;  // [convolution][taps - 1][width]
};

}  // namespace pocketslm
