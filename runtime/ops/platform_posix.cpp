// The part of platform.h that Linux and macOS share.
#include <fcntl.h>
#include <poll.h>
#include <sys/mman.h>
#include <sys/resource.h>
#include <sys/stat.h>
#include <unistd.h>

#include <cerrno>
#include <cstring>
#include <new>

#include "platform.h"

namespace pocketslm::platform {
namespace {

uint64_t nanoseconds(const timeval& time) {
  return static_cast<uint64_t>(time.tv_sec) * 1000000000u + static_cast<uint64_t>(time.tv_usec) * 1000u;
}

}  // namespace

void* reserve_pages(size_t bytes) {
  void* pages = mmap(nullptr, bytes, PROT_READ | PROT_WRITE,
                     MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (pages == MAP_FAILED) throw std::bad_alloc();
  return pages;
}

void release_pages(void* pages, size_t bytes) { munmap(pages, bytes); }

void drop_mapped(const void* data, size_t bytes) {
  const auto page = static_cast<uintptr_t>(sysconf(_SC_PAGESIZE));
  const auto begin = (reinterpret_cast<uintptr_t>(data) + page - 1) / page * page;
  const auto end = (reinterpret_cast<uintptr_t>(data) + bytes) / page * page;
  if (begin < end) madvise(reinterpret_cast<void*>(begin), end - begin, MADV_DONTNEED);
}

MappedFile::~MappedFile() {
  if (data_) munmap(data_, bytes_);
  close();
}

std::string MappedFile::open(const char* path) {
  // Not to wait for the other end where a pipe lies in its place.
  file_ = ::open(path, O_RDONLY | O_CLOEXEC | O_NONBLOCK);
  if (file_ < 0) return "cannot open " + std::string(path) + ": " + std::strerror(errno);
  struct stat info;
  if (fstat(file_, &info) != 0 || !S_ISREG(info.st_mode))
    return std::string(path) + " is not a regular file";
  if (info.st_size == 0) return "";
  const auto bytes = static_cast<size_t>(info.st_size);
  void* mapped = mmap(nullptr, bytes, PROT_READ, MAP_SHARED, file_, 0);
  if (mapped == MAP_FAILED) return "cannot map " + std::string(path) + ": " + std::strerror(errno);
  data_ = mapped;
  bytes_ = bytes;
  return "";
}

bool MappedFile::read(size_t offset, void* buffer, size_t bytes) const {
  return pread(file_, buffer, bytes, static_cast<off_t>(offset)) == static_cast<ssize_t>(bytes);
}

void MappedFile::close() {
  if (file_ >= 0) ::close(file_);
  file_ = -1;
}

Spent spent() {
  rusage used{};
  getrusage(RUSAGE_SELF, &used);
  return {nanoseconds(used.ru_utime) + nanoseconds(used.ru_stime),
          static_cast<uint64_t>(used.ru_majflt)};
}

int64_t process_id() { return getpid(); }

bool has_reader(FILE* out) {
  pollfd output{fileno(out), 0, 0};
  return poll(&output, 1, 0) <= 0 || !(output.revents & (POLLERR | POLLHUP));
}

std::vector<std::string> begin_program(int count, char** arguments) {
  return {arguments, arguments + count};
}

std::tm local_time(std::time_t time) {
  std::tm local{};
  localtime_r(&time, &local);
  return local;
}

FILE* open_file(const char* path) { return std::fopen(path, "rb"); }

}  // namespace pocketslm::platform
