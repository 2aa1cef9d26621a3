#include "grammar/numbers.h"

#include <algorithm>
#include <map>
#include <tuple>

namespace pocketslm::grammar {
namespace {

constexpr uint32_t kMostDigits = 30;        // of a number without bounds
constexpr size_t kExactDigits = 15;         // that a double tells apart
constexpr long kMaxExponent = 400;

Expr digit(Builder& builder, char first, char last, uint32_t min = 1, uint32_t max = 1) {
  if (first > last) return min ? builder.never() : builder.empty();
  const CodeSet set{{static_cast<uint32_t>(first), static_cast<uint32_t>(last)}};
  return builder.characters(set, Writing::plain, min, max);
}

int compare_whole(const std::string& a, const std::string& b) {
  if (a.size() != b.size()) return a.size() < b.size() ? -1 : 1;
  return a.compare(b);
}

std::string plus_one(std::string digits) {
  size_t at = digits.size();
  while (at > 0 && digits[at - 1] == '9') digits[--at] = '0';
  if (at == 0) return "1" + digits;
  ++digits[at - 1];
  return digits;
}

std::string minus_one(std::string digits) {  // of a positive number
  size_t at = digits.size();
  while (digits[at - 1] == '0') digits[--at] = '9';
  --digits[at - 1];
  const size_t first = digits.find_first_not_of('0');
  return first == std::string::npos ? "0" : digits.substr(first);
}

// Digits of one length from `low` to `high`, both of that length.
class SameLength {
 public:
  SameLength(Builder& builder, const std::string& low, const std::string& high)
      : builder_(builder), low_(low), high_(high) {}

  Expr write(size_t at = 0, bool tight_low = true, bool tight_high = true) {
    const size_t left = low_.size() - at;
    if (left == 0) return builder_.empty();
    if (!tight_low && !tight_high) {
      const auto count = static_cast<uint32_t>(left);
      return digit(builder_, '0', '9', count, count);
    }
    const auto [known, fresh] = written_.emplace(std::tuple(at, tight_low, tight_high), 0);
    if (!fresh) return known->second;
    const char from = tight_low ? low_[at] : '0', to = tight_high ? high_[at] : '9';
    std::vector<Expr> options;
    char first = from, last = to;
    if (tight_low) {
      options.push_back(one(at, from, true, tight_high && from == to));
      ++first;
    }
    if (tight_high && !(tight_low && from == to)) {
      options.push_back(one(at, to, false, true));
      --last;
    }
    if (first <= last)
      options.push_back(builder_.seq({digit(builder_, first, last), write(at + 1, false, false)}));
    return written_[{at, tight_low, tight_high}] = builder_.alt(options);
  }

 private:
  Expr one(size_t at, char value, bool tight_low, bool tight_high) {
    return builder_.seq({digit(builder_, value, value), write(at + 1, tight_low, tight_high)});
  }

  Builder& builder_;
  const std::string low_, high_;
  std::map<std::tuple<size_t, bool, bool>, Expr> written_;
};

std::string smallest_of_length(size_t length) {
  return length == 1 ? "0" : "1" + std::string(length - 1, '0');
}

// Numbers of `length` digits between two that are not negative; no high one is no bound.
Expr of_length(Builder& builder, size_t length, const std::string& low, const std::string* high) {
  const std::string from = std::max(low, smallest_of_length(length), [](auto& a, auto& b) {
    return compare_whole(a, b) < 0;
  });
  std::string to(length, '9');
  if (high && compare_whole(*high, to) < 0) to = *high;
  if (from.size() != length || to.size() != length || compare_whole(from, to) > 0)
    return builder.never();
  return SameLength(builder, from, to).write();
}

// Whole numbers between two that are not negative.
Expr whole_between(Builder& builder, const std::string& low, const std::string* high) {
  if (high && compare_whole(low, *high) > 0) return builder.never();
  const size_t longest = high ? high->size() : std::max<size_t>(low.size(), kMostDigits);
  std::vector<Expr> options{of_length(builder, low.size(), low, high)};
  if (longest > low.size()) {
    // Every length between has all its numbers.
    const size_t full = high ? longest - 1 : longest;
    if (full > low.size())
      options.push_back(builder.seq(
          {digit(builder, '1', '9'), digit(builder, '0', '9', static_cast<uint32_t>(low.size()),
                                           static_cast<uint32_t>(full - 1))}));
    if (high) options.push_back(of_length(builder, longest, low, high));
  }
  return builder.alt(options);
}

// What stands after a whole part: nothing, or a point and digits, `most` at most. Above what `low`
// and below what `high` says of the fraction alone; null is no bound.
struct FractionBound {
  std::string digits;
  bool exclusive;
};
class Fractions {
 public:
  Fractions(Builder& builder, const FractionBound* low, const FractionBound* high, uint32_t most)
      : builder_(builder), low_(low), high_(high), most_(most) {}

