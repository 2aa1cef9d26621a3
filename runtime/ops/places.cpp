#include "places.h"

#include <algorithm>
#include <vector>

namespace pocketslm {
namespace {

constexpr size_t kPlaceBytes = 4096;  // places begin at a page

using Set = unsigned;  // of parts
constexpr Set of(size_t part) { return Set{1} << part; }
constexpr Set of(BufferId buffer) { return of(static_cast<size_t>(buffer)); }
constexpr Set kQuery = of(BufferId::query), kKey = of(BufferId::key), kValue = of(BufferId::value);
constexpr Set kResidual = of(BufferId::residual), kAttended = of(BufferId::attended);
constexpr Set kHidden = of(BufferId::hidden);

// What a step needs of what is there, and what it fills anew.
struct Use {
  Set reads, fills;
};

Use use_of(const Step& step) {
  const Set input = kResidual, made_ready = of(kNormed) | of(kPanel);
  switch (step.code) {
    case Code::embed: return {0, kResidual};
    case Code::norm: return {of(step.buffer), 0};
    case Code::project:
      return {input, made_ready | kQuery | (step.w[1] ? kKey : 0) | (step.w[2] ? kValue : 0)};
    case Code::attend:
      return {kQuery | (step.has(AttendFlag::reads_only) ? 0 : kKey | kValue), kAttended};
    case Code::short_conv: return {kQuery | kKey | kValue, kAttended};
    case Code::project_add: {
      const bool is_hidden = step.buffer == BufferId::hidden, has_panel = step.source != kNone;
      const Set panel = of(is_hidden ? kHiddenPanel : kPanel);
      return {input | of(step.buffer) | (is_hidden && has_panel ? panel : 0),
              of(kProjected) | (is_hidden && has_panel ? 0 : panel)};
    }
    case Code::gated: return {input, made_ready | kHidden | of(kHiddenPanel)};
    case Code::head: return {input, made_ready};
  }
  return {};
}

// For each part, those that hold something when it does.
std::vector<Set> together(const Program& program) {
  std::vector<Set> beside(kParts);
  Set needed = 0;  // after the step
  for (auto step = program.steps.rbegin(); step != program.steps.rend(); ++step) {
    const auto [reads, fills] = use_of(*step);
    const Set held = needed | reads | fills;
    const bool in_place = step->code == Code::attend && !(needed & kQuery);
    for (size_t part = 0; part < kParts; ++part) {
      if (!(held & of(part))) continue;
      Set others = held & ~of(part);
      if (in_place && of(part) == kQuery) others &= ~kAttended;
      if (in_place && of(part) == kAttended) others &= ~kQuery;
      beside[part] |= others;
    }
    needed = (needed & ~fills) | reads;
  }
  return beside;
}

}  // namespace

Places places_of(const Program& program, const size_t (&bytes)[kParts]) {
  std::vector<Set> beside = together(program);
  constexpr auto query = static_cast<size_t>(BufferId::query);
  constexpr auto attended = static_cast<size_t>(BufferId::attended);
  constexpr auto hidden = static_cast<size_t>(BufferId::hidden);
  size_t sizes[kParts];
  for (size_t part = 0; part < kParts; ++part) sizes[part] = round_up(bytes[part], kPlaceBytes);
  const bool in_place = !(beside[query] & kAttended);
  if (in_place) {
    beside[query] |= beside[attended];
    for (Set& parts : beside)
      if (parts & kAttended) parts |= kQuery;
    sizes[query] = std::max(sizes[query], sizes[attended]);
  }
  // The largest part first; floats that few models' matrices read, and so few touch, last.
  const auto rank = [&](size_t part) { return part == hidden || part == kNormed ? 0 : sizes[part]; };
  std::vector<size_t> order;
  for (size_t part = 0; part < kParts; ++part)
    if (sizes[part] && !(in_place && part == attended)) order.push_back(part);
  std::stable_sort(order.begin(), order.end(),
                   [&](size_t a, size_t b) { return rank(a) > rank(b); });
  Places places;
  std::vector<size_t> placed;  // by where they begin
  for (size_t part : order) {
    size_t& at = places.at[part];
    for (size_t other : placed)
      if (beside[part] & of(other) && at + sizes[part] > places.at[other])
        at = std::max(at, places.at[other] + sizes[other]);
    placed.insert(std::find_if(placed.begin(), placed.end(),
                               [&](size_t other) { return places.at[other] > at; }),
                  part);
    places.bytes = std::max(places.bytes, at + sizes[part]);
  }
  if (in_place) places.at[attended] = places.at[query];
  return places;
}

}  // namespace pocketslm
