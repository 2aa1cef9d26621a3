// What the C border's handles of models and sessions are.
#pragma once

#include <unistd.h>

#include <atomic>

#include "model_file.h"
#include "pocketslm.h"
#include "session.h"

struct pslm_model {
  pocketslm::ModelFile file;
};
struct pslm_session {
  pocketslm::Session engine;
  mutable std::atomic<bool> entered{false};
  mutable std::atomic<size_t> length{0};  // the engine's, for who asks while a call runs
  const pid_t process = getpid();

  // After a fork the child has the calling thread and none of the others.
  bool lost_threads() const { return engine.threads() > 1 && process != getpid(); }
};
