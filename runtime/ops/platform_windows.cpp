// platform.h on Windows. Paths and arguments are UTF-8 in the engine and UTF-16 here.
#include <fcntl.h>
#include <io.h>
#include <sys/stat.h>
// Before those that need it.
#include <windows.h>

#include <psapi.h>
#include <shellapi.h>

#include <cerrno>
#include <cstring>
#include <new>

#include "platform.h"

namespace pocketslm::platform {
namespace {

std::wstring wide(const char* text) {
  std::wstring out(static_cast<size_t>(MultiByteToWideChar(CP_UTF8, 0, text, -1, nullptr, 0)), L'\0');
  MultiByteToWideChar(CP_UTF8, 0, text, -1, out.data(), static_cast<int>(out.size()));
  out.resize(out.empty() ? 0 : out.size() - 1);  // its final zero
  return out;
}

std::string narrow(const wchar_t* text) {
  const int bytes = WideCharToMultiByte(CP_UTF8, 0, text, -1, nullptr, 0, nullptr, nullptr);
  std::string out(static_cast<size_t>(bytes), '\0');
  WideCharToMultiByte(CP_UTF8, 0, text, -1, out.data(), bytes, nullptr, nullptr);
  out.resize(out.empty() ? 0 : out.size() - 1);
  return out;
}

HANDLE handle_of(int file) { return reinterpret_cast<HANDLE>(_get_osfhandle(file)); }

uint64_t nanoseconds(const FILETIME& time) {
  return (uint64_t{time.dwHighDateTime} << 32 | time.dwLowDateTime) * 100;
}

uint64_t bit(int cpu) { return uint64_t{1} << cpu; }

}  // namespace

void* reserve_pages(size_t bytes) {
  void* pages = VirtualAlloc(nullptr, bytes, MEM_RESERVE | MEM_COMMIT, PAGE_READWRITE);
  if (!pages) throw std::bad_alloc();
  return pages;
}

void release_pages(void* pages, size_t) { VirtualFree(pages, 0, MEM_RELEASE); }

MappedFile::~MappedFile() {
  if (data_) UnmapViewOfFile(data_);
  close();
}

std::string MappedFile::open(const char* path) {
  file_ = _wopen(wide(path).c_str(), _O_RDONLY | _O_BINARY | _O_NOINHERIT);
  if (file_ < 0) return "cannot open " + std::string(path) + ": " + std::strerror(errno);
  struct _stat64 info;
  if (_fstat64(file_, &info) != 0 || (info.st_mode & _S_IFMT) != _S_IFREG)
    return std::string(path) + " is not a regular file";
  if (info.st_size == 0) return "";
  const HANDLE mapping = CreateFileMappingW(handle_of(file_), nullptr, PAGE_READONLY, 0, 0, nullptr);
  if (mapping) {
    data_ = MapViewOfFile(mapping, FILE_MAP_READ, 0, 0, 0);
    CloseHandle(mapping);  // the view keeps it
  }
  if (!data_)
    return "cannot map " + std::string(path) + ": Windows error " + std::to_string(GetLastError());
  bytes_ = static_cast<size_t>(info.st_size);
  return "";
}

bool MappedFile::read(size_t offset, void* buffer, size_t bytes) const {
  OVERLAPPED at{};
  at.Offset = static_cast<DWORD>(offset);
  at.OffsetHigh = static_cast<DWORD>(offset >> 32);
  DWORD got = 0;
  return ReadFile(handle_of(file_), buffer, static_cast<DWORD>(bytes), &got, &at) && got == bytes;
}

void MappedFile::close() {
  if (file_ >= 0) _close(file_);
  file_ = -1;
}

// The CPUs of this process's group, at most 64.
std::vector<int> usable_cpus() {
  DWORD_PTR mine = 0, all = 0;
  std::vector<int> cpus;
  if (GetProcessAffinityMask(GetCurrentProcess(), &mine, &all))
    for (int cpu = 0; cpu < 64; ++cpu)
      if (mine & bit(cpu)) cpus.push_back(cpu);
  return cpus;
}

long cpu_speed(int cpu) {
  ULONG bytes = 0;
  GetSystemCpuSetInformation(nullptr, 0, &bytes, GetCurrentProcess(), 0);
  std::vector<char> sets(bytes);
  auto* begin = reinterpret_cast<SYSTEM_CPU_SET_INFORMATION*>(sets.data());
  if (!GetSystemCpuSetInformation(begin, bytes, &bytes, GetCurrentProcess(), 0)) return 0;
  for (size_t at = 0; at < bytes;) {
    const auto* set = reinterpret_cast<SYSTEM_CPU_SET_INFORMATION*>(sets.data() + at);
    if (set->CpuSet.LogicalProcessorIndex == cpu) return set->CpuSet.EfficiencyClass;
    at += set->Size;
  }
  return 0;
}

void use_large_pages(void*, size_t) {}

void drop_mapped(const void*, size_t) {}

bool binds_threads() { return true; }

void bind_thread(int cpu) { SetThreadAffinityMask(GetCurrentThread(), bit(cpu)); }

bool run_on(const std::vector<int>& cpus) {
  uint64_t mask = 0;
  for (int cpu : cpus) mask |= cpu < 64 ? bit(cpu) : 0;
  return SetProcessAffinityMask(GetCurrentProcess(), mask) &&
         SetThreadAffinityMask(GetCurrentThread(), mask);
}

Spent spent() {
  FILETIME begun, ended, system, user;
  if (!GetProcessTimes(GetCurrentProcess(), &begun, &ended, &system, &user)) return {};
  return {nanoseconds(system) + nanoseconds(user), 0};
}

Memory memory() {
  Memory found;
  PROCESS_MEMORY_COUNTERS counters{};
  if (GetProcessMemoryInfo(GetCurrentProcess(), &counters, sizeof counters))
    found.resident = counters.WorkingSetSize, found.peak = counters.PeakWorkingSetSize;
  return found;
}

int64_t process_id() { return GetCurrentProcessId(); }

bool drop_from_page_cache(const char*) { return false; }

bool has_reader(FILE*) { return true; }  // a write says so

std::vector<std::string> begin_program(int, char**) {
  for (FILE* stream : {stdin, stdout, stderr}) _setmode(_fileno(stream), _O_BINARY);
  SetConsoleOutputCP(CP_UTF8);
  int count = 0;
  wchar_t** words = CommandLineToArgvW(GetCommandLineW(), &count);
  std::vector<std::string> arguments;
  for (int i = 0; i < count; ++i) arguments.push_back(narrow(words[i]));
  LocalFree(words);
  return arguments;
}

std::tm local_time(std::time_t time) {
  std::tm local{};
  localtime_s(&local, &time);
  return local;
}

FILE* open_file(const char* path) { return _wfopen(wide(path).c_str(), L"rb"); }

}  // namespace pocketslm::platform
