#include "model_file.h"

#include <algorithm>
#include <cstring>

#include "kernels.h"

namespace pocketslm {
namespace {

// Bounds that keep every product below in 64 bits and every buffer of a session sane.
constexpr uint32_t kMaxVocabulary = 1u << 24;
constexpr uint32_t kMaxLayers = 1024;

bool in_range(uint32_t value, uint32_t maximum) { return value >= 1 && value <= maximum; }

bool is_blob(const Section& s) { return s.kind == static_cast<uint16_t>(WeightKind::blob); }

}  // namespace

Failure ModelFile::open(const char* path) {
  if (const std::string failure = file_.open(path); !failure.empty())
    return {PSLM_ERROR_FILE, failure};
  if (Failure failure = view(file_.data(), file_.bytes())) return failure;
  const auto& matrices = table_.matrices;
  if (std::none_of(matrices.begin(), matrices.end(), [](const Matrix& m) { return m.apart(); }))
    file_.close();
  return {};
}

Failure ModelFile::view(const void* data, size_t bytes) {
  data_ = static_cast<const uint8_t*>(data);
  bytes_ = bytes;
  if (bytes < sizeof(FileHeader)) return format_error("shorter than its header");
  if (reinterpret_cast<uintptr_t>(data) % 64) return format_error("not aligned to 64 bytes");
  std::memcpy(&config, data_, sizeof config);
  if (Failure failure = check_header()) return failure;
  if (Failure failure = read_sections()) return failure;
  std::vector<OperationRecord> operations;
  std::vector<StateRecord> states;
  const bool carried = config.version >= 3;
  if (Failure failure = carried ? read_program(operations, states)
                                : llama_program(config, table_, operations, states))
    return failure;
  const ProgramLimits limits{config.hidden_size, config.vocab_size, config.max_context,
                             config.layers};
  return resolve(table_, limits, operations, states, carried, program);
}

Failure ModelFile::check_header() const {
  const FileHeader& c = config;
  if (std::memcmp(c.magic, kMagic, sizeof kMagic) != 0) return format_error("wrong magic bytes");
  if (c.version < 1 || c.version > kFileVersion)
    return format_error("version " + std::to_string(c.version) + ", this build reads up to " +
                        std::to_string(kFileVersion));
  if (c.file_bytes != bytes_)
    return format_error("the header says " + std::to_string(c.file_bytes) + " bytes, the file has " +
                        std::to_string(bytes_));
  if (!in_range(c.hidden_size, kMaxDimension) || !in_range(c.vocab_size, kMaxVocabulary) ||
      !in_range(c.layers, kMaxLayers) || !in_range(c.max_context, 1u << 24))
    return format_error("a dimension is zero or too large");
  if (c.hidden_size % kGroup) return format_error("hidden_size must be a multiple of 32");
  for (uint32_t word : c.reserved)
    if (word) return format_error("reserved words are not zero");
  return {};
}

Failure ModelFile::read_sections() {
  const uint64_t table_end = sizeof(FileHeader) + uint64_t{config.sections} * sizeof(Section);
  if (table_end > bytes_) return format_error("the section table ends past the file");
  table_.data = data_;
  table_.sections.resize(config.sections);
  table_.matrices.resize(config.sections);
  if (config.sections)
    std::memcpy(table_.sections.data(), data_ + sizeof(FileHeader), table_end - sizeof(FileHeader));
  for (size_t i = 0; i < table_.sections.size(); ++i) {
    const Section& s = table_.sections[i];
    if (s.offset % 64 || s.offset < table_end || s.offset > bytes_ || s.bytes > bytes_ - s.offset)
      return format_error(describe(s) + " lies outside the file or is misaligned");
    if (Failure failure = check_section(s)) return failure;
    const WeightKind kind = static_cast<WeightKind>(s.kind);
    if (!is_matrix(kind)) continue;
    table_.matrices[i] = matrix_at(data_ + s.offset, kind, s.rows, s.cols);
    if (s.bytes != table_.matrices[i].bytes())
      return format_error(describe(s) + " has a wrong length");
  }
  return {};
}

Failure ModelFile::check_section(const Section& s) const {
  // Roles name sections in messages; only blobs are found by them.
  if (s.role > static_cast<uint16_t>(Role::projection))
    return format_error(describe(s) + " is unknown: the file needs a newer pocketslm");
  const Role role = static_cast<Role>(s.role);
  const bool wants_blob = role == Role::tokenizer || role == Role::chat ||
                          role == Role::program || role == Role::states;
  if (wants_blob != is_blob(s)) return format_error(describe(s) + " has a wrong kind");
  if (is_blob(s)) {
    if (blob(role).bytes != s.bytes || blob(role).data != data_ + s.offset)
      return format_error(describe(s) + " appears twice");
    return {};
  }
  if (s.kind == static_cast<uint16_t>(WeightKind::vector)) {
    if (s.rows != 1 || s.bytes != uint64_t{s.cols} * sizeof(float))
      return format_error(describe(s) + " has a wrong shape or length");
    return {};
  }
  const WeightKind kind = static_cast<WeightKind>(s.kind);
  if (!is_matrix(kind))
    return format_error(describe(s) + " has an unknown weight kind: the file needs a newer pocketslm");
  if (!in_range(s.rows, kMaxVocabulary) || !in_range(s.cols, kMaxDimension) ||
      s.cols % column_unit(kind))
    return format_error(describe(s) + " has a wrong shape");
  return {};
}

Blocks ModelFile::read(const Matrix& matrix, size_t block, uint8_t* buffer) const {
  Blocks found = matrix.from(block);
  if (!file_.is_open() || !matrix.apart()) return found;
  const auto offset = static_cast<size_t>(found.low - data_);
  if (file_.read(offset, buffer, found.low_stride)) found.low = buffer;
  return found;
}

Blob ModelFile::blob(Role role) const {
  for (const Section& s : table_.sections)
    if (s.role == static_cast<uint16_t>(role) && is_blob(s))
      return {data_ + s.offset, static_cast<size_t>(s.bytes)};
  return {};
}

// The records that version 3 carries.
Failure ModelFile::read_program(std::vector<OperationRecord>& operations,
                                std::vector<StateRecord>& states) const {
  const Blob program = blob(Role::program), declared = blob(Role::states);
  if (!program.data) return format_error("the program is missing");
  if (program.bytes % sizeof(OperationRecord) ||
      program.bytes / sizeof(OperationRecord) > kMaxOperations ||
      declared.bytes % sizeof(StateRecord) ||
      declared.bytes / sizeof(StateRecord) > kMaxOperations)
    return format_error("the program or its states have a wrong length");
  operations.resize(program.bytes / sizeof(OperationRecord));
  states.resize(declared.bytes / sizeof(StateRecord));
  if (program.bytes) std::memcpy(operations.data(), program.data, program.bytes);
  if (declared.bytes) std::memcpy(states.data(), declared.data, declared.bytes);
  return {};
}

}  // namespace pocketslm
