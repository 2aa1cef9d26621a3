// Texts that go on token by token: the loop of the C API, the runner and Python.
//
// A step appends tokens to several texts at once: to each the one that was picked last, with guesses at
// those behind it, or a part of what it begins with. Greedy tokens are picked by the head, others from
// the logits that decide. What was made ahead waits until it is asked for.
#include <algorithm>
#include <chrono>
#include <cmath>
#include <deque>
#include <optional>
#include <utility>
#include <vector>

#include "grammar/held.h"
#include "lookup.h"
#include "sampler.h"
#include "session_border.h"

using namespace pocketslm;

namespace {

constexpr size_t kPart = 256;  // tokens of texts that are read at a time where nobody waits for a token
// Tokens of a step where somebody does: what is not theirs is for reading, but some always are. Eight
// take two to three times as long as one.
constexpr size_t kStep = 8, kLeastRead = 4;
static_assert(PSLM_MOST_MADE == 1 + PromptLookup::kMost);
constexpr size_t kTies = 8;  // tokens beyond top_k that are looked at, as they may equal the last of it

pslm_status check_sampling(const pslm_generation& options, pslm_error error) {
  const auto within = [](float value, float low, float high) { return value >= low && value <= high; };
  const char* wrong = nullptr;
  // Logits over a lower one are infinite.
  if (options.temperature != 0 && !within(options.temperature, 1e-6f, 1e9f))
    wrong = "a temperature is 0, or 1e-6 to 1e9";
  if (!within(options.top_p, 0, 1) || !within(options.min_p, 0, 1))
    wrong = "top_p and min_p are 0 to 1";
  if (!within(options.typical_p, 0, 1)) wrong = "typical_p is 0 to 1";
  if (!within(options.repetition_penalty, 0.01f, 100)) wrong = "a repetition penalty is 0.01 to 100";
  return wrong ? report(error, PSLM_ERROR_ARGUMENT, wrong) : PSLM_OK;
}

Sampling sampling_of(const pslm_generation& options) {
  Sampling sampling;
  sampling.temperature = options.temperature;
  sampling.top_k = options.top_k;
  sampling.top_p = options.top_p;
  sampling.min_p = options.min_p;
  if (options.typical_p > 0) sampling.typical_p = options.typical_p;
  sampling.seed = options.seed;
  sampling.repetition_penalty = options.repetition_penalty;
  return sampling;
}

}  // namespace

struct pslm_generator {
 public:
  pslm_generator(pslm_session* session, const int32_t* text, size_t count,
                 const pslm_generation& options)
      : home_(session->home),
        slot_(session->engine.slot()),
        options_(options),
        ends_(options.ends, options.ends + options.end_count),
        text_(text, text + count),
        prompt_(count),
        held_(session->engine.length()),
        sampler_(sampling_of(options)) {
    // The last token need not be read.
    const size_t room = session->engine.context() + 1 - count;
    context_ends_ = !options.max_tokens || options.max_tokens > room;
    end_ = count + (context_ends_ ? room : options.max_tokens);
    options_.ends = nullptr;  // the caller's
  }

  // Null once it is closed.
  pslm_session* session() const { return *home_; }
  size_t slot() const { return slot_; }
  bool over() const { return over_; }
  bool ready() const { return !ready_.empty(); }
  size_t unread() const { return held_ < prompt_ ? prompt_ - held_ : 0; }
  bool reads() const { return unread(); }
  void fail() { over_ = true; }

  // What may be guessed behind the last token.
  Chance guess() {
    guessed_ = 0;
    if (!guesses()) return {0, nullptr};
    if (!lookup_) {
      lookup_.emplace().read(text_.data(), prompt_);
      for (size_t i = prompt_; i < text_.size(); ++i) lookup_->add(text_[i], experience());
    }
    const size_t most = std::min<size_t>(options_.guesses, end_ - text_.size() - 1);
    guessed_ = lookup_->guess(tokens_ + 1, most, experience());
    return {guessed_, lookup_->trust()};
  }
  // How many of them are checked.
  void take(size_t count) {
    if (guessed_ && !count && lookup_->due()) count = 1;
    guessed_ = count;
  }

