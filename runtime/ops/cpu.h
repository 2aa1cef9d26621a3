// Which kernel paths this CPU can run.
#pragma once

#include "kernels.h"

namespace pocketslm {

// Null where the name is unknown or this CPU lacks the instructions. Null and "auto" mean
// $POCKETSLM_ISA if that is set, else the best path.
const Kernels* select_kernels(const char* isa);

// Null-terminated, best first.
const char* const* available_isa_names();

}  // namespace pocketslm
