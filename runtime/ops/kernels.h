// The kernels of one instruction set: raw pointers and sizes, no state, no allocation.
#pragma once

#include <cstddef>
#include <cstdint>
#include <type_traits>

#include "weight_layout.h"

namespace pocketslm {

// Activations are processed in tiles of 16, 8, 4, 2 or 1 tokens.
constexpr size_t kMaxTile = 16;
static constexpr size_t tile_size(size_t tokens_left) {
  for (size_t size = kMaxTile; size > 1; size /= 2)
    if (tokens_left >= size) return size;
  return 1;
}

// What a thread will read in this step and the next, in order, as runs of 64-byte lines. Decoding is
// bound by memory, so memory must never idle: lines are asked for ahead of their use, into the
// core's own second-level cache, by the kernels as they consume lines and by threads that wait at a
// barrier. The lead this builds up lets the kernels run faster than memory for a while.
struct ReadSpan {
  const uint8_t* data;
  size_t lines;
};
struct ReadPlace {
  const ReadSpan* span;
  const uint8_t* line;  // of `span`, the next one
  size_t left;          // lines of `span` from there on
  uint64_t lines;       // so far, since the first step
};
struct ReadAhead {
  const ReadSpan *begin, *end;  // a ring
  ReadPlace asked, touched;     // up to where lines were asked for, and pages were touched
  uint64_t used;                // lines so far
};
constexpr uint64_t kMaxLeadLines = 2048;  // 128 KB; a power of two
// A line of a page whose translation is not at hand is waited for, with all that the core would do
// next. So pages are touched earlier, many together: cores look several translations up at once.
constexpr size_t kPageLines = 64, kPagesTogether = 16;
constexpr uint64_t kPageLead = 512;
// Arm's cores pay for it by a hundredth more instructions, for a gain that is not measured there.
#ifdef __aarch64__
constexpr bool kTouchesPages = false;
#else
constexpr bool kTouchesPages = true;
#endif

static inline void next_span(const ReadAhead& ahead, ReadPlace& place) {
  if (++place.span == ahead.end) place.span = ahead.begin;
  place.line = place.span->data;
  place.left = place.span->lines;
}

static inline void move_on(ReadPlace& place, size_t lines) {
  place.line += lines * 64;
  place.left -= lines;
  place.lines += lines;
}

static inline void touch_pages(ReadAhead& ahead) {
  ReadPlace& place = ahead.touched;
  for (size_t pages = kPagesTogether; pages;) {
    if (!place.left) next_span(ahead, place);
    const size_t whole = place.left / kPageLines, run = whole < pages ? whole : pages;
    for (size_t i = 0; i < run; ++i) __builtin_prefetch(place.line + i * kPageLines * 64, 0, 2);
    move_on(place, run * kPageLines);
    pages -= run;
    if (!pages || !place.left) continue;
    __builtin_prefetch(place.line, 0, 2);
    move_on(place, place.left);
    --pages;
  }
}

static inline void ask_lines(ReadAhead& ahead, size_t lines) {
  ReadPlace& place = ahead.asked;
  if (kTouchesPages && place.lines + kPageLead >= ahead.touched.lines) touch_pages(ahead);
  while (lines) {
    if (!place.left) next_span(ahead, place);
    const size_t run = lines < place.left ? lines : place.left;
    const uint8_t* line = place.line;
    size_t i = 0;
    for (; i + 8 <= run; i += 8, line += 512)
      for (size_t k = 0; k < 8; ++k) __builtin_prefetch(line + 64 * k, 0, 2);
    for (; i < run; ++i, line += 64) __builtin_prefetch(line, 0, 2);
    move_on(place, run);
    lines -= run;
  }
}

// A kernel is about to read `lines`; how many it should ask for: twice as many with no lead, none
// with a full one.
static inline size_t lines_to_ask(ReadAhead& ahead, size_t lines) {
  const uint64_t asked = ahead.asked.lines, lead = asked > ahead.used ? asked - ahead.used : 0;
  ahead.used += lines;
  return lead < kMaxLeadLines ? lines * (kMaxLeadLines - lead) * 2 / kMaxLeadLines : 0;
}

// The same, asked for at once.
static inline void use_lines(ReadAhead& ahead, size_t lines) {
  if (const size_t wanted = lines_to_ask(ahead, lines)) ask_lines(ahead, wanted);
}

// For kernels that ask while they compute: what exceeds `lines` is asked for at once, and the rest,
// whose number is returned, is to be taken from next_run.
static inline size_t start_asking(ReadAhead& ahead, size_t lines) {
  const size_t wanted = lines_to_ask(ahead, lines);
  if (wanted <= lines) return wanted;
  ask_lines(ahead, wanted - lines);
  return lines;
}

// Lines that follow each other in memory, the same number in each of so many steps of a kernel.
struct ReadRun {
  const uint8_t* line;
  size_t steps;
};

// The next lines that the kernel must ask for, in up to `steps` steps. What is left of a span and too
// little for a step is asked for at once; where all of it is, a step goes past its end.
static inline ReadRun next_run(ReadAhead& ahead, size_t lines, size_t steps) {
  ReadPlace& place = ahead.asked;
  if (kTouchesPages && place.lines + kPageLead >= ahead.touched.lines) touch_pages(ahead);
  if (place.left < lines) ask_lines(ahead, place.left);
  if (!place.left) next_span(ahead, place);
  const size_t whole = place.left < lines ? 1 : place.left / lines;
  const ReadRun run{place.line, whole < steps ? whole : steps};
  move_on(place, run.steps * lines < place.left ? run.steps * lines : place.left);
  return run;
}

// One tile of activations, both as floats and quantized to int8 in groups of 32 columns.
struct ActivationTile {
  size_t tokens = 0;
  const float* values = nullptr;  // [tokens][stride]
  size_t stride = 0;
  const int8_t* codes = nullptr;         // [group][tokens][32], or as the path orders them
  const float* scales = nullptr;         // [group][tokens]
  const float* sums = nullptr;           // [group][tokens], scale * sum of the codes
  const int32_t* corrections = nullptr;  // [group][tokens], -8 * sum of the codes
  const int32_t* upper = nullptr;        // [group][tokens], of these the upper 16 columns' part
  ReadAhead* ahead = nullptr;            // where reading the weights should also ask for more
};

// Where one token's quantized groups go in a tile; strides are those of ActivationTile. A path may
// order the codes of a tile of several tokens in its own way, within each group of two tokens.
struct QuantizedRow {
  size_t tokens, token;  // of the tile, and which of them
  int8_t* codes;
  float* scales;
  float* sums;
  int32_t* corrections;
  int32_t* upper;
};

// Whether int8 codes can say what numbers of this largest magnitude are: 127 / peak must be finite.
// Others get codes of 0, and of NaN and infinity a scale that makes every product NaN.
static constexpr bool has_codes(float peak) { return peak >= 4.0e-37f && peak <= 3.4028234e38f; }

// Query rows of one KV head against cached positions [begin, end).
constexpr size_t kMaxQueryRows = 12;
constexpr size_t kMaxHeadDim = 1024;
constexpr size_t kPositionBlock = 16;  // keys are stored in blocks of so many positions
constexpr float kMostWeight = 127 * 128;  // of attention over int8: two digits of 7 bits
constexpr size_t kScoreSpan = 256;     // positions whose scores are weighed together, at most
// Scores are logarithms to base 2.
struct AttentionJob {
  // Positions [begin, end); spans are counted from `first` on. All but `end` are multiples of 16.
  size_t rows, head_dim, first, begin, end;
  const float* queries;    // [rows][head_dim], scaled
  const uint32_t* limits;  // [rows]: the row sees positions below its limit
  const uint32_t* starts;  // [rows]: and from its start on; null: from 0 on
  const void* keys;    // fp16 [block][head_dim][16], int8 [block][head_dim / 4][16][4]
  const void* values;  // fp16 [position][head_dim], int8 [position / 4][head_dim][4]
  const float* key_scales;            // int8 only: [position]
  const float* value_scales;
  const void* next;  // keys that are read next, where they begin; null: not known
  float cap;  // scores become cap * tanh(score / cap); 0: they stay
  // Unnormalized result and the online softmax state, all written.
  float* out;      // [rows][head_dim]
  float* maximum;  // [rows]
  float* weight;   // [rows], sum of 2^(score - maximum)

