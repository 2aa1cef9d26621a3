#include "program.h"

#include <algorithm>
#include <cmath>
#include <tuple>
#include <utility>

#include "finite.h"
#include "kernels.h"

namespace pocketslm {
namespace {

constexpr uint32_t kMaxHeads = 1024, kMaxTaps = 64;
constexpr uint32_t kMaxWindow = 1u << 24;

struct Fault {
  std::string text;
};

const char* name_of(Code code) {
  switch (code) {
    case Code::embed: return "embed";
    case Code::norm: return "norm";
    case Code::project: return "project";
    case Code::attend: return "attend";
    case Code::project_add: return "project_add";
    case Code::gated: return "gated";
    case Code::short_conv: return "short_conv";
    case Code::head: return "head";
  }
  return "unknown";
}

// How many of its sections, sizes and numbers an operation has, and whether it names a norm.
struct Arity {
  size_t sections, sizes, numbers;
  bool norm;
};
Arity arity_of(Code code) {
  switch (code) {
    case Code::embed: return {2, 0, 1, false};
    case Code::norm: return {2, 3, 1, true};
    case Code::project: return {8, 0, 1, true};
    case Code::attend: return {3, 7, 5, false};
    case Code::project_add: return {4, 1, 2, true};
    case Code::gated: return {6, 1, 1, true};
    case Code::short_conv: return {2, 3, 0, false};
    case Code::head: return {4, 0, 3, true};
  }
  return {};
}

bool finite_halves(const uint16_t* halves, size_t count) {
  return std::none_of(halves, halves + count, [](uint16_t h) { return (h & 0x7c00) == 0x7c00; });
}

class Resolver {
 public:
  Resolver(const SectionTable& table, const ProgramLimits& limits, Program& program)
      : table_(table), limits_(limits), program_(program), used_(table.sections.size()) {}

  void run(const std::vector<OperationRecord>& operations, const std::vector<StateRecord>& states,
           bool all_used);

 private:
  [[noreturn]] void fail(const std::string& what) const {
    std::string text = "operation " + std::to_string(index_);
    if (record_) {
      text += " (" + std::string(name_of(static_cast<Code>(record_->code)));
      if (record_->layer != kNone) text += ", layer " + std::to_string(record_->layer);
      text += ")";
    }
    throw Fault{text + ": " + what};
  }
  void check(bool good, const char* what) const {
    if (!good) fail(what);
  }

  const Section* section(size_t slot);
  const Matrix* matrix(size_t slot, size_t rows, size_t cols);  // 0 rows or columns: any
  const Matrix* required_matrix(size_t slot, size_t rows, size_t cols);
  const float* vector(size_t slot, size_t size);
  Norm norm(size_t weight_slot, size_t size, float eps);
  float factor(size_t slot) const;  // a number that must not be 0
  float at_least_zero(size_t slot, const char* what) const;

  void check_states() const;
  void check_form() const;
  size_t input(BufferId buffer) const;
  void fill(BufferId buffer, size_t width);
  void use_state(StateKind kind, const uint32_t (&sizes)[3], bool reads_only);
  void embed();
  void normalize();
  void project();
  void attend();
  void project_add();
  void gated();
  void short_conv();
  void head();
  void complete_norms();
  void set_counters();

