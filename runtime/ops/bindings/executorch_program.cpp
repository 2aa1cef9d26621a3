// Memory is taken as it is touched: planned buffers, the KV cache among them, are anonymous
// mappings, and each segment of the file is mapped until ExecuTorch frees it, which XNNPACK does as
// soon as it has packed the weights.
#include "executorch_program.h"

#include <fcntl.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <array>
#include <atomic>
#include <cerrno>
#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <limits>
#include <memory>
#include <new>
#include <optional>
#include <string>
#include <thread>
#include <utility>
#include <vector>

#include <executorch/runtime/executor/program.h>
#include <executorch/runtime/platform/runtime.h>

#include "executorch_threads.h"

// ExecuTorch's attention multiplies by torch's BLAS, which would start OpenMP's threads within each
// of the pool's. OpenMP keeps the number of threads for each thread that asks.
extern "C" {
__attribute__((weak)) void omp_set_num_threads(int);
__attribute__((weak)) int omp_get_max_threads(void);
}

using namespace executorch::runtime;
using executorch::aten::ScalarType;
using executorch::aten::Tensor;
using executorch::aten::TensorImpl;

namespace {

using Steady = std::chrono::steady_clock;

constexpr const char* kForward = "forward";

// What ExecuTorch logs while a function of ours runs: the first error is the reason for it to fail.
thread_local std::string* t_reason = nullptr;
pal_emit_log_message_method g_emit = nullptr;  // what was registered before

void keep_reason(et_timestamp_t time, et_pal_log_level_t level, const char* file,
                 const char* function, size_t line, const char* message, size_t length) {
  if (!t_reason) {
    g_emit(time, level, file, function, line, message, length);
  } else if (t_reason->empty() && (level == kError || level == kFatal)) {
    try {
      t_reason->assign(message, length);
    } catch (const std::bad_alloc&) {  // the failure goes without a reason
    }
  }
}

class Reason {
 public:
  Reason() {
    // In place: register_pal writes a warning where Python's bindings have registered theirs.
    static const bool hooked = [] {
      runtime_init();
      auto* pal = const_cast<PalImpl*>(get_pal_impl());
      g_emit = std::exchange(pal->emit_log_message, keep_reason);
      return true;
    }();
    (void)hooked;
    t_reason = &text_;
  }
  ~Reason() { t_reason = nullptr; }

  pslm_status report(pslm_error error, pslm_status status, const char* what) const {
    const char* colon = text_.empty() ? "" : ": ";
    if (error.text && error.capacity)
      std::snprintf(error.text, error.capacity, "%s%s%s", what, colon, text_.c_str());
    return status;
  }

  // Runs f, which returns a status, and turns what it may throw into one.
  template <typename F>
  pslm_status guard(pslm_error error, F&& f) const {
    try {
      return f();
    } catch (const std::bad_alloc&) {
      return report(error, PSLM_ERROR_MEMORY, "out of memory");
    } catch (const std::exception& failure) {
      return report(error, PSLM_ERROR_MEMORY, failure.what());
    }
  }

 private:
  std::string text_;
};

// While it lives, the calling thread multiplies alone.
class OneThread {
 public:
  OneThread() {
    if (omp_set_num_threads) omp_set_num_threads(1);
  }
  ~OneThread() {
    if (omp_set_num_threads) omp_set_num_threads(before_);
  }

 private:
  int before_ = omp_get_max_threads ? omp_get_max_threads() : 1;
};

// The file, mapped piece by piece.
class Loader : public DataLoader {
 public:
  ~Loader() override {
    if (file_ >= 0) close(file_);
  }
  bool open(const char* path) {
    struct stat status;
    file_ = ::open(path, O_RDONLY | O_CLOEXEC);
    if (file_ < 0 || fstat(file_, &status) != 0) return false;
    bytes_ = static_cast<size_t>(status.st_size);
    return true;
  }
  Result<FreeableBuffer> load(size_t offset, size_t size, const SegmentInfo&) const override {
    if (offset > bytes_ || size > bytes_ - offset) return Error::InvalidArgument;
    if (size == 0) return FreeableBuffer(nullptr, 0, nullptr);
    const size_t before = offset % page();
    void* begin = mmap(nullptr, size + before, PROT_READ, MAP_PRIVATE, file_,
                       static_cast<off_t>(offset - before));
    if (begin == MAP_FAILED) return Error::MemoryAllocationFailed;
    return FreeableBuffer(static_cast<uint8_t*>(begin) + before, size, unmap);
  }
  Result<size_t> size() const override { return bytes_; }

 private:
  static size_t page() { return static_cast<size_t>(sysconf(_SC_PAGESIZE)); }
  static void unmap(void*, void* data, size_t size) {
    const size_t before = reinterpret_cast<uintptr_t>(data) % page();
    munmap(static_cast<uint8_t*>(data) - before, size + before);
  }