  // What it asks of a step; `most`: tokens of the text that are read.
  pslm_entry ask(size_t most) {
    pslm_entry entry{};
    tokens_[0] = text_.back();
    entry.slot = static_cast<uint32_t>(slot_);
    entry.tokens = reads() ? &text_[held_] : tokens_;
    entry.count = reads() ? std::min(most, unread()) : 1 + guessed_;
    if (held_ + entry.count < prompt_) return entry;
    const size_t rows = entry.following = 1 + (reads() ? 0 : guessed_);
    const size_t vocabulary = session()->engine.model().config.vocab_size, highest = deciding();
    if (picks_by_head()) {
      entry.wanted = PSLM_WANT_NEXT, entry.room = rows;
      if (sampler_.penalty() > 1) {
        seen_.assign(text_.begin() + from(), text_.end());
        seen_.insert(seen_.end(), tokens_ + 1, tokens_ + rows);
        penalty_ = {sampler_.penalty(), seen_.data(), seen_.size()};
        entry.penalty = &penalty_;
      }
    } else if (highest && highest < vocabulary) {
      entry.wanted = PSLM_WANT_TOP, entry.room = highest;
    } else {
      entry.wanted = PSLM_WANT_LOGITS, entry.room = rows * vocabulary;
    }
    best_.resize(entry.wanted == PSLM_WANT_LOGITS ? 0 : entry.room);
    logits_.resize(entry.wanted == PSLM_WANT_NEXT ? 0 : entry.room);
    entry.best = best_.data(), entry.logits = logits_.data();
    return entry;
  }

  // Picks the tokens that follow by what the step gave, up to the first that was not guessed.
  pslm_status pick(const pslm_entry& entry, Session& engine, pslm_error error) {
    if (entry.wanted == PSLM_WANT_NOTHING) {
      held_ += entry.count;
      return PSLM_OK;
    }
    const size_t guessed = std::exchange(guessed_, 0);
    held_ += entry.count - guessed;
    for (size_t row = 0;; ++row) {
      Picked picked;
      if (const pslm_status status = pick_at(entry, row, picked, error)) return status;
      ready_.push_back(picked);
      if (row == guessed || picked.whole || ends(picked.token)) break;
      if (picked.token != tokens_[1 + row]) break;
      ++held_;
    }
    if (lookup_) {
      lookup_->judge(guessed, ready_.size() - 1, experience());
      for (const Picked& picked : ready_) lookup_->add(picked.token, experience());
    }
    if (guessed) engine.truncate(slot_, held_);
    return PSLM_OK;
  }

  // The next of the tokens that are ready.
  pslm_made give() {
    const auto [token, logprob, whole] = ready_.front();
    ready_.pop_front();
    text_.push_back(token);
    pslm_finish finish = PSLM_GOES_ON;
    if (ends(token))
      finish = PSLM_FINISH_END;
    else if (whole)
      finish = PSLM_FINISH_STOP;
    else if (text_.size() == end_)
      finish = context_ends_ ? PSLM_FINISH_CONTEXT : PSLM_FINISH_LENGTH;
    over_ = finish != PSLM_GOES_ON;
    return {token, static_cast<uint32_t>(finish), logprob};
  }

  // What the slot holds is what it was left with.
  bool is_held(const Session& engine) const { return owns() && engine.length(slot_) == held_; }
  void cut_back(Session& engine) const {
    if (!owns()) return;
    const size_t length = engine.length(slot_);
    const size_t known = std::min(length, std::max(text_.size() - 1, prompt_));
    engine.truncate(slot_, engine.can_rewind(slot_, known) ? known : 0);
  }

 private:
  // A token that was picked; whole: nothing may follow it by the constraint.
  struct Picked {
    int32_t token = 0;
    double logprob = 0;
    bool whole = false;
  };

  bool ends(int32_t token) const {
    return std::find(ends_.begin(), ends_.end(), token) != ends_.end();
  }
  Experience& experience() const { return session()->experience; }
  bool owns() const { return session()->generators[slot_] == this; }
  // What is drawn is seldom what was guessed. A convolution's state goes forward only, so that wrong
  // guesses could not be taken back.
  bool guesses() const {
    const Session& engine = session()->engine;
    return options_.guesses && sampler_.greedy() && !options_.logprobs &&
           engine.rewind_limit(slot_) < engine.length(slot_);
  }
  bool picks_by_head() const {
    return !sampler_.needs_logits() && !options_.logprobs && !options_.constraint;
  }
  // How many of the highest logits decide; 0: any may.
  size_t deciding() const {
    if (options_.constraint || sampler_.penalty() != 1) return 0;
    if (sampler_.greedy()) return 1;
    return options_.top_k ? options_.top_k + kTies : 0;
  }

