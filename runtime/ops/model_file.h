// model.slm: a fixed header, a table of sections, and 64-byte-aligned sections that are used where
// they are mapped. All numbers are little-endian.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "pocketslm.h"
#include "weight_layout.h"

namespace pocketslm {

constexpr char kMagic[8] = {'P', 'S', 'L', 'M', 'O', 'D', 'E', 'L'};
// Version 2: layers may be narrower than the header says, each as wide as its matrices.
constexpr uint32_t kFileVersion = 2;

struct FileHeader {
  char magic[8];
  uint32_t version;
  uint32_t sections;
  uint64_t file_bytes;
  uint32_t hidden_size, layers, heads, kv_heads, head_dim, intermediate_size, vocab_size;
  uint32_t max_context;
  uint32_t rope_dim;  // leading dimensions of a head that are rotated
  float rms_eps;
  float rope_scale;  // multiplies cosines and sines (YaRN's attention factor); 1 otherwise
  uint32_t reserved[15];
};
static_assert(sizeof(FileHeader) == 128);

enum class Role : uint16_t {
  embedding = 0,
  final_norm = 1,
  head = 2,  // absent where the head is the embedding
  rope_frequencies = 3,
  attention_norm = 4,
  query = 5,
  key = 6,
  value = 7,
  output = 8,
  mlp_norm = 9,
  gate = 10,
  up = 11,
  down = 12,
  query_bias = 13,
  key_bias = 14,
  value_bias = 15,
  tokenizer = 16,
  chat = 17,
};
constexpr uint16_t kRoles = 18;

// Kinds of sections that are not packed matrices.
constexpr uint16_t kVectorKind = 16;  // float32, rows = 1
constexpr uint16_t kBlobKind = 17;    // bytes, rows = 1

struct Section {
  uint16_t role, kind;
  uint32_t layer;  // 0 for roles outside the layers
  uint32_t rows, cols;
  uint64_t offset, bytes;
};
static_assert(sizeof(Section) == 32);

struct Layer {
  uint32_t heads = 0, kv_heads = 0, intermediate_size = 0;
  Matrix query, key, value, output, gate, up, down;
  const float *attention_norm = nullptr, *mlp_norm = nullptr;
  const float *query_bias = nullptr, *key_bias = nullptr, *value_bias = nullptr;
};

struct Blob {
  const uint8_t* data = nullptr;
  size_t bytes = 0;
};

// A failed check: the status for the C border and one line that says what was wrong.
struct Failure {
  pslm_status status = PSLM_OK;
  std::string text;
  explicit operator bool() const { return status != PSLM_OK; }
};

class ModelFile {
 public:
  ModelFile() = default;
  ~ModelFile();
  ModelFile(const ModelFile&) = delete;
  ModelFile& operator=(const ModelFile&) = delete;

  // Maps the file and checks all of it before anything is used.
  Failure open(const char* path);
  // The same for a whole file in the caller's memory, which must outlive this.
  Failure view(const void* data, size_t bytes);

  FileHeader config{};
  Matrix embedding, head;
  const float* final_norm = nullptr;
  const float* rope_frequencies = nullptr;
  std::vector<Layer> layers;
  Blob tokenizer, chat;

  // The widest of any layer.
  size_t query_width() const { return size_t{config.heads} * config.head_dim; }
  size_t kv_width() const { return size_t{config.kv_heads} * config.head_dim; }

 private:
  Failure check_header() const;
  Failure take_sections();
  void size_layer(const Section& section);
  Failure check_layer_sizes() const;
  Failure take(const Section& section);
  Failure check_complete() const;

  const uint8_t* data_ = nullptr;
  size_t bytes_ = 0;
  bool mapped_ = false;
};

}  // namespace pocketslm