  Expr write() {
    std::vector<Expr> options;
    if (may_stop(0, low_ != nullptr, high_ != nullptr)) options.push_back(builder_.empty());
    if (most_ > 0)
      options.push_back(
          builder_.seq({builder_.text("."), digits(0, low_ != nullptr, high_ != nullptr)}));
    return builder_.alt(options);
  }

 private:
  bool may_stop(size_t at, bool low, bool high) const {
    if (low && (at < low_->digits.size() || low_->exclusive)) return false;
    return !high || at < high_->digits.size() || !high_->exclusive;
  }
  // From digit `at` on, one at least; the bounds that all digits so far are equal to still count.
  Expr digits(size_t at, bool low, bool high) {
    if (at >= most_) return builder_.never();
    const auto left = static_cast<uint32_t>(most_ - at);
    if (!low && !high) return digit(builder_, '0', '9', 1, left);
    const auto [known, fresh] = written_.emplace(std::tuple(at, low, high), 0);
    if (!fresh) return known->second;
    const auto digit_of = [at](const FractionBound& bound) {
      return at < bound.digits.size() ? bound.digits[at] : '0';
    };
    std::vector<Expr> options;
    for (char d = '0'; d <= '9'; ++d) {
      if ((low && d < digit_of(*low_)) || (high && d > digit_of(*high_))) continue;
      const bool low_now = low && d == digit_of(*low_), high_now = high && d == digit_of(*high_);
      Expr rest = digits(at + 1, low_now, high_now);
      if (may_stop(at + 1, low_now, high_now)) rest = builder_.optional(rest);
      options.push_back(builder_.seq({digit(builder_, d, d), rest}));
    }
    return written_[{at, low, high}] = builder_.alt(options);
  }

