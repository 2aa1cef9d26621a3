// A text that goes on token by token: the loop of the C API and the runner.
//
// Greedy tokens are picked by the head, and guesses at those behind them are checked in the same call;
// everything else is picked from all logits. What was made ahead waits until it is asked for.
#include <algorithm>
#include <cmath>
#include <deque>
#include <limits>
#include <optional>
#include <vector>

#include "grammar/held.h"
#include "lookup.h"
#include "sampler.h"
#include "session_border.h"

using namespace pocketslm;

namespace {

constexpr size_t kPart = 256;  // tokens of a text that are read at a time

pslm_status check_sampling(const pslm_generation& options, pslm_error error) {
  const auto within = [](float value, float low, float high) { return value >= low && value <= high; };
  const char* wrong = nullptr;
  // Logits over a lower one are infinite.
  if (options.temperature != 0 && !within(options.temperature, 1e-6f, 1e9f))
    wrong = "a temperature is 0, or 1e-6 to 1e9";
  if (!within(options.top_p, 0, 1) || !within(options.min_p, 0, 1))
    wrong = "top_p and min_p are 0 to 1";
  if (!within(options.repetition_penalty, 0.01f, 100)) wrong = "a repetition penalty is 0.01 to 100";
  return wrong ? report(error, PSLM_ERROR_ARGUMENT, wrong) : PSLM_OK;
}

Sampling sampling_of(const pslm_generation& options) {
  Sampling sampling;
  sampling.temperature = options.temperature;
  sampling.top_k = options.top_k;
  sampling.top_p = options.top_p;
  sampling.min_p = options.min_p;
  sampling.seed = options.seed;
  sampling.repetition_penalty = options.repetition_penalty;
  return sampling;
}

}  // namespace

struct pslm_generator {
 public:
  pslm_generator(pslm_session* session, const int32_t* text, size_t count,
                 const pslm_generation& options)
      : session_(session),
        options_(options),
        ends_(options.ends, options.ends + options.end_count),
        text_(text, text + count),
        prompt_(count),
        held_(pslm_length(session)),
        sampler_(sampling_of(options)),
        logits_(session->engine.model().config.vocab_size) {
    // The last token need not be read.
    const size_t room = session->engine.context() + 1 - count;
    context_ends_ = !options.max_tokens || options.max_tokens > room;
    end_ = count + (context_ends_ ? room : options.max_tokens);
    options_.ends = nullptr;  // the caller's
  }

  pslm_status next(pslm_made* made, pslm_error error) {
    if (over_) return report(error, PSLM_ERROR_ARGUMENT, "the text has ended");
    over_ = true;  // unless this goes well
    *made = {-1, PSLM_GOES_ON, 0};
    if (ready_.empty()) {
      const bool reads = held_ < prompt_;
      if (const pslm_status status = reads ? read(error) : go_on(error)) return status;
      if (ready_.empty()) {
        over_ = false;
        return PSLM_OK;
      }
    }
    const auto [token, logprob, whole] = ready_.front();
    ready_.pop_front();
    text_.push_back(token);
    pslm_finish finish = PSLM_GOES_ON;
    if (std::find(ends_.begin(), ends_.end(), token) != ends_.end())
      finish = PSLM_FINISH_END;
    else if (whole)
      finish = PSLM_FINISH_STOP;
    else if (text_.size() == end_)
      finish = context_ends_ ? PSLM_FINISH_CONTEXT : PSLM_FINISH_LENGTH;
    over_ = finish != PSLM_GOES_ON;
    *made = {token, static_cast<uint32_t>(finish), logprob};
    return PSLM_OK;
  }

  void cut_back() {
    const size_t known = std::min(pslm_length(session_), std::max(text_.size() - 1, prompt_));
    if (pslm_truncate(session_, known) != PSLM_OK) pslm_truncate(session_, 0);
  }

 private:
  // A token that was picked; whole: nothing may follow it by the constraint.
  struct Picked {
    int32_t token;
    double logprob = 0;
    bool whole = false;
  };

  // The next part of the text; behind the last one, the first token.
  pslm_status read(pslm_error error) {
    const size_t count = std::min(kPart, prompt_ - held_);
    if (held_ + count == prompt_) return append(&text_[held_], count, 0, error);
    const pslm_status status =
        pslm_forward(session_, &text_[held_], count, PSLM_LOGITS_NONE, nullptr, 0, error);
    if (status == PSLM_OK) held_ += count;
    return status;
  }

  // The token behind the text, and more where guesses at them are right.
  pslm_status go_on(pslm_error error) {
    int32_t tokens[1 + PromptLookup::kMost] = {text_.back()};
    size_t guessed = 0;
    if (guesses()) {
      if (!told_) lookup_.emplace();
      lookup_->push(&text_[told_], text_.size() - told_);
      told_ = text_.size();
      guessed = lookup_->guess(tokens + 1,
                               std::min<size_t>(options_.guesses, end_ - text_.size() - 1));
    }
    if (const pslm_status status = append(tokens, 1 + guessed, guessed, error)) return status;
    if (lookup_) lookup_->judge(ready_.size() - 1);
    if (guessed) return pslm_truncate(session_, held_);
    return PSLM_OK;
  }

  // What is drawn is seldom what was guessed. A convolution's state goes forward only, so that wrong
  // guesses could not be taken back.
  bool guesses() const {
    return options_.guesses && sampler_.greedy() && !options_.logprobs &&
           pslm_rewind_limit(session_) < pslm_length(session_);
  }

