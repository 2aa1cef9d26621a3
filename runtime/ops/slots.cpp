// Several contexts of a session at once: their tokens go through each layer together, so that weights
// are read once for all of them.
#include <algorithm>
#include <cstring>

#include "session.h"

namespace pocketslm {

void Session::forward_slots(pslm_entry* entries, size_t count) {
  trust_logits();
  const size_t n = program_.hidden_size;
  std::vector<pslm_entry*> answered;
  std::vector<size_t> rows;  // of the batch, whose next token they want
  std::vector<Asked> asked;
  for (size_t at = 0, done = 0; at < count;) {
    runs_.clear(), tokens_.clear(), answered.clear(), rows.clear(), asked.clear();
    while (at < count && tokens_.size() < batch_) {
      pslm_entry& entry = entries[at];
      const size_t part = std::min(batch_ - tokens_.size(), entry.count - done);
      runs_.push_back({&contexts_[entry.slot], tokens_.size(), part});
      tokens_.insert(tokens_.end(), entry.tokens + done, entry.tokens + done + part);
      done += part;
      if (done < entry.count) break;
      ++at, done = 0;
      if (entry.wanted == PSLM_WANT_NOTHING) continue;
      answered.push_back(&entry);
      rows.push_back(tokens_.size() - 1);
      asked.push_back({entry.wanted == PSLM_WANT_LOGITS ? entry.logits : nullptr,
                       entry.wanted == PSLM_WANT_TOP ? entry.room : 0});
    }
    ask(asked);
    begin(tokens_.data(), tokens_.size());
    auto layers = [&](unsigned m) {
      run_layers(m);
      if (rows.empty()) members_[m].plan.finish();
    };
    pool_.run(layers);
    end();
    if (rows.empty()) continue;
    // The head sees these rows alone.
    float* residual = buffer(BufferId::residual);
    for (size_t i = 0; i < rows.size(); ++i)
      std::memmove(residual + i * n, residual + rows[i] * n, n * sizeof(float));
    count_ = head_rows_ = rows.size();
    const bool greedy = std::all_of(answered.begin(), answered.end(), [](const pslm_entry* e) {
      return e->wanted == PSLM_WANT_NEXT;
    });
    auto head = [&](unsigned m) {
      run_head(m, greedy ? Head::greedy : Head::asked, nullptr);
      members_[m].plan.finish();
    };
    pool_.run(head);
    for (size_t i = 0; i < answered.size(); ++i) {
      pslm_entry& entry = *answered[i];
      if (entry.wanted == PSLM_WANT_NEXT) *entry.best = best(i);
      if (entry.wanted == PSLM_WANT_TOP) entry.log_total = highest(i, entry.best, entry.logits);
    }
  }
}

}  // namespace pocketslm