  // Where the span that starts at `position` ends.
  size_t span_end(size_t position) const {
    const size_t next = position + kScoreSpan - (position - first) % kScoreSpan;
    return next < end ? next : end;
  }
};

// Scales of a group of a kind: one, or one for each 16 columns.
template <WeightKind K>
constexpr int kScales = kGroup / form_of(K).scale_columns;

// What the dot product of a group, or of one of its `part`s of 16 columns, starts from: -zero times
// the sum of the activations' codes. `at` is the group's token.
template <WeightKind K>
inline int32_t zero_correction(const ActivationTile& tile, size_t at, int part) {
  int32_t eighths = tile.corrections[at];
  if constexpr (kScales<K> == 2) eighths = part ? tile.upper[at] : eighths - tile.upper[at];
  constexpr int zero = zero_of(form_of(K));
  return zero >= 8 ? eighths * (zero / 8) : eighths / (8 / zero);  // a multiple of 8
}

// The sum of the activations of a group or of a part of it.
template <WeightKind K>
inline float part_sum(const ActivationTile& tile, size_t at, int part) {
  if constexpr (kScales<K> == 1) return tile.sums[at];
  const int32_t eighths = part ? tile.upper[at] : tile.corrections[at] - tile.upper[at];
  return tile.scales[at] * -0.125f * static_cast<float>(eighths);
}

// Where the low nibbles of split codes of group g lie, of rows from `offset` bytes on.
template <WeightKind K>
inline const uint8_t* low_of(const Blocks& block, size_t g, size_t offset = 0) {
  return form_of(K).split ? block.low + g * group_bytes(form_of(K)) + offset : nullptr;
}

// Lines of a block that its kernel says it reads; apart nibbles are read besides.
template <WeightKind K>
inline size_t lines_read(const Blocks& blocks, const BlockLayout& layout) {
  return (form_of(K).split ? blocks.stride : layout.bytes) / 64;
}

// Calls f with each of 0 to N - 1 as a constant.
template <int N, int I = 0, typename F>
static inline __attribute__((always_inline)) void unrolled(F&& f) {
  if constexpr (I < N) {
    f(std::integral_constant<int, I>());
    unrolled<N, I + 1>(f);
  }
}

using MatmulFunction = void (*)(const Blocks& blocks, size_t count, size_t cols,
                                const ActivationTile& tile, float* out, size_t out_stride);

// Kinds that have kernels, in the order of their numbers.
constexpr size_t kKernelKinds = 33;
constexpr size_t kernel_of(WeightKind kind) {
  constexpr size_t plain = 9, first = static_cast<size_t>(WeightKind::q2_sym);
  const size_t number = static_cast<size_t>(kind);
  return number < plain ? number : number - first + plain;
}

struct Kernels {
  const char* name;
  // out[t * out_stride + b * 16 + r] for `count` consecutive blocks.
  MatmulFunction matmul[kKernelKinds];  // by kernel_of
  void (*rms_norm)(const float* x, const float* weight, size_t n, float eps, float* out);
  void (*quantize)(const float* x, size_t groups, const QuantizedRow& row);
  // Centered and scaled to a variance of 1, times weight, plus bias.
  void (*layer_norm)(const float* x, const float* weight, const float* bias, size_t n, float eps,
                     float* out);
  // out = activation(gate) * up, by Activation; n % 16 == 0.
  void (*gated[kActivations])(const float* gate, const float* up, size_t n, float* out);
  // out = activation(x)
  void (*activate[kActivations])(const float* x, size_t n, float* out);
  void (*attend_f16)(const AttentionJob& job);
  void (*attend_i8)(const AttentionJob& job);
  void (*to_f16)(const float* x, size_t n, uint16_t* out);  // n % 16 == 0
  // Symmetric int8 with one scale, which is returned.
  float (*to_i8)(const float* x, size_t n, int8_t* out);  // n % 16 == 0
  // out[r] = sum over groups of scales[g][r]^2 * weights[g], for 16 fp16 scales a group.
  void (*weigh_scales)(const uint16_t* scales, const float* weights, size_t groups, float* out);
  // The highest of each 16 numbers, NaN where one of them is not finite.
  void (*highest)(const float* x, size_t blocks, float* out);
  // out[p * 16 + r] = sum over columns of x[c] * a[p][c][r], for `panels` of 16 ranks.
  void (*lower_rank_f16)(const uint16_t* a, const float* x, size_t cols, size_t panels, float* out);
  void (*lower_rank_i8)(const int8_t* a, const float* x, size_t cols, size_t panels, float* out);
  // out[k * 16 + j] += sum over r < rank of low[r] * b[k][r][j], for `blocks` of 16 rows.
  void (*add_low_rank_f16)(const uint16_t* b, const float* low, size_t rank, size_t blocks,
                           float* out);
  void (*add_low_rank_i8)(const int8_t* b, const float* low, size_t rank, size_t blocks, float* out);
  // Sum of exp(x - shift).
  float (*sum_exp)(const float* x, size_t n, float shift);
  // x = cap * tanh(x / cap)
  void (*soft_cap)(float* x, size_t n, float cap);
  // Fills registers with the path's int8 dot product; returns multiply-accumulates done.
  uint64_t (*int8_probe)(size_t iterations);
};

// The table of a file that defines all of these functions by these names.
#define POCKETSLM_KERNELS(name)                                                              \
  {name,                                                                                     \
   {matmul_float<float>, matmul_float<uint16_t>, matmul<WeightKind::q4_sym>,                 \
    matmul<WeightKind::q4_min>, matmul<WeightKind::q4_zp>, matmul<WeightKind::q8_sym>,       \
    matmul<WeightKind::q8_min>, matmul<WeightKind::q8_zp>, matmul<WeightKind::q8_split>,     \
    matmul<WeightKind::q2_sym>, matmul<WeightKind::q3_sym>, matmul<WeightKind::q5_sym>,      \
    matmul<WeightKind::q6_sym>, matmul<WeightKind::q2_min>, matmul<WeightKind::q3_min>,      \
    matmul<WeightKind::q5_min>, matmul<WeightKind::q6_min>, matmul<WeightKind::iq4>,         \
    matmul<WeightKind::fp4>, matmul<WeightKind::q3_k>, matmul<WeightKind::q4_k>,             \
    matmul<WeightKind::q5_k>, matmul<WeightKind::q6_k>, matmul<WeightKind::iq4_k>,           \
    matmul<WeightKind::q3_k16>, matmul<WeightKind::q6_k16>, matmul<WeightKind::q2_k16>,      \
    nullptr, /* q8_apart runs as q8_split */                                                 \
    matmul<WeightKind::q2_r>, matmul<WeightKind::q3_r>, matmul<WeightKind::q4_r>,            \
    matmul<WeightKind::q5_r>, matmul<WeightKind::q6_r>},                                     \
   rms_norm,                                                                                 \
   quantize,                                                                                 \
   layer_norm,                                                                               \
   {gated<Activation::silu>, gated<Activation::gelu_tanh>, gated<Activation::gelu>,          \
    gated<Activation::relu>, gated<Activation::relu2>},                                      \
   {activate<Activation::silu>, activate<Activation::gelu_tanh>, activate<Activation::gelu>, \
    activate<Activation::relu>, activate<Activation::relu2>},                                \
   attend_f16,                                                                               \
   attend_i8,                                                                                \
   to_f16,                                                                                   \
   to_i8,                                                                                    \
   weigh_scales,                                                                             \
   highest,                                                                                  \
   lower_rank<uint16_t>,                                                                     \
   lower_rank<int8_t>,                                                                       \
   add_low_rank<uint16_t>,                                                                   \
   add_low_rank<int8_t>,                                                                     \
   sum_exp,                                                                                  \
   soft_cap,                                                                                 \
   int8_probe}

extern const Kernels kScalarKernels;
#if defined(__x86_64__)
extern const Kernels kAvx2Kernels;
extern const Kernels kAvxVnniKernels;
extern const bool kAvxVnniIsEvex;  // it was compiled for AVX-512's encoding
extern const Kernels kAvx512VnniKernels;
#elif defined(__aarch64__)
extern const Kernels kNeonDotprodKernels;
extern const Kernels kNeonI8mmKernels;
#endif

}  // namespace pocketslm
