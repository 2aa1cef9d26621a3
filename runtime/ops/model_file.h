// model.slm: a fixed header, a table of sections, and 64-byte-aligned sections that are used where
// they are mapped. All numbers are little-endian.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "platform.h"
#include "program.h"

namespace pocketslm {

constexpr char kMagic[8] = {'P', 'S', 'L', 'M', 'O', 'D', 'E', 'L'};
// Version 1: a Llama block, whose weights are found by their roles. Version 2: layers may be narrower
// than the header says, each as wide as its matrices. Version 3: the file carries its program.
constexpr uint32_t kFileVersion = 3;

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

struct Blob {
  const uint8_t* data = nullptr;
  size_t bytes = 0;
};

class ModelFile {
 public:
  ModelFile() = default;
  ModelFile(const ModelFile&) = delete;
  ModelFile& operator=(const ModelFile&) = delete;

  // Maps the file and checks all of it before anything is used.
  Failure open(const char* path);
  // The same for a whole file in the caller's memory, which must outlive this.
  Failure view(const void* data, size_t bytes);

  FileHeader config{};
  Program program;

  // An opaque section; empty where the file has none of that role.
  Blob blob(Role role) const;
  // A block whose nibbles that lie apart are read into `buffer`, of low_stride bytes: mapped, each
  // would bring the pages around it into memory. Others, and those of no file, are what they are.
  Blocks read(const Matrix& matrix, size_t block, uint8_t* buffer) const;
  // Width of a row of the head's output: logits, or the residual stream where there is no matrix.
  size_t output_size() const {
    return program.head().w[0] ? config.vocab_size : config.hidden_size;
  }

 private:
  Failure check_header() const;
  Failure read_sections();
  Failure check_section(const Section& section) const;
  Failure read_program(std::vector<OperationRecord>& operations,
                       std::vector<StateRecord>& states) const;

  const uint8_t* data_ = nullptr;
  size_t bytes_ = 0;
  platform::MappedFile file_;  // kept open where it is read beside its mapping
  SectionTable table_;
};

// The program of versions 1 and 2.
Failure llama_program(const FileHeader& header, const SectionTable& table,
                      std::vector<OperationRecord>& operations, std::vector<StateRecord>& states);

}  // namespace pocketslm
