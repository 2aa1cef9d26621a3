#include "grammar/machine.h"

#include <algorithm>

namespace pocketslm::grammar {
namespace {

constexpr size_t kMaxConfigs = 4096;          // at one place
constexpr size_t kMaxMemory = size_t{96} << 20;

uint64_t mix(uint64_t hash, uint64_t value) {
  hash ^= value + 0x9e3779b97f4a7c15u + (hash << 6) + (hash >> 2);
  return hash * 0xff51afd7ed558ccdu;
}

}  // namespace

bool Machine::Config::operator<(const Config& o) const {
  if (state != o.state) return state < o.state;
  if (stack != o.stack) return stack < o.stack;
  return count != o.count ? count < o.count : inner < o.inner;
}

Machine::Machine(const Automaton& automaton) : automaton_(automaton) {
  frames_.push_back({kBottom, 0, 0, 0});
  intern();  // dead
  reach({kBottom, automaton_.start, 0, 0});
  intern();
}

void Machine::spend(size_t work) {
  work_ += work;
  if (memory() > kMaxMemory)
    throw GrammarError("the grammar is too ambiguous: what may follow costs too much memory");
}

size_t Machine::memory() const {
  return rows_.size() * sizeof(uint32_t) + configs_.size() * sizeof(Config) +
         states_.size() * (sizeof(Place) + 48) + frames_.size() * (sizeof(Frame) + 48);
}

uint32_t Machine::frame(const Frame& wanted) {
  const uint64_t hash = mix(mix(wanted.parent, wanted.state), wanted.count);
  const auto [from, to] = frame_index_.equal_range(hash);
  for (auto at = from; at != to; ++at) {
    const Frame& known = frames_[at->second];
    if (known.parent == wanted.parent && known.state == wanted.state && known.count == wanted.count)
      return at->second;
  }
  frames_.push_back(wanted);
  frame_index_.emplace(hash, static_cast<uint32_t>(frames_.size() - 1));
  return static_cast<uint32_t>(frames_.size() - 1);
}

// Read what starts at `called`, then go on in `state`. Nothing is kept of a call that is the last
// thing to do, so that a list written as a rule that ends with itself has no depth.
void Machine::call(uint32_t stack, uint32_t called, uint32_t state, uint32_t count) {
  const bool last = automaton_.states[state].kind == State::Kind::end;
  if (!last) {
    const uint32_t depth = frames_[stack].depth + 1;
    if (depth > kMaxDepth) return;  // no way on through here
    stack = frame({stack, state, count, depth});
  }
  open_.push_back({stack, called, 0, 0});
}

// Whether this configuration is new at the place that is being found.
bool Machine::note(const Config& config) {
  constexpr size_t kFew = 24;  // these are looked through
  if (seen_.size() < kFew) {
    if (std::find(seen_.begin(), seen_.end(), config) != seen_.end()) return false;
  } else {
    const auto hash_of = [](const Config& c) {
      return mix(mix(c.stack, c.state), uint64_t{c.count} << 8 | c.inner);
    };
    if (seen_index_.empty())
      for (size_t i = 0; i < seen_.size(); ++i)
        seen_index_.emplace(hash_of(seen_[i]), static_cast<uint32_t>(i));
    const uint64_t hash = hash_of(config);
    const auto [first, last] = seen_index_.equal_range(hash);
    if (std::any_of(first, last, [&](const auto& at) { return seen_[at.second] == config; }))
      return false;
    seen_index_.emplace(hash, static_cast<uint32_t>(seen_.size()));
  }
  seen_.push_back(config);
  return true;
}

// All configurations that read, from here without reading.
void Machine::reach(const Config& from) {
  open_.push_back(from);
  while (!open_.empty()) {
    const Config config = open_.back();
    open_.pop_back();
    if (!note(config)) continue;
    if (seen_.size() > 16 * kMaxConfigs || found_.size() > kMaxConfigs)
      throw GrammarError("the grammar is too ambiguous: too much may stand at one place");
    const State& state = automaton_.states[config.state];
    switch (state.kind) {
      case State::Kind::bytes: found_.push_back(config); break;
      case State::Kind::characters:
        if (config.inner || config.count < state.max) found_.push_back(config);
        if (!config.inner && config.count >= state.min)
          open_.push_back({config.stack, state.next, 0, 0});
        break;
      case State::Kind::split:
        for (uint32_t i = 0; i < state.count; ++i)
          open_.push_back({config.stack, automaton_.targets[state.index + i], 0, 0});
        break;
      case State::Kind::call: call(config.stack, state.index, state.next, 0); break;
      case State::Kind::loop: {
        if (config.count >= state.min) open_.push_back({config.stack, state.next, 0, 0});
        if (config.count >= state.max) break;
        // Beyond what must be read, only a bound needs to be counted to.
        const bool enough = state.max == kUnlimited && config.count >= state.min;
        call(config.stack, state.index, config.state, enough ? config.count : config.count + 1);
        break;
      }
      case State::Kind::end: {
        const Frame frame = frames_[config.stack];
        if (config.stack == kBottom)
          accepts_ = true;
        else
          open_.push_back({frame.parent, frame.state, frame.count, 0});
        break;
      }
    }
  }
}

// The state of what reach() found since the last one.
uint32_t Machine::intern() {
  spend(seen_.size());
  std::sort(found_.begin(), found_.end());
  uint64_t hash = accepts_;
  for (const Config& config : found_)
    hash = mix(mix(hash, uint64_t{config.stack} << 32 | config.state),
               uint64_t{config.count} << 8 | config.inner);
  uint32_t result = kUnknown;
  const auto [from, to] = state_index_.equal_range(hash);
  for (auto at = from; at != to && result == kUnknown; ++at) {
    const Place& place = states_[at->second];
    if (place.accepts == accepts_ && place.count == found_.size() &&
        std::equal(found_.begin(), found_.end(),
                   configs_.begin() + static_cast<std::ptrdiff_t>(place.first)))
      result = at->second;
  }
  if (result == kUnknown) {
    result = static_cast<uint32_t>(states_.size());
    states_.push_back({configs_.size(), static_cast<uint32_t>(found_.size()), accepts_});
    configs_.insert(configs_.end(), found_.begin(), found_.end());
    rows_.resize(rows_.size() + automaton_.symbols, kUnknown);
    state_index_.emplace(hash, result);
  }
  forget_place();
  return result;
}

void Machine::forget_place() {
  found_.clear();
  seen_.clear();
  if (!seen_index_.empty()) seen_index_.clear();
  open_.clear();
  accepts_ = false;
}

uint32_t Machine::step(uint32_t from, uint8_t byte) {
  const Place place = states_[from];
  forget_place();  // what a failure left
  for (size_t i = 0; i < place.count; ++i) {
    Config config = configs_[place.first + i];
    const State& state = automaton_.states[config.state];
    if (state.kind == State::Kind::bytes) {
      if (automaton_.sets[state.index].test(byte)) reach({config.stack, state.next, 0, 0});
      continue;
    }
    const uint8_t inner = automaton_.classes[state.index].next[config.inner][byte];
    if (inner == CharacterReader::kDead) continue;
    config.inner = inner;
    const bool counts = state.max != kUnlimited || config.count < state.min;
    if (inner == 0 && counts) ++config.count;
    reach(config);
  }
  work_ += place.count;
  const uint32_t to = intern();
  rows_[size_t{from} * automaton_.symbols + automaton_.symbol_of[byte]] = to;
  return to;
}

Machine::Run Machine::run(uint32_t state) const {
  Run best;
  size_t bytes = 0;
  const Place& place = states_[state];
  for (size_t i = 0; i < place.count; ++i) {
    const Config& config = configs_[place.first + i];
    const State& at = automaton_.states[config.state];
    if (at.kind != State::Kind::characters || config.inner) continue;
    const uint32_t most = at.max == kUnlimited ? kUnlimited : at.max - config.count;
    const size_t width = automaton_.classes[at.index].first_bytes();
    if (width < bytes || (width == bytes && most <= best.most)) continue;
    bytes = width;
    best = {at.index, most};
  }
  return best;
}

uint32_t Machine::restart_from(uint32_t state) {
  Machine fresh(automaton_);
  const Place& place = states_[state];
  // The frames that it stands on, in their order: parents before what stands on them.
  std::vector<uint32_t> renamed(frames_.size(), kUnknown);
  renamed[kBottom] = kBottom;
  const auto keep = [&](uint32_t wanted) {
    std::vector<uint32_t> path;
    for (; renamed[wanted] == kUnknown; wanted = frames_[wanted].parent) path.push_back(wanted);
    for (auto at = path.rbegin(); at != path.rend(); ++at) {
      Frame copy = frames_[*at];
      copy.parent = renamed[copy.parent];
      renamed[*at] = fresh.frame(copy);
    }
  };
  for (size_t i = 0; i < place.count; ++i) {
    Config config = configs_[place.first + i];
    keep(config.stack);
    config.stack = renamed[config.stack];
    fresh.found_.push_back(config);
  }
  fresh.accepts_ = place.accepts;
  const uint32_t kept = fresh.intern();
  rows_.swap(fresh.rows_);
  states_.swap(fresh.states_);
  configs_.swap(fresh.configs_);
  frames_.swap(fresh.frames_);
  state_index_.swap(fresh.state_index_);
  frame_index_.swap(fresh.frame_index_);
  return kept;
}

}  // namespace pocketslm::grammar
