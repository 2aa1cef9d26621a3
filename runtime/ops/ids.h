// The numbers of ids.def as enumerations.
#pragma once

#include <cstdint>

// Expands to an enumerator where LIST_<list> is defined as "~,", to nothing otherwise.
#define ID_ENTRY(name, number) name = number,
#define ID_SECOND(first, second, ...) second
#define ID_PICK(chosen, name, number) ID_SECOND(chosen ID_ENTRY(name, number), , )
#define ID(list, name, number) ID_PICK(LIST_##list, name, number)

namespace pocketslm {

enum class Role : uint16_t {
#define LIST_ROLE ~,
#include "ids.def"
#undef LIST_ROLE
};

enum class WeightKind : uint16_t {
#define LIST_KIND ~,
#include "ids.def"
#undef LIST_KIND
};

enum class Code : uint16_t {
#define LIST_CODE ~,
#include "ids.def"
#undef LIST_CODE
};

enum class NormKind : uint16_t {
#define LIST_NORM ~,
#include "ids.def"
#undef LIST_NORM
};

enum class Activation : uint32_t {
#define LIST_ACTIVATION ~,
#include "ids.def"
#undef LIST_ACTIVATION
};

enum class BufferId : uint32_t {
#define LIST_BUFFER ~,
#include "ids.def"
#undef LIST_BUFFER
};

enum class StateKind : uint32_t {
#define LIST_STATE ~,
#include "ids.def"
#undef LIST_STATE
};

struct AttendFlag {
  enum : uint32_t {
#define LIST_ATTEND ~,
#include "ids.def"
#undef LIST_ATTEND
  };
};

// How many there are, where they are counted from 0.
constexpr uint32_t kActivations = 5;
constexpr uint32_t kBuffers = 6;

}  // namespace pocketslm

#undef ID_ENTRY
#undef ID_SECOND
#undef ID_PICK
#undef ID
