// The decoder as an onnxruntime operator, pocketslm::Decoder.
//
//   inputs   input_ids       int64 [1, S]
//            attention_mask  int64 [1, T], all ones; the cache holds T - S positions before
//            model           uint8 [bytes], a constant: a whole model.slm, used where it is mapped
//            logits_to_keep  int64 [1], rows of logits, for the last tokens
//            past...         fp16 [1, kv_heads, L, head_dim], keys and values of each layer in turn
//   outputs  logits          float [1, logits_to_keep, vocab_size]
//            present...      as past; written in place where both are bound to one buffer
//
// L is what the cache can hold, not what it holds, and how positions lie inside is private. The
// session setting `pocketslm.threads` says how many threads to use.
#include <algorithm>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <new>

#include "decoder.h"
#include "onnxruntime_abi.h"

namespace pocketslm::ort {
namespace {

enum Input { kIds, kMask, kModel, kKeep, kFirstCache, kInputs = kFirstCache + 1 };
constexpr const char* kThreads = "pocketslm.threads";

const Api* g_api = nullptr;  // one table for the whole process, set when the library is registered

Status* fault(const std::string& text) {
  return g_api->create_status(kInvalidArgument, ("pocketslm.Decoder: " + text).c_str());
}

struct Tensor {
  void* data = nullptr;
  std::vector<int64_t> shape;

