// The decoder as an ExecuTorch kernel, pocketslm::decoder.out, registered when this library is
// loaded into a process that has ExecuTorch.
//
//   tokens  int64 [1, S]
//   start   int64 [1], positions filled before
//   model   uint8 [bytes], a whole model.slm, used where it lies: aligned to 64 bytes
//   keys    fp16 [KV heads of all layers, positions, head_dim]; how positions lie inside is private
//   values  the same
//   out     float [1, vocab_size], of the last token
#include <algorithm>
#include <cstring>
#include <exception>
#include <list>
#include <memory>

#include <executorch/runtime/kernel/kernel_includes.h>
#include <executorch/runtime/kernel/operator_registry.h>

#include "decoder.h"
#include "executorch_threads.h"
#include "model_file.h"

namespace pocketslm {
namespace {

using executorch::aten::ScalarType;
using executorch::aten::Tensor;
using executorch::runtime::Error;
using executorch::runtime::EValue;
using executorch::runtime::Kernel;
using executorch::runtime::KernelRuntimeContext;
using executorch::runtime::Span;

// Kernels have no state of their own, so decoders are kept here, by where their model lies. A
// program may be unloaded and another mapped in its place, so the header and the table of sections
// are compared at every call.
class Decoders {
 public:
  std::shared_ptr<Decoder> find(const uint8_t* model, size_t bytes, uint32_t threads,
                                std::string& failure) {
    const std::lock_guard<std::mutex> lock(mutex_);
    for (auto entry = entries_.begin(); entry != entries_.end(); ++entry)
      if (entry->model == model && entry->bytes == bytes && entry->threads == threads &&
          std::memcmp(entry->header.data(), model, entry->header.size()) == 0) {
        entries_.splice(entries_.begin(), entries_, entry);
        return entry->decoder;
      }
    auto decoder = std::make_shared<Decoder>();
    failure = decoder->open(model, bytes, threads);
    if (!failure.empty()) return nullptr;
    const size_t sections = reinterpret_cast<const FileHeader*>(model)->sections;
    const size_t header = sizeof(FileHeader) + sections * sizeof(Section);
    entries_.push_front({model, bytes, threads, {model, model + header}, decoder});
    if (entries_.size() > kKept) entries_.pop_back();
    return decoder;
  }

 private:
  static constexpr size_t kKept = 4;
  struct Entry {
    const uint8_t* model;
    size_t bytes;
    uint32_t threads;
    std::vector<uint8_t> header;
    std::shared_ptr<Decoder> decoder;
  };
  std::mutex mutex_;
  std::list<Entry> entries_;  // the last used first
};

bool has(const Tensor& tensor, ScalarType type, ssize_t rank) {
  return tensor.scalar_type() == type && tensor.dim() == rank && tensor.const_data_ptr();
}

std::string decode(const Tensor& tokens, const Tensor& start, const Tensor& model,
                   const Tensor& keys, const Tensor& values, const Tensor& out) {
  static Decoders* decoders = new Decoders;  // never destroyed: threads may outlive main
  if (!has(tokens, ScalarType::Long, 2) || tokens.size(0) != 1) return "tokens must be int64 [1, S]";
  if (!has(start, ScalarType::Long, 1) || start.numel() != 1) return "start must be int64 [1]";
  if (!has(model, ScalarType::Byte, 1)) return "model must be uint8 [bytes]";
  if (!has(keys, ScalarType::Half, 3) || !has(values, ScalarType::Half, 3))
    return "keys and values must be fp16 [heads, positions, head_dim]";
  const auto* pool = executorch::extension::threadpool::get_threadpool();
  const size_t threads = pool ? std::min<size_t>(pool->get_thread_count(), 64) : 1;
  std::string failure;
  const auto decoder =
      decoders->find(model.const_data_ptr<uint8_t>(), static_cast<size_t>(model.numel()),
                     static_cast<uint32_t>(threads), failure);
  if (!decoder) return failure;
  const pslm_model_info& info = decoder->info();
  ssize_t heads = 0;
  for (uint32_t state = 0; state < info.states; ++state) {
    if (decoder->shape(state).head_dim != info.head_dim)
      return "layers differ in head_dim, which one tensor of keys cannot hold";
    heads += decoder->shape(state).kv_heads;
  }
  for (const Tensor* cache : {&keys, &values})
    if (cache->size(0) != heads || cache->size(1) != keys.size(1) ||
        cache->size(2) != static_cast<ssize_t>(info.head_dim))
      return "keys and values must be [" + std::to_string(heads) + ", positions, " +
             std::to_string(info.head_dim) + "]";
  if (!has(out, ScalarType::Float, 2) || out.numel() != static_cast<ssize_t>(info.output_size))
    return "out must be float [1, " + std::to_string(info.output_size) + "]";
  const int64_t past = start.const_data_ptr<int64_t>()[0];
  if (past < 0) return "start is negative";

  Decoder::Step step{};
  step.tokens = tokens.const_data_ptr<int64_t>();
  step.count = static_cast<size_t>(tokens.numel());
  step.past = static_cast<size_t>(past);
  step.positions = static_cast<size_t>(keys.size(1));
  step.rows = 1;
  step.logits = out.mutable_data_ptr<float>();
  uint8_t* key = static_cast<uint8_t*>(keys.mutable_data_ptr());
  uint8_t* value = static_cast<uint8_t*>(values.mutable_data_ptr());
  for (uint32_t state = 0; state < info.states; ++state) {
    step.caches.push_back(key);
    step.caches.push_back(value);
    const size_t bytes = 2 * decoder->shape(state).kv_heads * step.positions * info.head_dim;
    key += bytes, value += bytes;
  }
  return decoder->run(step);
}

// A program says what a kernel gets, so that nothing of it is taken for granted. ExecuTorch knows no
// exceptions.
std::string decode(Span<EValue*> stack) {
  constexpr size_t kTensors = 6;
  if (stack.size() < kTensors) return "there are fewer than 6 arguments";
  for (size_t i = 0; i < kTensors; ++i)
    if (!stack[i] || !stack[i]->isTensor()) return "argument " + std::to_string(i) + " is no tensor";
  const auto tensor = [&](size_t index) -> const Tensor& { return stack[index]->toTensor(); };
  return decode(tensor(0), tensor(1), tensor(2), tensor(3), tensor(4), tensor(5));
}

void run(KernelRuntimeContext& context, Span<EValue*> stack) {
  std::string failure;
  try {
    failure = decode(stack);
  } catch (const std::exception& error) {
    failure = error.what();
  }
  if (failure.empty()) return;
  ET_LOG(Error, "pocketslm::decoder: %s", failure.c_str());
  context.fail(Error::InvalidArgument);
}

const Error g_registered = executorch::runtime::register_kernel(Kernel("pocketslm::decoder.out", run));

}  // namespace
}  // namespace pocketslm
