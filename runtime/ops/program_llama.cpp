// The program of versions 1 and 2, whose weights are found by their roles.
#include <cmath>

#include "model_file.h"

namespace pocketslm {
namespace {

constexpr uint32_t kRoles = static_cast<uint32_t>(Role::chat) + 1;

bool in_layers(uint32_t role) {
  return role >= static_cast<uint32_t>(Role::attention_norm) &&
         role <= static_cast<uint32_t>(Role::value_bias);
}

// Where each role of each layer is in the table; those outside the layers are layer 0's.
class Roles {
 public:
  explicit Roles(uint32_t layers) : at_(size_t{layers} * kRoles, kNone) {}
  uint32_t& at(uint32_t role, uint32_t layer) { return at_[size_t{layer} * kRoles + role]; }
  uint32_t at(Role role, uint32_t layer = 0) const {
    return at_[size_t{layer} * kRoles + static_cast<uint32_t>(role)];
  }

 private:
  std::vector<uint32_t> at_;
};

Failure check_sizes(const FileHeader& c) {
  if (!c.heads || c.heads > 1024 || !c.kv_heads || c.kv_heads > 1024 || !c.head_dim ||
      c.head_dim > 1024 || !c.intermediate_size || c.intermediate_size > kMaxDimension)
    return format_error("a dimension is zero or too large");
  if (c.intermediate_size % kGroup || size_t{c.heads} * c.head_dim % kGroup)
    return format_error("hidden, intermediate and attention widths must be multiples of 32");
  if (c.head_dim % 16) return format_error("head_dim must be a multiple of 16");
  if (c.heads % c.kv_heads) return format_error("heads must be a multiple of kv_heads");
  if (c.rope_dim % 2 || c.rope_dim > c.head_dim) return format_error("rope_dim is out of range");
  if (!(c.rms_eps >= 0 && c.rms_eps < 1)) return format_error("rms_eps is out of range");
  if (!std::isfinite(c.rope_scale)) return format_error("rope_scale is not finite");
  return {};
}

OperationRecord operation(Code code, uint32_t layer, NormKind norm = NormKind::none) {
  OperationRecord record{};
  record.code = static_cast<uint16_t>(code);
  record.norm = static_cast<uint16_t>(norm);
  record.layer = layer;
  for (uint32_t& section : record.sections) section = kNone;
  return record;
}

}  // namespace

Failure llama_program(const FileHeader& c, const SectionTable& table,
                      std::vector<OperationRecord>& operations, std::vector<StateRecord>& states) {
  if (Failure failure = check_sizes(c)) return failure;
  Roles roles(c.layers);
  for (uint32_t i = 0; i < table.sections.size(); ++i) {
    const Section& s = table.sections[i];
    if (s.role >= kRoles || s.layer >= (in_layers(s.role) ? c.layers : 1))
      return format_error(describe(s) + " is unknown");
    uint32_t& at = roles.at(s.role, s.layer);
    if (at != kNone) return format_error(describe(s) + " appears twice");
    at = i;
  }
  const auto rows = [&](Role role, uint32_t layer) {
    const uint32_t at = roles.at(role, layer);
    return at == kNone ? 0 : table.sections[at].rows;
  };

  OperationRecord embed = operation(Code::embed, kNone);
  embed.sections[0] = roles.at(Role::embedding);
  embed.numbers[0] = 1;
  operations.push_back(embed);
  for (uint32_t i = 0; i < c.layers; ++i) {
    for (Role role : {Role::attention_norm, Role::query, Role::key, Role::value, Role::output,
                      Role::mlp_norm, Role::gate, Role::up, Role::down})
      if (roles.at(role, i) == kNone)
        return format_error("a required section is missing: role " +
                            std::to_string(static_cast<uint32_t>(role)) + " of layer " +
                            std::to_string(i));
    const uint32_t heads = rows(Role::query, i) / c.head_dim;
    const uint32_t kv_heads = rows(Role::key, i) / c.head_dim;
    const uint32_t intermediate = rows(Role::gate, i);
    const bool full =
        heads == c.heads && kv_heads == c.kv_heads && intermediate == c.intermediate_size;
    if (!full && (c.version < 2 || heads > c.heads || kv_heads > c.kv_heads ||
                  intermediate > c.intermediate_size))
      return format_error("a layer has a wrong shape: its widths are not those of the header");

    OperationRecord project = operation(Code::project, i, NormKind::rms);
    const Role inputs[] = {Role::query,      Role::key,      Role::value,
                           Role::query_bias, Role::key_bias, Role::value_bias};
    project.sections[0] = roles.at(Role::attention_norm, i);
    for (size_t k = 0; k < 6; ++k) project.sections[2 + k] = roles.at(inputs[k], i);
    project.numbers[0] = c.rms_eps;

    OperationRecord attend = operation(Code::attend, i);
    if (c.rope_dim) attend.sections[0] = roles.at(Role::rope_frequencies);
    const uint32_t sizes[] = {i, heads, kv_heads, c.head_dim, c.rope_dim};
    for (size_t k = 0; k < 5; ++k) attend.sizes[k] = sizes[k];
    attend.numbers[0] = 1.0f / std::sqrt(static_cast<float>(c.head_dim));
    attend.numbers[3] = c.rope_scale;

    OperationRecord output = operation(Code::project_add, i);
    output.sections[0] = roles.at(Role::output, i);
    output.sizes[0] = static_cast<uint32_t>(BufferId::attended);
    output.numbers[0] = 1;

    OperationRecord gated = operation(Code::gated, i, NormKind::rms);
    gated.sections[0] = roles.at(Role::mlp_norm, i);
    gated.sections[2] = roles.at(Role::gate, i);
    gated.sections[3] = roles.at(Role::up, i);
    gated.sizes[0] = static_cast<uint32_t>(Activation::silu);
    gated.numbers[0] = c.rms_eps;

    OperationRecord down = operation(Code::project_add, i);
    down.sections[0] = roles.at(Role::down, i);
    down.sizes[0] = static_cast<uint32_t>(BufferId::hidden);
    down.numbers[0] = 1;

    operations.insert(operations.end(), {project, attend, output, gated, down});
    states.push_back({static_cast<uint32_t>(StateKind::kv), {kv_heads, c.head_dim, 0}});
  }
  OperationRecord head = operation(Code::head, kNone, NormKind::rms);
  head.sections[0] = roles.at(Role::final_norm);
  head.sections[2] = roles.at(roles.at(Role::head) == kNone ? Role::embedding : Role::head);
  head.numbers[0] = c.rms_eps, head.numbers[1] = 1;
  if (head.sections[0] == kNone || head.sections[2] == kNone)
    return format_error("a required section is missing");
  operations.push_back(head);
  return {};
}

}  // namespace pocketslm
