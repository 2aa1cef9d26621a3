// Where the parts of a batch's work lie: in one memory, in which parts that never hold anything at the
// same time share a place.
#pragma once

#include <cstddef>

#include "program.h"

namespace pocketslm {

// The first ones are the buffers of the program.
enum Part : size_t { kNormed = kBuffers, kProjected, kPanel, kHiddenPanel, kParts };

struct Places {
  size_t at[kParts]{};  // bytes from the beginning
  size_t bytes = 0;     // of all
};

// For parts of so many bytes each. attended lies where query does, if only attention makes it: that
// goes from the one to the other row by row.
Places places_of(const Program& program, const size_t (&bytes)[kParts]);

}  // namespace pocketslm
