// Several contexts of one session under sanitizers: prompts and single tokens together, every kind of
// what may be wanted, texts that are made together, and another thread that asks meanwhile.
#include <atomic>
#include <chrono>
#include <cstdio>
#include <thread>
#include <vector>

#include "pocketslm.h"

namespace {

// Texts of all slots, with every way of picking tokens; one is closed in the middle.
int generate(pslm_session* session, const std::vector<int32_t>& tokens, pslm_error error) {
  const size_t lengths[] = {270, 9, 40, 1};
  pslm_generator* texts[4];
  for (uint32_t slot = 0; slot < 4; ++slot) {
    pslm_generation how{};
    how.max_tokens = 30, how.top_p = 1, how.repetition_penalty = slot == 1 ? 1.2f : 1.0f;
    how.guesses = 7;
    if (slot > 1) how.temperature = 1, how.top_k = slot == 2 ? 9 : 0, how.logprobs = 1;
    if (pslm_use_slot(session, slot, error) || pslm_truncate(session, 0) ||
        pslm_generator_open(session, tokens.data(), lengths[slot], &how, &texts[slot], error))
      return 1;
  }
  std::vector<pslm_generator*> going(texts, texts + 4);
  for (int step = 0; !going.empty(); ++step) {
    if (step == 12) {
      pslm_generator_close(going.back());
      going.pop_back();
    }
    std::vector<pslm_turn> turns;
    for (pslm_generator* text : going) turns.push_back({text, error, 0, 0, {}});
    if (pslm_generate(turns.data(), turns.size(), error)) return 1;
    going.clear();
    for (const pslm_turn& turn : turns) {
      if (turn.status) return 1;
      if (turn.count && turn.made[turn.count - 1].finish)
        pslm_generator_close(turn.generator);
      else
        going.push_back(turn.generator);
    }
  }
  return 0;
}

}  // namespace

int main(int, char** arguments) {
  char text[256] = "";
  const pslm_error error{text, sizeof text};
  pslm_model* model;
  pslm_session* session;
  const pslm_options options{0, 3, PSLM_KV_I8, 0, nullptr};
  if (pslm_model_open(arguments[1], &model, error) ||
      pslm_session_open_slots(model, &options, 4, &session, error))
    return std::puts(text), 1;
  pslm_model_info info;
  pslm_model_describe(model, &info);
  std::atomic<bool> over{false};
  std::thread asker([&] {
    while (!over) {
      pslm_length(session);
      pslm_kv_bytes(session, 3);
      pslm_use_slot(session, 1, {});  // busy, or done
      std::this_thread::sleep_for(std::chrono::milliseconds(1));
    }
  });
  std::vector<int32_t> tokens;
  for (int32_t i = 0; i < 290; ++i) tokens.push_back(i * 37 % 90);
  std::vector<std::vector<int32_t>> best(4, std::vector<int32_t>(info.vocab_size));
  std::vector<std::vector<float>> logits(4, std::vector<float>(info.vocab_size));
  const size_t counts[][4] = {{290, 5, 1, 17}, {1, 1, 1, 1}, {3, 1, 30, 1}, {1, 9, 1, 2}};
  int status = 0;
  for (const auto& count : counts) {
    pslm_entry entries[4];
    for (uint32_t i = 0; i < 4; ++i)
      entries[i] = {i, i, tokens.data(), count[i], 1, best[i].data(), logits[i].data(),
                    i == PSLM_WANT_LOGITS ? info.vocab_size : size_t{5}, nullptr, 0};
    while ((status = pslm_forward_slots(session, entries, 4, error)) == PSLM_ERROR_BUSY) {
    }
    if (status) break;
  }
  over = true;
  asker.join();
  if (!status) status = generate(session, tokens, error);
  pslm_session_close(session);
  pslm_model_close(model);
  if (status) std::puts(text);
  return status;
}