  Builder& builder_;
  const FractionBound *low_, *high_;
  const uint32_t most_;
  std::map<std::tuple<size_t, bool, bool>, Expr> written_;
};

uint32_t fraction_digits(size_t whole) {
  return whole >= kExactDigits ? 0 : static_cast<uint32_t>(kExactDigits - whole);
}

// Numbers between two that are not negative.
Expr decimals_between(Builder& builder, const Bound& low, const Bound* high) {
  const FractionBound low_part{low.value.fraction, low.exclusive};
  FractionBound high_part;
  if (high) high_part = {high->value.fraction, high->exclusive};
  const std::string& from = low.value.whole;
  const auto with_whole = [&](const std::string& whole, const FractionBound* above,
                              const FractionBound* below) {
    const uint32_t most = std::max({fraction_digits(whole.size()),
                                    static_cast<uint32_t>(above ? above->digits.size() : 0),
                                    static_cast<uint32_t>(below ? below->digits.size() : 0)});
    return builder.seq({builder.text(whole), Fractions(builder, above, below, most).write()});
  };
  if (high && from == high->value.whole) return with_whole(from, &low_part, &high_part);
  if (high && compare_whole(from, high->value.whole) > 0) return builder.never();
  std::vector<Expr> options{with_whole(from, &low_part, nullptr)};
  if (high) options.push_back(with_whole(high->value.whole, nullptr, &high_part));
  const std::string first = plus_one(from);
  const std::string last = high ? minus_one(high->value.whole) : "";
  const std::string* const end = high ? &last : nullptr;
  const size_t longest = high ? last.size() : std::max<size_t>(first.size(), kMostDigits);
  for (size_t length = first.size(); length <= longest; ++length) {
    const Fractions free(builder, nullptr, nullptr, fraction_digits(length));
    if (length >= kExactDigits) {  // no fractions from here on
      const std::string low_of_length =
          length == first.size() ? first : smallest_of_length(length);
      options.push_back(whole_between(builder, low_of_length, end));
      break;
    }
    options.push_back(
        builder.seq({of_length(builder, length, first, end), Fractions(free).write()}));
  }
  return builder.alt(options);
}

Decimal negated(Decimal value) {
  value.negative = !value.negative && !value.is_zero();
  return value;
}

// The numbers that `write` gives for both sides of zero.
template <typename F>
Expr both_sides(Builder& builder, const std::optional<Bound>& low, const std::optional<Bound>& high,
                F&& write) {
  const Bound zero{}, above_zero{{}, true};
  const auto is_below = [](const Bound& a, const Bound& b) {
    const int order = a.value.compare(b.value);
    return order < 0 || (order == 0 && !a.exclusive && b.exclusive);
  };
  std::vector<Expr> options;
  const Bound from = low && is_below(zero, *low) ? *low : zero;
  options.push_back(write(from, high ? &*high : nullptr));
  std::optional<Bound> mirrored_low, mirrored_high;
  if (high) mirrored_low = Bound{negated(high->value), high->exclusive};
  if (low) mirrored_high = Bound{negated(low->value), low->exclusive};
  const Bound below = mirrored_low && is_below(above_zero, *mirrored_low) ? *mirrored_low : above_zero;
  options.push_back(
      builder.seq({builder.text("-"), write(below, mirrored_high ? &*mirrored_high : nullptr)}));
  return builder.alt(options);
}

}  // namespace

Decimal Decimal::read(const std::string& text) {
  Decimal out;
  size_t at = text[0] == '-';
  out.negative = at;
  std::string digits;
  long point = -1, exponent = 0;
  for (; at < text.size() && text[at] != 'e' && text[at] != 'E'; ++at) {
    if (text[at] == '.')
      point = static_cast<long>(digits.size());
    else
      digits += text[at];
  }
  if (point < 0) point = static_cast<long>(digits.size());
  if (at < text.size()) exponent = std::strtol(text.c_str() + at + 1, nullptr, 10);
  if (digits.find_first_not_of('0') == std::string::npos) return {};
  if (exponent > kMaxExponent || exponent < -kMaxExponent || digits.size() > kMaxExponent)
    throw GrammarError("the bound " + text.substr(0, 40) + " has too many digits");
  point += exponent;
  if (point <= 0) {
    digits.insert(0, static_cast<size_t>(1 - point), '0');
    point = 1;
  }
  if (static_cast<size_t>(point) > digits.size()) digits.resize(static_cast<size_t>(point), '0');
  out.whole = digits.substr(0, static_cast<size_t>(point));
  out.fraction = digits.substr(static_cast<size_t>(point));
  out.whole.erase(0, std::min(out.whole.find_first_not_of('0'), out.whole.size() - 1));
  out.fraction.erase(out.fraction.find_last_not_of('0') + 1);
  return out;
}

size_t Decimal::digits() const {
  const std::string all = whole + fraction;
  return all.size() - std::min(all.find_first_not_of('0'), all.size());
}

int Decimal::compare(const Decimal& other) const {
  if (negative != other.negative) return negative ? -1 : 1;
  int order = compare_whole(whole, other.whole);
  if (order == 0) order = fraction.compare(other.fraction);
  return negative ? -order : order;
}

Expr write_integers(Builder& builder, const std::optional<Bound>& low,
                    const std::optional<Bound>& high) {
  return both_sides(builder, low, high, [&](const Bound& from, const Bound* to) {
    std::string first = from.value.whole, last;
    if (!from.value.fraction.empty() || from.exclusive) first = plus_one(first);
    if (!to) return whole_between(builder, first, nullptr);
    if (to->value.negative) return builder.never();
    last = to->value.whole;
    if (to->exclusive && to->value.fraction.empty()) {
      if (last == "0") return builder.never();
      last = minus_one(last);
    }
    return whole_between(builder, first, &last);
  });
}

Expr write_numbers(Builder& builder, const std::optional<Bound>& low,
                   const std::optional<Bound>& high) {
  for (const auto& bound : {low, high})
    if (bound && bound->value.digits() > kExactDigits && !bound->value.fraction.empty())
      throw GrammarError("a bound of numbers has more than 15 significant digits");
  if (!low && !high) {
    const Expr digits = digit(builder, '0', '9', 1, kMostDigits);
    const Expr whole = builder.alt(
        {builder.text("0"),
         builder.seq({digit(builder, '1', '9'), digit(builder, '0', '9', 0, kMostDigits - 1)})});
    const Expr sign = builder.optional(
        builder.alt({builder.text("+"), builder.text("-")}));
    const Expr power = builder.seq({builder.alt({builder.text("e"), builder.text("E")}), sign,
                                    digit(builder, '0', '9', 1, 2)});
    return builder.seq({builder.optional(builder.text("-")), whole,
                        builder.optional(builder.seq({builder.text("."), digits})),
                        builder.optional(power)});
  }
  return both_sides(builder, low, high, [&](const Bound& from, const Bound* to) {
    if (to && to->value.negative) return builder.never();
    return decimals_between(builder, from, to);
  });
}

}  // namespace pocketslm::grammar
