// What the C border's functions on sessions share: a session is entered by one thread at a time, and
// arguments are checked before anything is touched.
#pragma once

#include <atomic>
#include <cstdint>
#include <memory>
#include <string>
#include <type_traits>
#include <utility>

#include "border.h"
#include "lookup.h"
#include "platform.h"
#include "pocketslm.h"
#include "session.h"

struct pslm_session {
  pocketslm::Session engine;
  mutable std::atomic<bool> entered{false};
  mutable std::atomic<size_t> length{0};  // the engine's, for who asks while a call runs
  pocketslm::StepTimes times{};
  pocketslm::Experience experience{};
  const pslm_generator* generators[PSLM_MAX_SLOTS] = {};  // by slot, the last one that was opened
  const int64_t process = pocketslm::platform::process_id();
  // Where generators find it. A collector of garbage may close them after it.
  std::shared_ptr<pslm_session*> home = std::make_shared<pslm_session*>(this);

  template <typename... Arguments>
  explicit pslm_session(Arguments&&... arguments)
      : engine(std::forward<Arguments>(arguments)...) {}
  ~pslm_session() { *home = nullptr; }

  // After a fork the child has the calling thread and none of the others.
  bool lost_threads() const {
    return engine.threads() > 1 && process != pocketslm::platform::process_id();
  }
};

namespace pocketslm {

// Runs f inside a session, unless another thread is there. What fails leaves all lengths as they were,
// or at 0 where the state has no way back.
template <typename S, typename F>
pslm_status enter(S* session, pslm_error error, F&& f) {
  if (session->lost_threads())
    return report(error, PSLM_ERROR_FORK,
                  "this session's threads stayed behind in a fork; open one in this process");
  if (session->entered.exchange(true, std::memory_order_acquire))
    return report(error, PSLM_ERROR_BUSY, "another thread uses this session");
  auto& engine = session->engine;
  const Session::Lengths before = engine.lengths();
  const pslm_status status = guarded(error, [&] { return f(engine); });
  if constexpr (!std::is_const_v<S>)
    if (status != PSLM_OK) engine.rewind(before);
  session->length.store(engine.length(), std::memory_order_relaxed);
  session->entered.store(false, std::memory_order_release);
  return status;
}

pslm_status check_vocabulary(uint32_t vocabulary, const int32_t* tokens, size_t count,
                             pslm_error error);
// Whether these are tokens that fit behind a context of `length`.
pslm_status check_tokens(const Session& session, size_t length, const int32_t* tokens, size_t count,
                         pslm_error error);
// Whether entries are as pslm_forward_slots takes them.
pslm_status check_entries(const Session& session, const pslm_entry* entries, size_t count,
                          pslm_error error);
// Whether a penalty, which may be null, is for tokens of the vocabulary.
pslm_status check_penalty(const Session& session, const pslm_penalty* penalty, pslm_error error);
// No token can be chosen by logits that are NaN or infinite.
pslm_status check_logits(const Session& session, pslm_error error);
// What has no matrix of logits picks no token.
pslm_status check_head(const Session& session, pslm_error error);

}  // namespace pocketslm