  // The token behind one of the last of an entry.
  pslm_status pick_at(const pslm_entry& entry, size_t row, Picked& picked, pslm_error error) {
    if (entry.wanted == PSLM_WANT_NEXT) {
      picked.token = entry.best[row];
      return PSLM_OK;
    }
    if (entry.wanted == PSLM_WANT_TOP) return pick_highest(entry, picked);
    const size_t vocabulary = entry.room / entry.following;
    float* logits = entry.logits + row * vocabulary;
    if (options_.logprobs) raw_.assign(logits, logits + vocabulary);  // before any penalty
    if (options_.constraint)
      if (const pslm_status status =
              pslm_constraint_apply(options_.constraint, logits, vocabulary, error))
        return status;
    seen_.assign(text_.begin() + from(), text_.end());
    seen_.insert(seen_.end(), tokens_ + 1, tokens_ + 1 + row);
    picked.token = sampler_.pick(logits, vocabulary, seen_.data(), seen_.size());
    if (options_.logprobs) picked.logprob = log_probability(raw_, picked.token);
    if (!options_.constraint) return PSLM_OK;
    if (const pslm_status status = pslm_constraint_advance(options_.constraint, picked.token, error))
      return status;
    picked.whole = pslm_constraint_state(options_.constraint) & PSLM_TEXT_MUST_END;
    return PSLM_OK;
  }

  // Drawn in the order of the vocabulary, as of all logits.
  pslm_status pick_highest(const pslm_entry& entry, Picked& picked) {
    highest_.clear();
    for (size_t i = 0; i < entry.room; ++i) highest_.push_back({entry.best[i], entry.logits[i]});
    std::sort(highest_.begin(), highest_.end());
    for (size_t i = 0; i < entry.room; ++i) entry.logits[i] = highest_[i].second;
    const auto place =
        static_cast<size_t>(sampler_.pick(entry.logits, entry.room, nullptr, 0));
    picked.token = highest_[place].first;
    if (options_.logprobs)
      picked.logprob = static_cast<double>(highest_[place].second) - entry.log_total;
    return PSLM_OK;
  }

  // Where the tokens begin that are penalized.
  std::ptrdiff_t from() const {
    return static_cast<std::ptrdiff_t>(options_.spare_prompt ? prompt_ : 0);
  }

  std::shared_ptr<pslm_session*> home_;
  const size_t slot_;
  pslm_generation options_;
  const std::vector<int32_t> ends_;
  std::vector<int32_t> text_;  // with the tokens that were given
  const size_t prompt_;        // tokens that the text began with
  size_t end_;                 // tokens that the text may have
  bool context_ends_;
  size_t held_;  // tokens of the text, given or ready, that the session holds
  Sampler sampler_;
  int32_t tokens_[PSLM_MOST_MADE];  // the last one and guesses at those behind it
  size_t guessed_ = 0;              // of these, for the next step
  std::vector<int32_t> best_;       // what a step gives
  std::vector<float> logits_;
  std::vector<int32_t> seen_;
  pslm_penalty penalty_{};
  std::vector<float> raw_;
  std::vector<std::pair<int32_t, float>> highest_;
  std::deque<Picked> ready_;  // tokens that follow
  std::optional<PromptLookup> lookup_;
  bool over_ = false;
};

namespace {

// How many guesses of each text are worth their check.
void guess(const std::vector<pslm_turn*>& turns, const StepTimes& times) {
  std::vector<Chance> chances;
  for (const pslm_turn* turn : turns) chances.push_back(turn->generator->guess());
  choose(chances, turns.size(), turns.size(), kMaxTile - turns.size(), times);
  for (size_t i = 0; i < turns.size(); ++i) turns[i]->generator->take(chances[i].taken);
}

// A step of texts that have no token ready: prompts are read in parts beside the tokens that are made.
// What is wrong with one of them is not the others' error.
void step(pslm_session* session, const std::vector<pslm_turn*>& turns) {
  using Clock = std::chrono::steady_clock;
  size_t answers = 0, tokens = 0;
  for (const pslm_turn* turn : turns) answers += !turn->generator->reads();
  size_t room = answers ? std::max(kLeastRead, kStep - std::min(kStep, answers)) : kPart;
  std::vector<pslm_turn*> asked;
  std::vector<size_t> parts;  // tokens that each may read
  for (pslm_turn* turn : turns) {
    const size_t part = std::min(room, turn->generator->unread());
    if (turn->generator->reads() && !part) continue;
    asked.push_back(turn), parts.push_back(part);
    room -= part;
  }
  const bool alone = asked.size() == 1;
  const pslm_error error = alone ? asked[0]->error : pslm_error{};
  const pslm_status status = enter(session, error, [&](Session& engine) {
    if (answers == turns.size()) guess(turns, session->times);
    std::vector<pslm_entry> entries;
    for (size_t i = 0; i < asked.size(); ++i) {
      if (!asked[i]->generator->is_held(engine))
        return report(error, PSLM_ERROR_ARGUMENT, "the session holds other tokens than the text's");
      entries.push_back(asked[i]->generator->ask(parts[i]));
      tokens += entries.back().count;
    }
    if (const pslm_status failed = check_entries(engine, entries.data(), entries.size(), error))
      return failed;
    const auto start = Clock::now();
    engine.forward_slots(entries.data(), entries.size());
    if (const pslm_status failed = check_logits(engine, error)) return failed;
    const std::chrono::duration<float, std::nano> took = Clock::now() - start;
    if (answers == turns.size()) session->times.measured(tokens, took.count());
    for (size_t i = 0; i < asked.size(); ++i)
      asked[i]->status = asked[i]->generator->pick(entries[i], engine, asked[i]->error);
    return PSLM_OK;
  });
  if (alone && status != PSLM_OK) asked[0]->status = status;
  for (pslm_turn* turn : asked) {
    if (status != PSLM_OK && !alone) step(session, {turn});
    if (turn->status != PSLM_OK) turn->generator->fail();
  }
}

}  // namespace

