// The C border of a session's slots.
#include <string>

#include "session_border.h"

using namespace pocketslm;

namespace {

// Whether an entry has room for what it wants.
pslm_status check_wanted(const Session& session, const pslm_entry& entry, pslm_error error) {
  const size_t vocabulary = session.model().config.vocab_size;
  const auto wrong = [&](const std::string& text) {
    return report(error, PSLM_ERROR_ARGUMENT, "slot " + std::to_string(entry.slot) + ": " + text);
  };
  const bool ranks = entry.wanted == PSLM_WANT_NEXT || entry.wanted == PSLM_WANT_TOP;
  const bool scores = entry.wanted == PSLM_WANT_TOP || entry.wanted == PSLM_WANT_LOGITS;
  if (entry.wanted > PSLM_WANT_LOGITS) return wrong("unknown choice of what is wanted");
  if (entry.wanted != PSLM_WANT_NOTHING &&
      (entry.following == 0 || entry.following > entry.count ||
       (entry.following > 1 && (entry.count > kMaxTile || entry.wanted == PSLM_WANT_TOP))))
    return wrong("what follows " + std::to_string(entry.following) + " tokens of " +
                 std::to_string(entry.count));
  if ((ranks && !entry.best) || (scores && !entry.logits)) return wrong("null argument");
  if (entry.wanted == PSLM_WANT_TOP && (entry.room == 0 || entry.room > vocabulary))
    return wrong("the " + std::to_string(entry.room) + " most probable tokens of " +
                 std::to_string(vocabulary));
  if (entry.penalty && entry.wanted != PSLM_WANT_NEXT)
    return wrong("a penalty is for the most probable next token");
  if ((entry.wanted == PSLM_WANT_NEXT && entry.room < entry.following) ||
      (entry.wanted == PSLM_WANT_LOGITS && entry.room / vocabulary < entry.following))
    return wrong("the buffer is too small");
  return check_penalty(session, entry.penalty, error);
}

}  // namespace

namespace pocketslm {

pslm_status check_entries(const Session& session, const pslm_entry* entries, size_t count,
                          pslm_error error) {
  bool taken[kMaxSlots] = {};
  for (size_t i = 0; i < count; ++i) {
    const pslm_entry& entry = entries[i];
    if (entry.slot >= session.slots() || taken[entry.slot])
      return report(error, PSLM_ERROR_ARGUMENT,
                    "slot " + std::to_string(entry.slot) + " of " +
                        std::to_string(session.slots()) + " is not there, or there twice");
    taken[entry.slot] = true;
    if (!entry.tokens) return report(error, PSLM_ERROR_ARGUMENT, "null argument");
    if (entry.count == 0) return report(error, PSLM_ERROR_ARGUMENT, "no tokens");
    if (const pslm_status status = check_wanted(session, entry, error)) return status;
    if (const pslm_status status = check_tokens(session, session.length(entry.slot), entry.tokens,
                                                entry.count, error))
      return status;
  }
  return PSLM_OK;
}

}  // namespace pocketslm

pslm_status pslm_use_slot(pslm_session* session, uint32_t slot, pslm_error error) {
  if (!session) return report(error, PSLM_ERROR_ARGUMENT, "null argument");
  return enter(session, error, [&](Session& engine) {
    if (slot >= engine.slots())
      return report(error, PSLM_ERROR_ARGUMENT,
                    "slot " + std::to_string(slot) + " of " + std::to_string(engine.slots()));
    engine.use_slot(slot);
    return PSLM_OK;
  });
}

pslm_status pslm_forward_slots(pslm_session* session, pslm_entry* entries, size_t count,
                               pslm_error error) {
  if (!session || !entries) return report(error, PSLM_ERROR_ARGUMENT, "null argument");
  if (count == 0) return report(error, PSLM_ERROR_ARGUMENT, "no entries");
  if (const pslm_status status = check_head(session->engine, error)) return status;
  return enter(session, error, [&](Session& engine) {
    if (const pslm_status status = check_entries(engine, entries, count, error)) return status;
    engine.forward_slots(entries, count);
    return check_logits(engine, error);
  });
}
