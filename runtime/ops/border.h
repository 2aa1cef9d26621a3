// What every function of the C border does: it reports, and lets nothing be thrown across.
#pragma once

#include <cstdio>
#include <new>
#include <string>
#include <system_error>

#include "pocketslm.h"

namespace pocketslm {

inline pslm_status report(pslm_error error, pslm_status status, const std::string& text) {
  if (error.text && error.capacity) std::snprintf(error.text, error.capacity, "%s", text.c_str());
  return status;
}

// Runs f, which returns a status, and turns what it may throw into one.
template <typename F>
pslm_status guarded(pslm_error error, F&& f) {
  try {
    return f();
  } catch (const std::bad_alloc&) {
    return report(error, PSLM_ERROR_MEMORY, "out of memory");
  } catch (const std::system_error& failure) {
    return report(error, PSLM_ERROR_MEMORY, std::string("cannot start threads: ") + failure.what());
  } catch (const std::exception& failure) {
    return report(error, PSLM_ERROR_MEMORY, failure.what());
  }
}

}  // namespace pocketslm
