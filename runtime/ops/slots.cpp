// Several contexts of a session at once: their tokens go through each layer together, so that weights
// are read once for all of them.
#include <algorithm>
#include <cstring>

#include "session.h"

namespace pocketslm {

void Session::forward_slots(pslm_entry* entries, size_t count) {
  trust_logits();
  const size_t n = program_.hidden_size;
  struct Row {
    pslm_entry* entry;
    size_t of_batch, of_entry;
  };
  std::vector<Row> rows;  // whose next token is wanted
  std::vector<Asked> asked;
  for (size_t at = 0, done = 0; at < count;) {
    runs_.clear(), tokens_.clear(), rows.clear(), asked.clear();
    while (at < count && tokens_.size() < batch_) {
      pslm_entry& entry = entries[at];
      const size_t room = batch_ - tokens_.size(), wanted = entry.wanted ? entry.following : 0;
      // What is wanted behind several tokens is found in one batch.
      if (rows.size() + wanted > kMaxTile || (wanted > 1 && room < entry.count)) break;
      const size_t part = std::min(room, entry.count - done);
      runs_.push_back({&contexts_[entry.slot], tokens_.size(), part});
      tokens_.insert(tokens_.end(), entry.tokens + done, entry.tokens + done + part);
      done += part;
      if (done < entry.count) break;
      ++at, done = 0;
      for (size_t row = 0; row < wanted; ++row) {
        rows.push_back({&entry, tokens_.size() - wanted + row, row});
        float* logits = entry.wanted == PSLM_WANT_LOGITS
                            ? entry.logits + row * model_.config.vocab_size
                            : nullptr;
        asked.push_back({logits, entry.wanted == PSLM_WANT_TOP ? entry.room : 0});
      }
    }
    ask(asked);
    penalizes_ = false;
    for (size_t i = 0; i < rows.size(); ++i) {
      const pslm_penalty* penalty = rows[i].entry->penalty;
      const size_t later = rows[i].entry->following - 1 - rows[i].of_entry;
      penalize(i, penalty, penalty && penalty->count > later ? penalty->count - later : 0);
    }
    const bool greedy = std::all_of(rows.begin(), rows.end(), [](const Row& row) {
      return row.entry->wanted == PSLM_WANT_NEXT;
    });
    const Head head = rows.empty() ? Head::none : greedy ? Head::greedy : Head::asked;
    // The head sees wanted rows alone: all of them or the last, or those that are moved to the front.
    const bool as_they_are = rows.empty() || rows.size() == tokens_.size() ||
                             (rows.size() == 1 && rows[0].of_batch + 1 == tokens_.size());
    head_rows_ = rows.size();
    begin(tokens_.data(), tokens_.size());
    auto layers = [&](unsigned m) {
      run_layers(m);
      if (!as_they_are) return;
      if (head != Head::none) run_head(m, head, nullptr);
      members_[m].plan.finish();
    };
    pool_.run(layers);
    end();
    if (!as_they_are) {
      float* residual = buffer(BufferId::residual);
      for (size_t i = 0; i < rows.size(); ++i)
        std::memmove(residual + i * n, residual + rows[i].of_batch * n, n * sizeof(float));
      count_ = rows.size();
      auto rest = [&](unsigned m) {
        run_head(m, head, nullptr);
        members_[m].plan.finish();
      };
      pool_.run(rest);
    }
    for (size_t i = 0; i < rows.size(); ++i) {
      pslm_entry& entry = *rows[i].entry;
      if (entry.wanted == PSLM_WANT_NEXT) entry.best[rows[i].of_entry] = best(i);
      if (entry.wanted == PSLM_WANT_TOP) entry.log_total = highest(i, entry.best, entry.logits);
    }
  }
}

}  // namespace pocketslm