  const SectionTable& table_;
  const ProgramLimits& limits_;
  Program& program_;
  std::vector<bool> used_, stored_;  // sections, states
  size_t index_ = 0;
  const OperationRecord* record_ = nullptr;
  Step step_;
  size_t widest_one_ = 0, widest_zero_ = 0;  // norms without a weight, without a bias
  // The width of what each buffer holds now, 0 where it is nothing that may be read.
  size_t held_[kBuffers]{};
  // The steps that attended and hidden come from, if they are as these left them.
  size_t pieces_ = kNone, panel_ = kNone;
};

// A section that the record names; null where it names none.
const Section* Resolver::section(size_t slot) {
  const uint32_t at = record_->sections[slot];
  if (at == kNone) return nullptr;
  if (at >= table_.sections.size())
    fail("it names section " + std::to_string(at) + " of " +
         std::to_string(table_.sections.size()));
  used_[at] = true;
  return &table_.sections[at];
}

const Matrix* Resolver::matrix(size_t slot, size_t rows, size_t cols) {
  const Section* s = section(slot);
  if (!s) return nullptr;
  const Matrix& m = table_.matrices[record_->sections[slot]];
  if (!m.data()) fail(describe(*s) + " is not a matrix");
  if ((rows && m.rows != rows) || (cols && m.cols != cols))
    fail(describe(*s) + " has a wrong shape: " + std::to_string(m.rows) + " x " +
         std::to_string(m.cols) + ", expected " + (rows ? std::to_string(rows) : "any") + " x " +
         (cols ? std::to_string(cols) : "any"));
  return &m;
}

const Matrix* Resolver::required_matrix(size_t slot, size_t rows, size_t cols) {
  const Matrix* m = matrix(slot, rows, cols);
  check(m, "a required section is missing");
  return m;
}

const float* Resolver::vector(size_t slot, size_t size) {
  const Section* s = section(slot);
  if (!s) return nullptr;
  if (s->kind != static_cast<uint16_t>(WeightKind::vector) || s->cols != size)
    fail(describe(*s) + " has a wrong kind or shape: expected a vector of " +
         std::to_string(size));
  const float* values = reinterpret_cast<const float*>(table_.data + s->offset);
  if (!all_finite(values, size)) fail(describe(*s) + " holds a value that is not finite");
  return values;
}

Norm Resolver::norm(size_t weight_slot, size_t size, float eps) {
  Norm n;
  n.kind = static_cast<NormKind>(record_->norm);
  n.eps = eps;
  n.weight = vector(weight_slot, size);
  n.bias = vector(weight_slot + 1, size);
  check(n.kind != NormKind::none || (!n.weight && !n.bias), "a weight of no norm");
  check(n.kind == NormKind::layer || !n.bias, "only a layer norm has a bias");
  check(eps >= 0 && eps < 1, "eps is out of range");
  if (n.kind != NormKind::none && !n.weight) widest_one_ = std::max(widest_one_, size);
  if (n.kind == NormKind::layer && !n.bias) widest_zero_ = std::max(widest_zero_, size);
  return n;
}

float Resolver::factor(size_t slot) const {
  const float value = record_->numbers[slot];
  check(value != 0, "a scale or factor is 0");
  return value;
}

float Resolver::at_least_zero(size_t slot, const char* what) const {
  const float value = record_->numbers[slot];
  if (!(value >= 0)) fail(std::string(what) + " is negative");
  return value;
}

void Resolver::check_states() const {
  for (size_t i = 0; i < program_.states.size(); ++i) {
    const StateRecord& s = program_.states[i];
    const uint32_t* sizes = s.sizes;
    const std::string which = "state " + std::to_string(i);
    switch (static_cast<StateKind>(s.kind)) {
      case StateKind::kv:
        if (!sizes[0] || sizes[0] > kMaxHeads || !sizes[1] || sizes[1] > kMaxHeadDim ||
            sizes[1] % 16 || sizes[2] > kMaxWindow)
          throw Fault{which + " has sizes that are out of range"};
        break;
      case StateKind::conv:
        if (!sizes[0] || sizes[0] > kMaxDimension || sizes[0] % kGroup || sizes[1] < 2 ||
            sizes[1] > kMaxTaps || sizes[2])
          throw Fault{which + " has sizes that are out of range"};
        break;
      default:
        throw Fault{which + " has kind " + std::to_string(s.kind) +
                    ", unknown here: the file needs a newer pocketslm"};
    }
  }
}

// What an operation has no use for must not be there.
void Resolver::check_form() const {
  const OperationRecord& r = *record_;
  const Arity arity = arity_of(static_cast<Code>(r.code));
  for (uint32_t word : r.reserved) check(word == 0, "reserved words are not zero");
  for (float number : r.numbers) check(std::isfinite(number), "a number is not finite");
  for (size_t i = arity.sections; i < std::size(r.sections); ++i)
    check(r.sections[i] == kNone, "it names a section that it has no use for");
  for (size_t i = arity.sizes; i < std::size(r.sizes); ++i)
    check(r.sizes[i] == 0, "it has a size that it has no use for");
  for (size_t i = arity.numbers; i < std::size(r.numbers); ++i)
    check(r.numbers[i] == 0, "it has a number that it has no use for");
  check(r.norm <= static_cast<uint16_t>(NormKind::layer),
        "the norm is unknown here: the file needs a newer pocketslm");
  check(arity.norm || r.norm == 0, "it has a norm that it has no use for");
  constexpr uint32_t known =
      AttendFlag::norm_after_rope | AttendFlag::bidirectional | AttendFlag::reads_only;
  check(!(r.flags & ~(static_cast<Code>(r.code) == Code::attend ? known : 0)),
        "a flag is unknown here: the file needs a newer pocketslm");
  check(r.layer == kNone || r.layer < limits_.layers, "the header has fewer layers");
}

size_t Resolver::input(BufferId buffer) const {
  const size_t width = held_[static_cast<size_t>(buffer)];
  check(width, "it reads a buffer that nothing has filled");
  return width;
}

void Resolver::fill(BufferId buffer, size_t width) {
  const size_t at = static_cast<size_t>(buffer);
  held_[at] = width;
  program_.widths[at] = std::max(program_.widths[at], width);
}

// Every state is stored by one operation; others may read it after that.
void Resolver::use_state(StateKind kind, const uint32_t (&sizes)[3], bool reads_only) {
  const size_t at = record_->sizes[0];
  check(at < program_.states.size(), "it names a state that is not declared");
  const StateRecord& s = program_.states[at];
  check(s.kind == static_cast<uint32_t>(kind), "its state is of another kind");
  check(std::equal(sizes, sizes + 3, s.sizes), "its state has other sizes");
  check(stored_[at] == reads_only, reads_only ? "it reads a state that nothing has stored yet"
                                              : "its state is another operation's too");
  stored_[at] = true;
  step_.state = at;
}

void Resolver::embed() {
  step_.w[0] = required_matrix(0, limits_.vocab_size, limits_.hidden_size);
  step_.w[1] = matrix(1, 0, limits_.hidden_size);
  step_.scale = factor(0);
  if (const Matrix* positions = step_.w[1]) {
    check(positions->rows >= limits_.max_context, "there are fewer positions than the context");
    const size_t count = positions->blocks() * kBlockRows * positions->cols;
    check(positions->kind == WeightKind::f32
              ? all_finite(reinterpret_cast<const float*>(positions->data()), count)
          : positions->kind == WeightKind::f16
              ? finite_halves(reinterpret_cast<const uint16_t*>(positions->data()), count)
              : true,
          "positions hold a value that is not finite");
  }
  fill(BufferId::residual, limits_.hidden_size);
}

void Resolver::normalize() {
  check(record_->sizes[0] < kBuffers,
        "the buffer is unknown here: the file needs a newer pocketslm");
  step_.buffer = static_cast<BufferId>(record_->sizes[0]);
  step_.width = record_->sizes[1], step_.group = record_->sizes[2];
  check(step_.width == input(step_.buffer), "the buffer has another width");
  check(step_.group && step_.width % step_.group == 0, "the group does not divide the width");
  check(record_->norm != 0, "it has no norm");
  step_.norm = norm(0, step_.group, record_->numbers[0]);
  if (step_.buffer == BufferId::attended) {
    if (pieces_ != kNone) program_.steps[pieces_].gathers = true;
    pieces_ = kNone;
  }
  if (step_.buffer == BufferId::hidden) {
    if (panel_ != kNone) program_.steps[panel_].keeps_floats = true;
    panel_ = kNone;
  }
}

void Resolver::project() {
  constexpr BufferId targets[] = {BufferId::query, BufferId::key, BufferId::value};
  step_.norm = norm(0, limits_.hidden_size, record_->numbers[0]);
  for (size_t i = 0; i < 3; ++i) {
    step_.w[i] = i ? matrix(2 + i, 0, limits_.hidden_size)
                   : required_matrix(2, 0, limits_.hidden_size);
    if (!step_.w[i]) {
      check(record_->sections[5 + i] == kNone, "a bias without a matrix");
      continue;
    }
    check(i == 0 || step_.w[i - 1], "matrices are the first ones or none");
    check(step_.w[i]->rows % kBlockRows == 0 && step_.w[i]->rows <= kMaxDimension,
          "a width is too large or not a multiple of 16");
    step_.bias[i] = vector(5 + i, step_.w[i]->rows);
    step_.reads_floats |= !is_quantized(step_.w[i]->kind);
    fill(targets[i], step_.w[i]->rows);
  }
}

void Resolver::attend() {
  const OperationRecord& r = *record_;
  const auto [state, heads, kv_heads, head_dim, rope_dim, window, step] =
      std::tie(r.sizes[0], r.sizes[1], r.sizes[2], r.sizes[3], r.sizes[4], r.sizes[5], r.sizes[6]);
  check(heads && heads <= kMaxHeads && kv_heads && heads % kv_heads == 0,
        "heads must be a multiple of kv_heads");
  check(head_dim && head_dim <= kMaxHeadDim && head_dim % 16 == 0,
        "head_dim must be a multiple of 16");
  check(heads * head_dim % kGroup == 0, "the attention width must be a multiple of 32");
  check(rope_dim % 2 == 0 && rope_dim <= head_dim, "rope_dim is out of range");
  check(window <= kMaxWindow, "the window is out of range");
  step_.flags = r.flags;
  const bool reads_only = step_.has(AttendFlag::reads_only);
  use_state(StateKind::kv, {kv_heads, head_dim, window}, reads_only);
  check(input(BufferId::query) == size_t{heads} * head_dim, "the query has another width");
  if (!reads_only) {
    check(input(BufferId::key) == size_t{kv_heads} * head_dim, "the key has another width");
    check(input(BufferId::value) == size_t{kv_heads} * head_dim, "the value has another width");
    held_[static_cast<size_t>(BufferId::key)] = 0;  // it is rotated in place
  }
  const float* frequencies = vector(0, rope_dim / 2);
  check(!rope_dim == !frequencies, "rope_dim and rotary frequencies go together");
  if (frequencies) {
    const Rotary rotary{frequencies, rope_dim / 2, factor(3)};
    auto& all = program_.rotaries;
    const auto found = std::find_if(all.begin(), all.end(), [&](const Rotary& other) {
      return other.frequencies == rotary.frequencies && other.factor == rotary.factor;
    });
    step_.rotary = static_cast<size_t>(found - all.begin());
    if (found == all.end()) all.push_back(rotary);
  }
  step_.query_norm = vector(1, head_dim);
  step_.key_norm = vector(2, head_dim);
  check(!reads_only || !step_.key_norm, "keys that were stored before get no norm");
  check(!step_.has(AttendFlag::norm_after_rope) || step_.query_norm || step_.key_norm,
        "norm_after_rope without a norm");
  step_.norm.eps = at_least_zero(2, "eps");
  check(step_.norm.eps < 1, "eps is out of range");
  step_.heads = heads, step_.kv_heads = kv_heads, step_.head_dim = head_dim;
  step_.window = window, step_.width = size_t{heads} * head_dim;
  step_.scale = factor(0);
  step_.cap = at_least_zero(1, "the score cap");
  step_.temperature = r.numbers[4], step_.temperature_step = step;
  check(!step == !step_.temperature, "a temperature and its step go together");
  program_.bidirectional |= step_.has(AttendFlag::bidirectional);
  program_.widest_heads = std::max<size_t>(program_.widest_heads, heads);
  program_.widest_kv_heads = std::max<size_t>(program_.widest_kv_heads, kv_heads);
  program_.widest_head_dim = std::max<size_t>(program_.widest_head_dim, head_dim);
  fill(BufferId::attended, step_.width);
  pieces_ = index_;
}

void Resolver::project_add() {
  step_.buffer = static_cast<BufferId>(record_->sizes[0]);
  check(step_.buffer == BufferId::attended || step_.buffer == BufferId::hidden,
        "its input must be attended or hidden");
  step_.w[0] = required_matrix(0, limits_.hidden_size, input(step_.buffer));
  step_.bias[0] = vector(1, limits_.hidden_size);
  step_.norm = norm(2, limits_.hidden_size, record_->numbers[1]);
  step_.scale = factor(0);
  step_.source = step_.buffer == BufferId::attended ? pieces_ : panel_;
  if (step_.buffer == BufferId::hidden && panel_ != kNone && !is_quantized(step_.w[0]->kind))
    program_.steps[panel_].keeps_floats = true;
}

void Resolver::gated() {
  check(record_->sizes[0] < kActivations,
        "the activation is unknown here: the file needs a newer pocketslm");
  step_.activation = static_cast<Activation>(record_->sizes[0]);
  step_.norm = norm(0, limits_.hidden_size, record_->numbers[0]);
  step_.w[1] = required_matrix(3, 0, limits_.hidden_size);
  step_.width = step_.w[1]->rows;
  check(step_.width % kGroup == 0 && step_.width <= kMaxDimension,
        "the width is too large or not a multiple of 32");
  step_.w[0] = matrix(2, step_.width, limits_.hidden_size);
  step_.bias[0] = vector(4, step_.width);
  step_.bias[1] = vector(5, step_.width);
  check(step_.w[0] || !step_.bias[0], "a bias without a matrix");
  for (const Matrix* w : {step_.w[0], step_.w[1]})
    step_.reads_floats |= w && !is_quantized(w->kind);
  fill(BufferId::hidden, step_.width);
  panel_ = index_;
}

void Resolver::short_conv() {
  const uint32_t width = record_->sizes[1], taps = record_->sizes[2];
  use_state(StateKind::conv, {width, taps, 0}, false);
  for (BufferId buffer : {BufferId::query, BufferId::key, BufferId::value})
    check(input(buffer) == width, "query, key and value must be as wide as the convolution");
  step_.width = width, step_.tap_count = taps;
  step_.taps = vector(0, size_t{width} * taps);
  check(step_.taps, "a required section is missing");
  step_.bias[0] = vector(1, width);
  held_[static_cast<size_t>(BufferId::query)] = 0;  // it is multiplied in place
  fill(BufferId::attended, width);
  pieces_ = kNone;
}

void Resolver::head() {
  step_.norm = norm(0, limits_.hidden_size, record_->numbers[0]);
  step_.w[0] = matrix(2, limits_.vocab_size, limits_.hidden_size);
  step_.bias[0] = vector(3, limits_.vocab_size);
  step_.scale = factor(1);
  step_.cap = at_least_zero(2, "the cap of the logits");
  check(step_.scale > 0, "the factor of the logits is negative");
  check(step_.w[0] || (!step_.bias[0] && step_.scale == 1 && !step_.cap),
        "without a matrix there is nothing to scale, cap or add");
}

// Weights and biases that the file leaves out.
void Resolver::complete_norms() {
  program_.ones.assign(widest_one_, 1.0f);
  program_.zeros.assign(widest_zero_, 0.0f);
  for (Step& step : program_.steps) {
    Norm& n = step.norm;
    if (n.kind != NormKind::none && !n.weight) n.weight = program_.ones.data();
    if (n.kind == NormKind::layer && !n.bias) n.bias = program_.zeros.data();
  }
}

// Norms count to the operation that they feed.
void Resolver::set_counters() {
  uint64_t pslm_times::* next = nullptr;
  for (size_t i = program_.steps.size(); i-- > 0;) {
    Step& step = program_.steps[i];
    switch (step.code) {
      case Code::embed: step.counter = &pslm_times::embedding_ns; break;
      case Code::project: step.counter = &pslm_times::qkv_ns; break;
      case Code::attend:
      case Code::short_conv: step.counter = &pslm_times::attention_ns; break;
      case Code::gated: step.counter = &pslm_times::gate_up_ns; break;
      case Code::head: step.counter = &pslm_times::head_ns; break;
      case Code::norm: step.counter = next; break;
      case Code::project_add:
        step.counter = step.buffer == BufferId::attended ? &pslm_times::output_ns
                                                         : &pslm_times::down_ns;
    }
    next = step.counter;
  }
}

void Resolver::run(const std::vector<OperationRecord>& operations,
                   const std::vector<StateRecord>& states, bool all_used) {
  if (operations.size() < 2 || operations.size() > kMaxOperations)
    throw Fault{"a program of " + std::to_string(operations.size()) +
                " operations, expected 2 to " + std::to_string(kMaxOperations)};
  if (states.size() > kMaxOperations) throw Fault{"more states than operations"};
  program_.states = states;
  program_.hidden_size = limits_.hidden_size;
  check_states();
  stored_.resize(states.size());
  program_.steps.reserve(operations.size());
  for (index_ = 0; index_ < operations.size(); ++index_) {
    record_ = &operations[index_];
    const Code code = static_cast<Code>(record_->code);
    if (!arity_of(code).sections)
      throw Fault{"operation " + std::to_string(index_) + " has code " +
                  std::to_string(record_->code) +
                  ", unknown here: the file needs a newer pocketslm"};
    check_form();
    check((code == Code::embed) == (index_ == 0) &&
              (code == Code::head) == (index_ + 1 == operations.size()),
          "a program begins with embed, ends with head, and has neither in between");
    step_ = Step{};
    step_.code = code, step_.layer = record_->layer;
    switch (code) {
      case Code::embed: embed(); break;
      case Code::norm: normalize(); break;
      case Code::project: project(); break;
      case Code::attend: attend(); break;
      case Code::project_add: project_add(); break;
      case Code::gated: gated(); break;
      case Code::short_conv: short_conv(); break;
      case Code::head: head(); break;
    }
    program_.steps.push_back(step_);
  }
  for (size_t i = 0; i < states.size(); ++i)
    if (!stored_[i])
      throw Fault{"state " + std::to_string(i) + " is declared, but nothing stores it"};
  for (size_t i = 0; all_used && i < used_.size(); ++i)
    if (!used_[i] && table_.sections[i].kind != static_cast<uint16_t>(WeightKind::blob))
      throw Fault{describe(table_.sections[i]) + " (number " + std::to_string(i) +
                  ") is used by no operation"};
  complete_norms();
  set_counters();
}

}  // namespace

size_t Program::widest() const { return *std::max_element(widths, widths + kBuffers); }

std::string describe(const Section& s) {
  return "section of role " + std::to_string(s.role) + ", layer " + std::to_string(s.layer);
}

Failure format_error(std::string text) {
  return {PSLM_ERROR_FORMAT, "invalid model.slm: " + std::move(text)};
}

Failure resolve(const SectionTable& table, const ProgramLimits& limits,
                const std::vector<OperationRecord>& operations,
                const std::vector<StateRecord>& states, bool all_used, Program& program) {
  try {
    Resolver(table, limits, program).run(operations, states, all_used);
  } catch (const Fault& fault) {
    return format_error(fault.text);
  }
  return {};
}

}  // namespace pocketslm