  bool is_row() const { return shape.size() == 2 && shape[0] == 1; }
};

Status* describe(const Value* value, Tensor& out) {
  TensorInfo* info = nullptr;
  if (Status* status = g_api->tensor_info(value, &info)) return status;
  size_t rank = 0;
  Status* status = g_api->dimensions_count(info, &rank);
  out.shape.resize(rank);
  if (!status) status = g_api->dimensions(info, out.shape.data(), rank);
  g_api->release_tensor_info(info);
  return status ? status : g_api->tensor_data(const_cast<Value*>(value), &out.data);
}

Status* read_threads(const KernelInfo* info, uint32_t& threads) {
  KeyValues* settings = nullptr;
  if (Status* status = g_api->config_entries(info, &settings)) return status;
  const char* text = g_api->get_value(settings, kThreads);
  Status* status = nullptr;
  if (text) {
    char* end = nullptr;
    const unsigned long value = std::strtoul(text, &end, 10);
    if (end == text || *end || value < 1 || value > 64)
      status = fault(std::string(kThreads) + " is \"" + text + "\", expected 1 to 64");
    threads = static_cast<uint32_t>(value);
  }
  g_api->release_key_values(settings);
  return status;
}

// Runs f, which returns a status, and turns what it may throw into one.
template <typename F>
Status* guarded(F&& f) {
  try {
    return f();
  } catch (const std::bad_alloc&) {
    return fault("out of memory");
  } catch (const std::exception& failure) {
    return fault(failure.what());
  }
}

Status* create(const KernelInfo* info, void** kernel) {
  int constant = 0;
  const Value* value = nullptr;
  if (Status* status = g_api->constant_input(info, kModel, &constant, &value)) return status;
  if (!constant || !value) return fault("the model must be an initializer");
  Tensor model;
  if (Status* status = describe(value, model)) return status;
  uint32_t threads = 0;
  if (Status* status = read_threads(info, threads)) return status;
  auto decoder = std::make_unique<Decoder>();
  const size_t bytes = model.shape.size() == 1 ? static_cast<size_t>(model.shape[0]) : 0;
  if (const std::string failure = decoder->open(model.data, bytes, threads); !failure.empty())
    return fault(failure);
  *kernel = decoder.release();
  return nullptr;
}

// The output tensor of that shape. A graph may leave one out, and gives null for it.
Status* place(KernelContext* context, size_t index, const std::vector<int64_t>& shape, Tensor& out) {
  Value* value = nullptr;
  out.shape = shape;
  if (Status* status = g_api->output(context, index, shape.data(), shape.size(), &value))
    return status;
  if (!value) return fault("the graph leaves output " + std::to_string(index) + " out");
  return g_api->tensor_data(value, &out.data);
}

Status* compute(Decoder& decoder, KernelContext* context) {
  const pslm_model_info& model = decoder.info();
  size_t count = 0, outputs = 0;
  if (Status* status = g_api->input_count(context, &count)) return status;
  if (Status* status = g_api->output_count(context, &outputs)) return status;
  const size_t caches = 2 * size_t{model.layers};
  if (count != kFirstCache + caches || outputs != 1 + caches)
    return fault("the graph has " + std::to_string(count) + " inputs and " +
                 std::to_string(outputs) + " outputs, expected " +
                 std::to_string(kFirstCache + caches) + " and " + std::to_string(1 + caches));
  std::vector<Tensor> inputs(count);
  for (size_t i = 0; i < count; ++i) {
    const Value* value = nullptr;
    if (Status* status = g_api->input(context, i, &value)) return status;
    if (i == kModel) continue;
    if (!value) return fault("the graph leaves input " + std::to_string(i) + " out");
    if (Status* status = describe(value, inputs[i])) return status;
  }
  const Tensor &ids = inputs[kIds], &mask = inputs[kMask], &keep = inputs[kKeep];
  if (!ids.is_row() || !mask.is_row()) return fault("only a batch of 1 is supported");
  const int64_t fresh = ids.shape[1], total = mask.shape[1];
  const int64_t* ones = static_cast<const int64_t*>(mask.data);
  if (total < fresh || std::any_of(ones, ones + total, [](int64_t one) { return one != 1; }))
    return fault("attention_mask must be ones for all tokens so far; padding is not supported");
  if (keep.shape != std::vector<int64_t>{1}) return fault("logits_to_keep must be one number");
  const int64_t rows = *static_cast<const int64_t*>(keep.data);
  if (rows < 0 || rows > fresh) return fault("logits_to_keep must be from 0 to the tokens given");

  Decoder::Step step{};
  step.tokens = static_cast<const int64_t*>(ids.data);
  step.count = static_cast<size_t>(fresh);
  step.past = static_cast<size_t>(total - fresh);
  step.rows = static_cast<size_t>(rows);
  if (inputs[kFirstCache].shape.size() != 4) return fault("a cache tensor must have 4 dimensions");
  const int64_t positions = inputs[kFirstCache].shape[2];
  if (positions < total)
    return fault("the cache has room for " + std::to_string(positions) + " positions, " +
                 std::to_string(total) +
                 " are needed: bind past and present to one buffer of the full length");
  step.positions = static_cast<size_t>(positions);
  for (size_t i = kFirstCache; i < count; ++i) {
    const auto [heads, head_dim] = decoder.shape((i - kFirstCache) / 2);
    const std::vector<int64_t> shape = {1, heads, positions, head_dim};
    if (inputs[i].shape != shape)
      return fault("cache tensor " + std::to_string(i - kFirstCache) + " must be [1, " +
                   std::to_string(heads) + ", " + std::to_string(positions) + ", " +
                   std::to_string(head_dim) + "]");
    Tensor present;
    if (Status* status = place(context, 1 + i - kFirstCache, shape, present)) return status;
    const size_t bytes = 2 * heads * step.positions * head_dim;
    if (present.data != inputs[i].data) std::memmove(present.data, inputs[i].data, bytes);
    step.caches.push_back(present.data);
  }
  Tensor logits;
  if (Status* status = place(context, 0, {1, rows, model.output_size}, logits)) return status;
  step.logits = static_cast<float*>(logits.data);
  const std::string failure = decoder.run(step);
  return failure.empty() ? nullptr : fault(failure);
}

CustomOp make_operator() {
  CustomOp op;
  op.name = [](const CustomOp*) { return "Decoder"; };
  op.provider = [](const CustomOp*) -> const char* { return nullptr; };  // the CPU
  op.inputs = [](const CustomOp*) -> size_t { return kInputs; };
  op.input_type = [](const CustomOp*, size_t index) {
    return index == kModel ? kUint8 : index == kFirstCache ? kFloat16 : kInt64;
  };
  op.outputs = [](const CustomOp*) -> size_t { return 2; };
  op.output_type = [](const CustomOp*, size_t index) { return index ? kFloat16 : kFloat; };
  op.input_characteristic = [](const CustomOp*, size_t index) {
    return index == kFirstCache ? kVariadic : kRequired;
  };
  op.output_characteristic = [](const CustomOp*, size_t index) {
    return index ? kVariadic : kRequired;
  };
  op.input_memory = [](const CustomOp*, size_t) { return 0; };  // the provider's own
  op.variadic_input_minimum = op.variadic_output_minimum = [](const CustomOp*) { return 2; };
  op.variadic_input_same_type = op.variadic_output_same_type = [](const CustomOp*) { return 1; };
  op.create = [](const CustomOp*, const void*, const KernelInfo* info, void** kernel) {
    return guarded([&] { return create(info, kernel); });
  };
  op.compute = [](void* kernel, KernelContext* context) {
    return guarded([&] { return compute(*static_cast<Decoder*>(kernel), context); });
  };
  op.destroy = [](void* kernel) { delete static_cast<Decoder*>(kernel); };
  return op;
}

}  // namespace
}  // namespace pocketslm::ort

// What onnxruntime calls of a library of custom operators.
extern "C" PSLM_API pocketslm::ort::Status* RegisterCustomOps(
    pocketslm::ort::SessionOptions* options, const pocketslm::ort::ApiBase* base) {
  using namespace pocketslm::ort;
  const void* const* table = base->get_api(kApiVersion);
  if (!table)
    return entry<decltype(Api::create_status)>(base->get_api(1), 0)(
        kFail, "pocketslm's operators need onnxruntime 1.24 or newer");
  static const Api api(table);
  static const CustomOp decoder = make_operator();
  static Domain* domain = nullptr;  // lives as long as the process
  g_api = &api;
  if (!domain) {
    if (Status* status = api.create_domain("pocketslm", &domain)) return status;
    if (Status* status = api.domain_add(domain, &decoder)) return status;
  }
  return api.add_domain(options, domain);
}
