// What the engine asks of the system: memory, files, CPUs, the process and its streams. No other file
// includes a system's header. `platform_posix.cpp` with `platform_linux.cpp` or `platform_macos.cpp`
// implements this, or `platform_windows.cpp`; `build.py` takes those of the target.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstdio>
#include <ctime>
#include <string>
#include <vector>

namespace pocketslm::platform {

// Pages of zeros, in memory once they are touched. Throws std::bad_alloc.
void* reserve_pages(size_t bytes);
void release_pages(void* pages, size_t bytes);
// Puts what is there into large pages, where the system has them: fewer translations of addresses.
// Memory that was never touched is taken too.
void use_large_pages(void* pages, size_t bytes);

// Lets a part of a mapped file go from this process's memory until it is read again.
void drop_mapped(const void* data, size_t bytes);

// A whole file, mapped for reading. Paths are UTF-8.
class MappedFile {
 public:
  MappedFile() = default;
  ~MappedFile();
  MappedFile(const MappedFile&) = delete;
  MappedFile& operator=(const MappedFile&) = delete;

  // Empty, or what was wrong.
  std::string open(const char* path);
  const void* data() const { return data_; }
  size_t bytes() const { return bytes_; }
  bool is_open() const { return file_ >= 0; }
  // Reads beside the mapping, whose pages stay out of memory; false where that fails.
  bool read(size_t offset, void* buffer, size_t bytes) const;
  // The mapping stays; nothing can be read beside it any more.
  void close();

 private:
  void* data_ = nullptr;
  size_t bytes_ = 0;
  int file_ = -1;
};

// CPUs are numbered from 0 and below this.
constexpr int kMaxCpus = 1024;
// The CPUs that the calling thread may use. Empty: the system does not tell.
std::vector<int> usable_cpus();
// A number that is greater for a faster CPU; 0: the system does not tell.
long cpu_speed(int cpu);
// Whether threads can be bound to CPUs at all.
bool binds_threads();
// Binds the calling thread, as far as the system lets it.
void bind_thread(int cpu);
// Keeps the calling thread, and those that it starts later, to these CPUs; false: the system refuses.
bool run_on(const std::vector<int>& cpus);

// Instructions of an Arm processor.
struct ArmFeatures {
  bool dotprod, i8mm;
};
ArmFeatures arm_features();

// What this process has used so far. 0 stands for what the system does not tell.
struct Spent {
  uint64_t cpu_ns = 0;        // user and system time
  uint64_t major_faults = 0;  // page faults that had to read from storage
};
Spent spent();

// The memory of this process in bytes, as /proc names it. 0 stands for what the system does not tell.
struct Memory {
  uint64_t resident = 0, peak = 0, anonymous = 0, file_backed = 0;
  uint64_t proportional = 0, proportional_file = 0;
};
Memory memory();

// The number of this process, which is another one after a fork.
int64_t process_id();
// Makes the next reader of a file read it from storage; false where the system has no way to do so.
bool drop_from_page_cache(const char* path);
// Whether the other end of a pipe is still open, as far as the system tells.
bool has_reader(FILE* out);
// The program's arguments in UTF-8. Its standard streams carry bytes unchanged from here on.
std::vector<std::string> begin_program(int count, char** arguments);
// The date and time of day where the machine is.
std::tm local_time(std::time_t time);
// Opens a file for reading bytes; null where that fails.
FILE* open_file(const char* path);

}  // namespace pocketslm::platform
