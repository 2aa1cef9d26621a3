// The parts of the C border that tests and rooflines use.
#include <atomic>
#include <chrono>
#include <cstdio>
#include <cstring>
#include <vector>

#include "cpu.h"
#include "buffers.h"
#include "pocketslm.h"
#include "thread_pool.h"

using namespace pocketslm;

namespace {

constexpr size_t kMaxProbeDimension = size_t{1} << 24;

double seconds_since(std::chrono::steady_clock::time_point start) {
  return std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
}

pslm_status fail(pslm_error error, pslm_status status, const char* text) {
  if (error.text && error.capacity) std::snprintf(error.text, error.capacity, "%s", text);
  return status;
}

}  // namespace

size_t pslm_packed_bytes(uint32_t kind, size_t rows, size_t cols) {
  const WeightKind weight_kind = static_cast<WeightKind>(kind);
  if (kind > UINT16_MAX || !is_matrix(weight_kind) || !rows || !cols || rows > kMaxProbeDimension ||
      cols > kMaxProbeDimension)
    return 0;
  if (is_quantized(weight_kind) && cols % column_unit(weight_kind)) return 0;
  return matrix_at(nullptr, weight_kind, rows, cols).bytes();
}

pslm_status pslm_matmul(const char* isa, uint32_t kind, const void* packed, size_t packed_bytes,
                        size_t rows, size_t cols, const float* activations, size_t count,
                        float* out, pslm_error error) {
  if (!packed || !activations || !out || !count)
    return fail(error, PSLM_ERROR_ARGUMENT, "null argument");
  const size_t expected = pslm_packed_bytes(kind, rows, cols);
  if (!expected || expected != packed_bytes)
    return fail(error, PSLM_ERROR_ARGUMENT, "packed matrix has a wrong kind, shape or length");
  if (reinterpret_cast<uintptr_t>(packed) % 64)
    return fail(error, PSLM_ERROR_ARGUMENT, "packed matrix is not 64-byte aligned");
  const Kernels* kernels = select_kernels(isa);
  if (!kernels) return fail(error, PSLM_ERROR_ISA, "kernel path is unknown or not supported");
  try {
    const size_t padded = round_up(rows, kBlockRows);
    const Matrix w = matrix_at(static_cast<const uint8_t*>(packed), static_cast<WeightKind>(kind),
                               rows, cols);
    Panel memory(count, round_up(cols, kGroup));
    const PanelView panel{&memory, count, cols, activations};
    std::vector<float> outputs(kMaxTile * padded);
    for (size_t t = 0; t < count;) {
      const size_t tile = tile_size(count - t);
      if (cols % kGroup == 0)
        for (size_t i = 0; i < tile; ++i)
          kernels->quantize(activations + (t + i) * cols, cols / kGroup, panel.row(t, i, 0));
      kernels->matmul[kernel_of(w.kind)](w.first, padded / kBlockRows, cols, panel.tile(t),
                                         outputs.data(), padded);
      for (size_t i = 0; i < tile; ++i)
        std::memcpy(out + (t + i) * rows, &outputs[i * padded], rows * sizeof(float));
      t += tile;
    }
  } catch (const std::bad_alloc&) {
    return fail(error, PSLM_ERROR_MEMORY, "out of memory");
  }
  return PSLM_OK;
}

double pslm_measure_bandwidth(uint32_t threads, size_t bytes) {
  if (threads == 0 || threads > 64 || bytes < 4096) return 0;
  try {
    Buffer<uint64_t> memory(bytes / 8);
    std::memset(memory.data(), 1, memory.bytes());
    ThreadPool pool(threads, false);
    std::atomic<uint64_t> sink{0};
    double best = 0;
    for (int repeat = 0; repeat < 8; ++repeat) {
      const auto start = std::chrono::steady_clock::now();
      auto read = [&](unsigned m) {
        const size_t words = bytes / 8 / 8 * 8;
        const uint64_t* p = memory.data() + words / 8 * m / threads * 8;
        const uint64_t* end = memory.data() + words / 8 * (m + 1) / threads * 8;
        uint64_t sums[8] = {};
        // One add per word is within what a core does per cache line of memory bandwidth.
        for (; p < end; p += 8)
          for (int i = 0; i < 8; ++i) sums[i] += p[i];
        uint64_t sum = 0;
        for (uint64_t s : sums) sum += s;
        sink.fetch_add(sum, std::memory_order_relaxed);
      };
      pool.run(read);
      const double rate = static_cast<double>(bytes) / seconds_since(start);
      if (rate > best) best = rate;
    }
    return best;
  } catch (const std::exception&) {
    return 0;
  }
}

double pslm_measure_int8_peak(const char* isa, uint32_t threads) {
  const Kernels* kernels = select_kernels(isa);
  if (!kernels || threads == 0 || threads > 64) return 0;
  try {
    ThreadPool pool(threads, false);
    double best = 0;
    // Rounds long enough to measure, and no longer: an emulated CPU is a hundred times slower.
    constexpr double kLeastSeconds = 0.005;
    size_t count = 50000;
    for (int repeat = 0; repeat < 5;) {
      std::atomic<uint64_t> macs{0};
      const auto start = std::chrono::steady_clock::now();
      auto multiply = [&](unsigned) { macs.fetch_add(kernels->int8_probe(count)); };
      pool.run(multiply);
      const double seconds = seconds_since(start);
      const double rate = static_cast<double>(macs.load()) / seconds;
      if (rate > best) best = rate;
      if (seconds < kLeastSeconds)
        count *= 2;
      else
        ++repeat;
    }
    return best;
  } catch (const std::exception&) {
    return 0;
  }
}