  // Appends tokens of the text, the last of which are guesses, and picks what follows, up to the first
  // that was not guessed.
  pslm_status append(const int32_t* tokens, size_t count, size_t guessed, pslm_error error) {
    const size_t rows = 1 + guessed, width = logits_.size(), known = text_.size();
    const bool by_logits = sampler_.needs_logits() || options_.logprobs || options_.constraint;
    int32_t best[1 + PromptLookup::kMost];
    std::vector<float>& out = guessed ? rows_ : logits_;
    if (guessed) text_.insert(text_.end(), tokens + 1, tokens + count);  // until all are picked
    pslm_status status;
    if (by_logits) {
      out.resize(std::max(out.size(), rows * width));
      status = pslm_forward(session_, tokens, count, guessed ? PSLM_LOGITS_ALL : PSLM_LOGITS_LAST,
                            out.data(), out.size(), error);
    } else {
      const pslm_penalty penalty{sampler_.penalty(), text_.data() + from(), text_.size() - from()};
      status = pslm_forward_greedy(session_, tokens, count, rows,
                                   penalty.factor > 1 ? &penalty : nullptr, best, error);
    }
    for (size_t at = 0; status == PSLM_OK && at < rows; ++at) {
      held_ += at ? 1 : count - guessed;
      if (by_logits) {
        if (guessed) std::copy_n(out.data() + at * width, width, logits_.data());
        status = pick(known + at, error);
      } else {
        ready_.push_back({best[at]});
      }
      if (at + 1 == rows || status != PSLM_OK || ready_.back().whole ||
          ready_.back().token != tokens[count - guessed + at])
        break;
    }
    text_.resize(known);
    return status;
  }

  // A token from logits_, behind the first `known` of text_.
  pslm_status pick(size_t known, pslm_error error) {
    if (options_.logprobs) raw_ = logits_;  // before any penalty
    if (options_.constraint) {
      const pslm_status status =
          pslm_constraint_apply(options_.constraint, logits_.data(), logits_.size(), error);
      if (status != PSLM_OK) return status;
    }
    Picked picked{sampler_.pick(logits_.data(), logits_.size(), text_.data() + from(),
                                known - from())};
    if (options_.logprobs) picked.logprob = log_probability(raw_, picked.token);
    if (options_.constraint) {
      if (const pslm_status status =
              pslm_constraint_advance(options_.constraint, picked.token, error))
        return status;
      picked.whole = pslm_constraint_state(options_.constraint) & PSLM_TEXT_MUST_END;
    }
    ready_.push_back(picked);
    return PSLM_OK;
  }

  // Where the tokens begin that are penalized.
  size_t from() const { return options_.spare_prompt ? prompt_ : 0; }

  pslm_session* session_;
  pslm_generation options_;
  const std::vector<int32_t> ends_;
  std::vector<int32_t> text_;  // with the tokens that were given
  const size_t prompt_;        // tokens that the text began with
  size_t end_;                 // tokens that the text may have
  bool context_ends_;
  size_t held_;  // tokens of the text, given or ready, that the session holds
  Sampler sampler_;
  std::vector<float> logits_, raw_;
  std::vector<float> rows_;   // of logits, where there are guesses
  std::deque<Picked> ready_;  // tokens that follow
  std::optional<PromptLookup> lookup_;
  size_t told_ = 0;  // tokens that it knows
  bool over_ = false;
};

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
  return guarded(error, [&] {
    *generator = new pslm_generator(session, text, count, *options);
    return PSLM_OK;
  });
}

pslm_status pslm_generator_next(pslm_generator* generator, pslm_made* made, pslm_error error) {
  if (!generator || !made) return report(error, PSLM_ERROR_ARGUMENT, "null argument");
  return guarded(error, [&] { return generator->next(made, error); });
}

void pslm_generator_close(pslm_generator* generator) {
  if (!generator) return;
  generator->cut_back();
  delete generator;
}

struct pslm_sampler {
  Sampler sampler;
};

pslm_status pslm_sampler_open(const pslm_generation* options, pslm_sampler** sampler,
                              pslm_error error) {
  if (!options || !sampler) return report(error, PSLM_ERROR_ARGUMENT, "null argument");
  *sampler = nullptr;
  if (const pslm_status status = check_sampling(*options, error)) return status;
  return guarded(error, [&] {
    *sampler = new pslm_sampler{Sampler(sampling_of(*options))};
    return PSLM_OK;
  });
}

void pslm_sampler_close(pslm_sampler* sampler) { delete sampler; }

pslm_status pslm_sampler_pick(pslm_sampler* sampler, float* logits, size_t count,
                              const int32_t* seen, size_t seen_count, int32_t* token,
                              pslm_error error) {
  if (!sampler || !logits || !token || (seen_count && !seen))
    return report(error, PSLM_ERROR_ARGUMENT, "null argument");
  if (count == 0) return report(error, PSLM_ERROR_ARGUMENT, "no logits");
  if (const pslm_status status =
          check_vocabulary(static_cast<uint32_t>(count), seen, seen_count, error))
    return status;
  // Minus infinity is what a constraint rules out.
  float highest = -std::numeric_limits<float>::infinity();
  bool numbers = true;
  for (size_t i = 0; i < count; ++i) {
    numbers &= !std::isnan(logits[i]);
    highest = std::max(highest, logits[i]);
  }
  if (!numbers || !std::isfinite(highest))
    return report(error, PSLM_ERROR_NOT_FINITE, "no token can be drawn from logits that are not finite");
  return guarded(error, [&] {
    *token = sampler->sampler.pick(logits, count, seen, seen_count);
    return PSLM_OK;
  });
}
