// What `instructions --kinds` counts: products of a matrix of each kind with one token, and with
// sixteen. A line is written before each product and after it, where the plugin says the count.
#include <cstdio>
#include <cstdlib>

#include "buffers.h"
#include "cpu.h"

using namespace pocketslm;

// Arguments: the path, rows, columns, and numbers of kinds.
int main(int count, char** arguments) {
  const Kernels* kernels = select_kernels(arguments[1]);
  if (!kernels) return std::fprintf(stderr, "this CPU has no path %s\n", arguments[1]), 1;
  const auto number = [&](int i) { return std::strtoul(arguments[i], nullptr, 10); };
  const auto mark = [] { std::printf("\n"), std::fflush(stdout); };
  const size_t rows = number(2), cols = number(3);
  const Buffer<float> x(kMaxTile * cols);
  Buffer<float> out(kMaxTile * rows);
  for (int i = 4; i < count; ++i) {
    const auto kind = static_cast<WeightKind>(number(i));
    const Buffer<uint8_t> data(rows / kBlockRows * block_layout(kind, cols).bytes);
    const Matrix w = matrix_at(data.data(), kind, rows, cols);
    const ReadSpan all{w.data(), w.bytes() / 64};
    for (size_t tokens : {size_t{1}, kMaxTile}) {
      const ReadPlace start{&all, all.data, all.lines, 0};
      ReadAhead ahead{&all, &all + 1, start, start, 0};
      Panel panel(tokens, cols);
      ActivationTile tile = PanelView{&panel, tokens, cols, x.data()}.tile(0);
      tile.ahead = &ahead;
      mark();
      kernels->matmul[kernel_of(w.kind)](w.first, w.blocks(), cols, tile, out.data(), rows);
      mark();
    }
  }
}
