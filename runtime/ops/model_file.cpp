#include "model_file.h"

#include <fcntl.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include <cmath>
#include <cstring>

#include "kernels.h"

namespace pocketslm {
namespace {

// Bounds that keep every product below in 64 bits and every buffer of a session sane.
constexpr uint32_t kMaxDimension = 1u << 20;
constexpr uint32_t kMaxVocabulary = 1u << 24;
constexpr uint32_t kMaxLayers = 1024;
constexpr uint32_t kMaxHeadDim = 1024;

Failure format_error(std::string text) {
  return {PSLM_ERROR_FORMAT, "invalid model.slm: " + std::move(text)};
}

bool in_range(uint32_t value, uint32_t maximum) { return value >= 1 && value <= maximum; }

std::string describe(const Section& s) {
  return "section of role " + std::to_string(s.role) + ", layer " + std::to_string(s.layer);
}

}  // namespace

ModelFile::~ModelFile() {
  if (mapped_) munmap(const_cast<uint8_t*>(data_), bytes_);
}

Failure ModelFile::open(const char* path) {
  // Not to wait for the other end where a pipe lies in its place.
  const int file = ::open(path, O_RDONLY | O_CLOEXEC | O_NONBLOCK);
  if (file < 0)
    return {PSLM_ERROR_FILE, "cannot open " + std::string(path) + ": " + std::strerror(errno)};
  struct stat info;
  void* mapped = MAP_FAILED;
  const bool regular = fstat(file, &info) == 0 && S_ISREG(info.st_mode);
  const size_t bytes = regular ? static_cast<size_t>(info.st_size) : 0;
  if (bytes) mapped = mmap(nullptr, bytes, PROT_READ, MAP_SHARED, file, 0);
  const int map_error = errno;
  ::close(file);
  if (!regular) return {PSLM_ERROR_FILE, std::string(path) + " is not a regular file"};
  if (bytes && mapped == MAP_FAILED)
    return {PSLM_ERROR_FILE, "cannot map " + std::string(path) + ": " + std::strerror(map_error)};
  mapped_ = bytes != 0;
  return view(mapped, bytes);
}

Failure ModelFile::view(const void* data, size_t bytes) {
  data_ = static_cast<const uint8_t*>(data);
  bytes_ = bytes;
  if (bytes < sizeof(FileHeader)) return format_error("shorter than its header");
  if (reinterpret_cast<uintptr_t>(data) % 64) return format_error("not aligned to 64 bytes");
  std::memcpy(&config, data_, sizeof config);
  if (Failure failure = check_header()) return failure;
  if (Failure failure = take_sections()) return failure;
  return check_complete();
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
  if (!in_range(c.hidden_size, kMaxDimension) || !in_range(c.intermediate_size, kMaxDimension) ||
      !in_range(c.vocab_size, kMaxVocabulary) || !in_range(c.layers, kMaxLayers) ||
      !in_range(c.heads, 1024) || !in_range(c.kv_heads, 1024) ||
      !in_range(c.head_dim, kMaxHeadDim) || !in_range(c.max_context, 1u << 24))
    return format_error("a dimension is zero or too large");
  if (c.hidden_size % kGroup || c.intermediate_size % kGroup ||
      size_t{c.heads} * c.head_dim % kGroup)
    return format_error("hidden, intermediate and attention widths must be multiples of 32");
  if (c.head_dim % 16) return format_error("head_dim must be a multiple of 16");
  if (c.heads % c.kv_heads) return format_error("heads must be a multiple of kv_heads");
  if (c.rope_dim % 2 || c.rope_dim > c.head_dim) return format_error("rope_dim is out of range");
  if (!(c.rms_eps >= 0 && c.rms_eps < 1)) return format_error("rms_eps is out of range");
  if (!std::isfinite(c.rope_scale)) return format_error("rope_scale is not finite");
  for (uint32_t word : c.reserved)
    if (word) return format_error("reserved words are not zero");
  return {};
}

Failure ModelFile::take_sections() {
  const uint64_t table_end = sizeof(FileHeader) + uint64_t{config.sections} * sizeof(Section);
  if (table_end > bytes_) return format_error("the section table ends past the file");
  layers.resize(config.layers);
  const auto read = [&](uint32_t i) {
    Section section;
    std::memcpy(&section, data_ + sizeof(FileHeader) + i * sizeof section, sizeof section);
    return section;
  };
  for (uint32_t i = 0; i < config.sections; ++i) size_layer(read(i));
  if (Failure failure = check_layer_sizes()) return failure;
  for (uint32_t i = 0; i < config.sections; ++i) {
    const Section section = read(i);
    if (section.offset % 64 || section.offset < table_end || section.offset > bytes_ ||
        section.bytes > bytes_ - section.offset)
      return format_error(describe(section) + " lies outside the file or is misaligned");
    if (Failure failure = take(section)) return failure;
  }
  return {};
}

// Layers are as wide as their matrices; all others are held against these three.
void ModelFile::size_layer(const Section& s) {
  if (s.layer >= layers.size()) return;
  Layer& layer = layers[s.layer];
  const auto role = static_cast<Role>(s.role);
  if (role == Role::query) layer.heads = s.rows / config.head_dim;
  if (role == Role::key) layer.kv_heads = s.rows / config.head_dim;
  if (role == Role::gate) layer.intermediate_size = s.rows;
}

Failure ModelFile::check_layer_sizes() const {
  const FileHeader& c = config;
  for (const Layer& l : layers) {
    if (!l.heads || !l.kv_heads || !l.intermediate_size)
      return format_error("a required section is missing");
    const bool full = l.heads == c.heads && l.kv_heads == c.kv_heads &&
                      l.intermediate_size == c.intermediate_size;
    if (!full && (c.version < 2 || l.heads > c.heads || l.kv_heads > c.kv_heads ||
                  l.intermediate_size > c.intermediate_size))
      return format_error("a layer has a wrong shape: its widths are not those of the header");
    if (l.heads % l.kv_heads || size_t{l.heads} * c.head_dim % kGroup ||
        l.intermediate_size % kGroup)
      return format_error("a layer's widths are not the multiples that the operators need");
  }
  return {};
}

Failure ModelFile::take(const Section& s) {
  const FileHeader& c = config;
  const bool in_layer = s.role >= static_cast<uint16_t>(Role::attention_norm) &&
                        s.role <= static_cast<uint16_t>(Role::value_bias);
  if (s.role >= kRoles || s.layer >= (in_layer ? c.layers : 1))
    return format_error(describe(s) + " is unknown");
  const uint8_t* data = data_ + s.offset;

  const auto matrix = [&](Matrix& slot, size_t rows, size_t cols) -> Failure {
    if (slot.data) return format_error(describe(s) + " appears twice");
    if (s.kind >= kWeightKinds) return format_error(describe(s) + " has an unknown weight kind");
    if (s.rows != rows || s.cols != cols) return format_error(describe(s) + " has a wrong shape");
    const WeightKind kind = static_cast<WeightKind>(s.kind);
    slot = {data, kind, rows, cols, block_layout(kind, cols).bytes};
    if (s.bytes != slot.bytes()) return format_error(describe(s) + " has a wrong length");
    return {};
  };
  const auto vector = [&](const float*& slot, size_t cols) -> Failure {
    if (slot) return format_error(describe(s) + " appears twice");
    if (s.kind != kVectorKind || s.rows != 1 || s.cols != cols || s.bytes != cols * sizeof(float))
      return format_error(describe(s) + " has a wrong kind, shape or length");
    slot = reinterpret_cast<const float*>(data);
    return {};
  };
  const auto blob = [&](Blob& slot) -> Failure {
    if (slot.data) return format_error(describe(s) + " appears twice");
    if (s.kind != kBlobKind) return format_error(describe(s) + " has a wrong kind");
    slot = {data, static_cast<size_t>(s.bytes)};
    return {};
  };

  Layer& layer = layers[s.layer];
  const size_t query_width = size_t{layer.heads} * c.head_dim;
  const size_t kv_width = size_t{layer.kv_heads} * c.head_dim;
  const size_t intermediate = layer.intermediate_size;
  switch (static_cast<Role>(s.role)) {
    case Role::embedding: return matrix(embedding, c.vocab_size, c.hidden_size);
    case Role::head: return matrix(head, c.vocab_size, c.hidden_size);
    case Role::final_norm: return vector(final_norm, c.hidden_size);
    case Role::rope_frequencies: return vector(rope_frequencies, c.rope_dim / 2);
    case Role::attention_norm: return vector(layer.attention_norm, c.hidden_size);
    case Role::query: return matrix(layer.query, query_width, c.hidden_size);
    case Role::key: return matrix(layer.key, kv_width, c.hidden_size);
    case Role::value: return matrix(layer.value, kv_width, c.hidden_size);
    case Role::output: return matrix(layer.output, c.hidden_size, query_width);
    case Role::mlp_norm: return vector(layer.mlp_norm, c.hidden_size);
    case Role::gate: return matrix(layer.gate, intermediate, c.hidden_size);
    case Role::up: return matrix(layer.up, intermediate, c.hidden_size);
    case Role::down: return matrix(layer.down, c.hidden_size, intermediate);
    case Role::query_bias: return vector(layer.query_bias, query_width);
    case Role::key_bias: return vector(layer.key_bias, kv_width);
    case Role::value_bias: return vector(layer.value_bias, kv_width);
    case Role::tokenizer: return blob(tokenizer);
    case Role::chat: return blob(chat);
  }
  return format_error(describe(s) + " is unknown");
}

Failure ModelFile::check_complete() const {
  bool complete = embedding.data && final_norm && (rope_frequencies || config.rope_dim == 0);
  for (const Layer& l : layers)
    complete = complete && l.query.data && l.key.data && l.value.data && l.output.data &&
               l.gate.data && l.up.data && l.down.data && l.attention_norm && l.mlp_norm;
  return complete ? Failure{} : format_error("a required section is missing");
}

}  // namespace pocketslm
