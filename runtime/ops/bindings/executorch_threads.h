// ExecuTorch's thread pool, one per process. Their header needs pthreadpool's, which ExecuTorch's
// package does not have.
#pragma once

#include <cstddef>
#include <cstdint>

#include <executorch/runtime/core/function_ref.h>

namespace executorch::extension::threadpool {
class ThreadPool {
 public:
  size_t get_thread_count() const;
  bool _unsafe_reset_threadpool(uint32_t threads);
  void run(runtime::FunctionRef<void(size_t)> task, size_t count);
};
ThreadPool* get_threadpool();
}  // namespace executorch::extension::threadpool
