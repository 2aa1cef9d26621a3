// JSON lines: one request a line on one side, events on the other.
#pragma once

#include <cstdio>

namespace pocketslm {

// Serves until the input ends or a quit request; returns the process's exit status.
int serve(FILE* in, FILE* out);

}  // namespace pocketslm