pslm_status pslm_generator_open(pslm_session* session, const int32_t* text, size_t count,
                                const pslm_generation* options, pslm_generator** generator,
                                pslm_error error) {
  if (!session || !text || !options || !generator || (options->end_count && !options->ends))
    return report(error, PSLM_ERROR_ARGUMENT, "null argument");
  *generator = nullptr;
  if (const pslm_status status = check_head(session->engine, error)) return status;
  if (count <= pslm_length(session))
    return report(error, PSLM_ERROR_ARGUMENT, "the text has no token that the session does not hold");
  if (count > session->engine.context())
    return report(error, PSLM_ERROR_CONTEXT,
                  std::to_string(count) + " tokens do not fit the context of " +
                      std::to_string(session->engine.context()));
  if (const pslm_status status = check_sampling(*options, error)) return status;
  // Tokens that the session holds count for a penalty; the others are checked before they are read.
  if (const pslm_status status = check_vocabulary(session->engine.model().config.vocab_size, text,
                                                  pslm_length(session), error))
    return status;
  return guarded(error, [&] {
    *generator = new pslm_generator(session, text, count, *options);
    session->generators[(*generator)->slot()] = *generator;
    return PSLM_OK;
  });
}

pslm_status pslm_generator_next(pslm_generator* generator, pslm_made* made, pslm_error error) {
  if (!generator || !made) return report(error, PSLM_ERROR_ARGUMENT, "null argument");
  if (!generator->session()) return report(error, PSLM_ERROR_ARGUMENT, "the session is closed");
  if (generator->over()) return report(error, PSLM_ERROR_ARGUMENT, "the text has ended");
  return guarded(error, [&] {
    pslm_turn turn{generator, error, PSLM_OK, 0, {}};
    if (!generator->ready()) step(generator->session(), {&turn});
    if (turn.status != PSLM_OK) return static_cast<pslm_status>(turn.status);
    *made = generator->ready() ? generator->give() : pslm_made{-1, PSLM_GOES_ON, 0};
    return PSLM_OK;
  });
}

pslm_status pslm_generate(pslm_turn* turns, size_t count, pslm_error error) {
  if (!turns || !count) return report(error, PSLM_ERROR_ARGUMENT, "null argument");
  bool taken[kMaxSlots] = {};
  for (size_t i = 0; i < count; ++i) {
    const pslm_generator* one = turns[i].generator;
    if (!one) return report(error, PSLM_ERROR_ARGUMENT, "null argument");
    if (!one->session()) return report(error, PSLM_ERROR_ARGUMENT, "the session is closed");
    if (one->session() != turns[0].generator->session() || taken[one->slot()])
      return report(error, PSLM_ERROR_ARGUMENT, "texts of two sessions, or two of one slot");
    if (one->over()) return report(error, PSLM_ERROR_ARGUMENT, "the text has ended");
    taken[one->slot()] = true;
  }
  return guarded(error, [&] {
    std::vector<pslm_turn*> waiting;
    for (size_t i = 0; i < count; ++i) {
      turns[i].status = PSLM_OK, turns[i].count = 0;
      if (!turns[i].generator->ready()) waiting.push_back(&turns[i]);
    }
    if (!waiting.empty()) step(turns[0].generator->session(), waiting);
    for (size_t i = 0; i < count; ++i)
      while (turns[i].generator->ready() && !turns[i].generator->over())
        turns[i].made[turns[i].count++] = turns[i].generator->give();
    return PSLM_OK;
  });
}

void pslm_generator_close(pslm_generator* generator) {
  if (!generator) return;
  if (pslm_session* session = generator->session())
    enter(session, {}, [&](Session& engine) {
      generator->cut_back(engine);
      return PSLM_OK;
    });
  delete generator;
}
