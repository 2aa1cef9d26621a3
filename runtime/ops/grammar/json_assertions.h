// What several schemas say together of one value.
#pragma once

#include <cstdint>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "grammar/numbers.h"
#include "runner/json.h"

namespace pocketslm::grammar {

enum Types : uint32_t {
  kNull = 1,
  kBoolean = 2,
  kObject = 4,
  kArray = 8,
  kNumber = 16,
  kInteger = 32,  // allowed wherever numbers are
  kString = 64,
  kAllTypes = 127
};

// A schema, without those of its keywords that were already followed.
struct Item {
  const Json* schema;
  bool branched = false;  // one of its anyOf or oneOf was chosen
  bool operator<(const Item& o) const {
    return std::pair(schema, branched) < std::pair(o.schema, o.branched);
  }
  bool operator==(const Item& o) const { return schema == o.schema && branched == o.branched; }
};
using Items = std::vector<Item>;

struct Assertions {
  bool impossible = false;
  uint32_t types = kAllTypes;
  std::optional<std::vector<const Json*>> values;  // of enum and const
  std::optional<Bound> low, high;
  uint32_t min_length = 0, max_length = kUnlimited;
  uint32_t min_items = 0, max_items = kUnlimited;
  std::vector<std::string> patterns, formats;
  // Of each schema that says something of members or elements: its keywords, or null.
  struct Members {
    const Json *properties = nullptr, *additional = nullptr;
  };
  struct Elements {
    const Json *prefix = nullptr, *rest = nullptr;
  };
  std::vector<Members> members;
  std::vector<Elements> elements;
  std::vector<std::string> required;

  void add(const Json& schema);
  // Those of the values that the other assertions allow.
  std::vector<const Json*> allowed_values() const;
};

uint32_t type_of(const Json& value);
uint32_t types_of(const Json& type);  // of the keyword
bool same_value(const Json& a, const Json& b);

// Follows $ref and allOf.
class Schemas {
 public:
  explicit Schemas(const Json& root) : root_(root) {}
  const Json& target(const std::string& reference) const;
  // The items and what they refer to, each once.
  Items expanded(const Items& items) const;
  // Whether no value matches both; false where that is not sure.
  bool disjoint(const Json& a, const Json& b, int depth = 0) const;

 private:
  void expand(const Item& item, Items& out, std::vector<const Json*>& path) const;
  const Json& resolved(const Json& schema) const;

  const Json& root_;
};

}  // namespace pocketslm::grammar