  int file_ = -1;
  size_t bytes_ = 0;
};

// Each piece from malloc; all are freed together.
class Pieces : public MemoryAllocator {
 public:
  Pieces() : MemoryAllocator(0, nullptr) {}
  ~Pieces() override { reset(); }
  void* allocate(size_t size, size_t alignment) override {
    void* piece = nullptr;
    if (posix_memalign(&piece, std::max(alignment, sizeof(void*)), size) != 0) return nullptr;
    pieces_.push_back(piece);
    return piece;
  }
  void reset() override {
    for (void* piece : pieces_) std::free(piece);
    pieces_.clear();
  }

 private:
  std::vector<void*> pieces_;
};

// A method and all memory that it works in.
class Loaded {
 public:
  ~Loaded() {
    method_.reset();
    for (const Span<uint8_t>& buffer : buffers_) munmap(buffer.data(), buffer.size());
  }
  bool load(const Program& program, const char* name, Span<const Kernel> kernels = {}) {
    const auto meta = program.method_meta(name);
    if (!meta.ok()) return false;
    for (size_t i = 0; i < meta->num_memory_planned_buffers(); ++i) {
      const auto bytes = meta->memory_planned_buffer_size(i);
      if (!bytes.ok()) return false;
      const size_t size = std::max<size_t>(1, static_cast<size_t>(*bytes));
      void* buffer = mmap(nullptr, size, PROT_READ | PROT_WRITE,
                          MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
      if (buffer == MAP_FAILED) return false;
      buffers_.push_back({static_cast<uint8_t*>(buffer), size});
    }
    planned_.emplace(Span<Span<uint8_t>>{buffers_.data(), buffers_.size()});
    memory_.emplace(&own_, &*planned_, &scratch_);
    // XNNPACK's cache of packed weights stays off: it lets go of constants that are not packed, and
    // files whose norms are constants of the delegate crash with it.
    auto method = program.load_method(name, &*memory_, nullptr, nullptr, nullptr, kernels);
    if (!method.ok()) return false;
    method_.emplace(std::move(*method));
    return true;
  }
  Method& operator*() { return *method_; }
  Method* operator->() { return &*method_; }

 private:
  Pieces own_, scratch_;
  std::vector<Span<uint8_t>> buffers_;
  std::optional<HierarchicalAllocator> planned_;
  std::optional<MemoryManager> memory_;
  std::optional<Method> method_;
};

// Timed kernels. A kernel is a bare function, so there is one function a place in the table.
constexpr size_t kClocks = 1024;
struct Clock {
  const char* name;
  OpFunction kernel;
  uint64_t calls, ns;
};
std::array<Clock, kClocks> g_clocks;
std::vector<Kernel> g_timed;

template <size_t I>
void timed(KernelRuntimeContext& context, Span<EValue*> stack) {
  const auto begin = Steady::now();
  g_clocks[I].kernel(context, stack);
  g_clocks[I].ns += static_cast<uint64_t>(
      std::chrono::duration_cast<std::chrono::nanoseconds>(Steady::now() - begin).count());
  ++g_clocks[I].calls;
}

template <size_t... I>
constexpr std::array<OpFunction, sizeof...(I)> table(std::index_sequence<I...>) {
  return {timed<I>...};
}

Span<const Kernel> timed_kernels() {
  static constexpr auto kTimed = table(std::make_index_sequence<kClocks>());
  g_timed.clear();
  g_clocks = {};
  for (const Kernel& kernel : get_registered_kernels()) {
    const size_t place = g_timed.size();
    if (place == kClocks) break;  // what does not fit is looked up in their own registry
    g_clocks[place] = {kernel.name_, kernel.op_, 0, 0};
    g_timed.emplace_back(kernel.name_, kernel.kernel_key_, kTimed[place]);
  }
  return {g_timed.data(), g_timed.size()};
}

}  // namespace

struct pslm_et_program {
  Loader loader;
  std::optional<Program> program;
  std::optional<Loaded> forward;
  size_t vocabulary = 0;  // 0: forward is not loaded
};

void pslm_et_set_threads(uint32_t threads) {
  const Reason reason;
  auto* pool = executorch::extension::threadpool::get_threadpool();
  if (!pool) return;  // the calling thread works alone
  pool->_unsafe_reset_threadpool(threads);
  // One task for each thread: none ends before all have begun, or a while has passed.
  std::atomic<uint32_t> begun{0};
  const auto latest = Steady::now() + std::chrono::milliseconds(200);
  const OneThread caller;
  pool->run(
      [&](size_t) {
        if (omp_set_num_threads) omp_set_num_threads(1);
        ++begun;
        while (begun < threads && Steady::now() < latest) std::this_thread::yield();
      },
      threads);
}

pslm_status pslm_et_open(const char* path, pslm_et_program** program, pslm_error error) {
  const Reason reason;
  *program = nullptr;
  return reason.guard(error, [&] {
    auto opened = std::make_unique<pslm_et_program>();
    if (!opened->loader.open(path))
      return reason.report(error, PSLM_ERROR_FILE, std::strerror(errno));
    auto loaded = Program::load(&opened->loader, Program::Verification::InternalConsistency);
    if (!loaded.ok()) return reason.report(error, PSLM_ERROR_FORMAT, "not a program");
    opened->program.emplace(std::move(*loaded));
    *program = opened.release();
    return PSLM_OK;
  });
}

void pslm_et_close(pslm_et_program* program) {
  const Reason reason;
  delete program;
}

pslm_status pslm_et_numbers(const pslm_et_program* program, const char* method, int64_t* numbers,
                            size_t* count, pslm_error error) {
  const Reason reason;
  return reason.guard(error, [&] {
    Loaded loaded;
    if (!loaded.load(*program->program, method) || loaded->execute() != Error::Ok)
      return reason.report(error, PSLM_ERROR_FORMAT,
                           (std::string("no method ") + method).c_str());
    const size_t room = *count;
    *count = loaded->outputs_size();
    for (size_t i = 0; i < std::min(room, *count); ++i) {
      const EValue& value = loaded->get_output(i);
      if (!value.isInt() && !value.isBool())
        return reason.report(error, PSLM_ERROR_FORMAT,
                             (std::string(method) + " gives no integers").c_str());
      numbers[i] = value.isInt() ? value.toInt() : value.toBool();
    }
    return PSLM_OK;
  });
}

pslm_status pslm_et_load(pslm_et_program* program, int timed, size_t* longest, size_t* vocabulary,
                         pslm_error error) {
  const Reason reason;
  return reason.guard(error, [&] {
    program->vocabulary = 0;
    program->forward.emplace();
    Loaded& forward = *program->forward;
    if (!forward.load(*program->program, kForward,
                      timed ? timed_kernels() : Span<const Kernel>()))
      return reason.report(error, PSLM_ERROR_FORMAT, "forward cannot be loaded");
    const MethodMeta meta = forward->method_meta();
    const auto fits = [](const Result<TensorInfo>& info, size_t rank) {
      return info.ok() && info->scalar_type() == ScalarType::Long && info->sizes().size() == rank;
    };
    if (meta.num_inputs() != 2 || !fits(meta.input_tensor_meta(0), 2) ||
        !fits(meta.input_tensor_meta(1), 1))
      return reason.report(error, PSLM_ERROR_FORMAT,
                           "forward takes other inputs than tokens [1, n] and start [1]");
    const auto logits = meta.output_tensor_meta(0);
    if (!logits.ok() || logits->sizes().size() == 0)
      return reason.report(error, PSLM_ERROR_FORMAT, "forward gives no logits");
    *longest = static_cast<size_t>(meta.input_tensor_meta(0)->sizes()[1]);
    *vocabulary = static_cast<size_t>(logits->sizes()[logits->sizes().size() - 1]);
    program->vocabulary = *vocabulary;
    return PSLM_OK;
  });
}

pslm_status pslm_et_forward(pslm_et_program* program, const int64_t* tokens, size_t count,
                            int64_t start, float* logits, pslm_error error) {
  const Reason reason;
  return reason.guard(error, [&] {
    if (program->vocabulary == 0) return reason.report(error, PSLM_ERROR_ARGUMENT, "not loaded");
    if (!tokens || count == 0 || count > std::numeric_limits<int32_t>::max())
      return reason.report(error, PSLM_ERROR_ARGUMENT, "no tokens, or too many");
    const OneThread caller;
    Method& method = **program->forward;
    int32_t sizes[] = {1, static_cast<int32_t>(count)}, one[] = {1};
    int32_t strides[] = {static_cast<int32_t>(count), 1};
    uint8_t order[] = {0, 1};
    TensorImpl ids(ScalarType::Long, 2, sizes, const_cast<int64_t*>(tokens), order, strides);
    TensorImpl first(ScalarType::Long, 1, one, &start, order, one);
    if (method.set_input(Tensor(&ids), 0) != Error::Ok ||
        method.set_input(Tensor(&first), 1) != Error::Ok || method.execute() != Error::Ok)
      return reason.report(error, PSLM_ERROR_ARGUMENT, "forward failed");
    if (!method.get_output(0).isTensor())
      return reason.report(error, PSLM_ERROR_FORMAT, "forward gives no logits");
    const Tensor& out = method.get_output(0).toTensor();
    const size_t vocabulary = program->vocabulary, values = static_cast<size_t>(out.numel());
    if (values < vocabulary) return reason.report(error, PSLM_ERROR_FORMAT, "no logits came back");
    const auto copy = [&](const auto* from) {
      for (size_t i = 0; i < vocabulary; ++i)
        logits[i] = static_cast<float>(from[values - vocabulary + i]);
    };
    switch (out.scalar_type()) {
      case ScalarType::Float: copy(out.const_data_ptr<float>()); break;
      case ScalarType::Half: copy(out.const_data_ptr<executorch::aten::Half>()); break;
      case ScalarType::BFloat16: copy(out.const_data_ptr<executorch::aten::BFloat16>()); break;
      default: return reason.report(error, PSLM_ERROR_FORMAT, "logits are not floating point");
    }
    return PSLM_OK;
  });
}

size_t pslm_et_clocks(pslm_et_clock* clocks, size_t room) {
  size_t found = 0;
  for (const Clock& clock : g_clocks) {
    if (clock.calls == 0) continue;
    if (found < room) clocks[found] = {clock.name, clock.calls, clock.ns};
    ++found;
  }
  return found;
}
