// The order in which a thread reads its share of the weights, and its reader.
#pragma once

#include <utility>
#include <vector>

#include "kernels.h"
#include "program.h"
#include "thread_pool.h"

namespace pocketslm {

// Units of a gated step that are taken together where a token is decoded: one thread alone, which
// shares nothing, calls its kernels seldom. Their gates are read before the rest of them.
constexpr size_t gated_units(unsigned threads) { return threads == 1 ? 8 : 1; }

class ReadPlan {
 public:
  // For the shares that the pool gives this member; the reader starts anew.
  void build(const Program& program, const ThreadPool& pool, unsigned member);

  // Puts the reader where this step of the program needs it: work taken from other threads, or by
  // them, and prompt batches leave it too far ahead or behind.
  void start(size_t step);
  // The same for the head where all of a split matrix is read, not only its high nibbles.
  void start_whole_head();
  // The pass is over.
  void finish() { base_ = pass_end_; }

  ReadAhead ahead{};

 private:
  void seek(const ReadSpan& span, uint64_t now);

  std::vector<ReadSpan> spans_;                     // the whole head, then the ring
  std::vector<std::pair<size_t, uint64_t>> steps_;  // first span, lines before it in a pass
  uint64_t base_ = 0, pass_end_ = 0;                // lines before this pass and the next
  uint64_t pass_lines_ = 0;
};

}  // namespace pocketslm
