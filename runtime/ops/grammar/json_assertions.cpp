#include "grammar/json_assertions.h"

#include <algorithm>
#include <cstring>

namespace pocketslm::grammar {
namespace {

constexpr size_t kMaxReferences = 64;  // one leading to the next

// Keywords that say nothing of what a value may be; others that are not known are refused.
constexpr const char* kAnnotations[] = {
    "$schema", "$id",      "$comment", "$defs",    "definitions", "title",     "description",
    "default", "examples", "readOnly", "writeOnly", "deprecated",  "minContains"};

GrammarError wrong(const std::string& keyword, const std::string& expected) {
  return GrammarError("'" + keyword + "' must be " + expected);
}

bool is_number(const std::string& text) {
  size_t at = text[0] == '-';
  const auto digits = [&] {
    const size_t from = at;
    while (at < text.size() && text[at] >= '0' && text[at] <= '9') ++at;
    return at - from;
  };
  const bool zero = at < text.size() && text[at] == '0';
  const size_t whole = digits();
  if (whole == 0 || (zero && whole > 1)) return false;
  if (at < text.size() && text[at] == '.' && (++at, digits() == 0)) return false;
  if (at < text.size() && (text[at] == 'e' || text[at] == 'E')) {
    ++at;
    if (at < text.size() && (text[at] == '+' || text[at] == '-')) ++at;
    if (digits() == 0) return false;
  }
  return at == text.size();
}

Decimal number(const std::string& keyword, const Json& value) {
  if (!value.is(Json::Kind::number) || !is_number(value.string)) throw wrong(keyword, "a number");
  return Decimal::read(value.string);
}

uint32_t count(const std::string& keyword, const Json& value) {
  if (!value.is_whole(0, 1e15)) throw wrong(keyword, "a whole number from 0 on");
  return value.number > kMaxRepeats ? kUnlimited : static_cast<uint32_t>(value.number);
}

uint32_t least(const std::string& keyword, const Json& value) {
  const uint32_t bound = count(keyword, value);
  if (bound == kUnlimited)
    throw GrammarError("'" + keyword + "' is above " + std::to_string(kMaxRepeats) +
                       ", which is not supported");
  return bound;
}

void check_value(const Json& value) {
  if (value.is(Json::Kind::number) && !is_number(value.string))
    throw GrammarError("the schema is not JSON: the number " + value.string.substr(0, 40));
  for (const Json& item : value.items) check_value(item);
  for (const auto& field : value.fields) check_value(field.second);
}

size_t characters_of(const std::string& text) {
  return static_cast<size_t>(std::count_if(
      text.begin(), text.end(), [](char c) { return (static_cast<unsigned char>(c) & 0xc0) != 0x80; }));
}

void narrow(std::optional<Bound>& bound, Bound other, int direction) {
  if (bound) {
    const int order = other.value.compare(bound->value) * direction;
    if (order < 0 || (order == 0 && bound->exclusive)) return;
  }
  bound = std::move(other);
}

}  // namespace

uint32_t type_of(const Json& value) {
  switch (value.kind) {
    case Json::Kind::null: return kNull;
    case Json::Kind::boolean: return kBoolean;
    case Json::Kind::string: return kString;
    case Json::Kind::array: return kArray;
    case Json::Kind::object: return kObject;
    default: return Decimal::read(value.string).fraction.empty() ? kInteger : kNumber;
  }
}

uint32_t types_of(const Json& type) {
  static constexpr std::pair<const char*, uint32_t> kNames[] = {
      {"null", kNull},     {"boolean", kBoolean},          {"object", kObject}, {"array", kArray},
      {"string", kString}, {"number", kNumber | kInteger}, {"integer", kInteger}};
  if (type.is(Json::Kind::array)) {
    uint32_t types = 0;
    for (const Json& one : type.items)
      types |= one.is(Json::Kind::string) ? types_of(one) : throw wrong("type", "names of types");
    return types;
  }
  for (const auto& [name, types] : kNames)
    if (type.is(Json::Kind::string) && type.string == name) return types;
  throw wrong("type", "the name of a type, or a list of them");
}

bool same_value(const Json& a, const Json& b) {
  if (a.kind != b.kind) return false;
  switch (a.kind) {
    case Json::Kind::boolean: return a.boolean == b.boolean;
    case Json::Kind::number: return Decimal::read(a.string).compare(Decimal::read(b.string)) == 0;
    case Json::Kind::string: return a.string == b.string;
    case Json::Kind::array:
      return std::equal(a.items.begin(), a.items.end(), b.items.begin(), b.items.end(), same_value);
    case Json::Kind::object:
      return a.fields.size() == b.fields.size() &&
             std::all_of(a.fields.begin(), a.fields.end(), [&](const auto& field) {
               const Json* other = b.find(field.first);
               return other && same_value(field.second, *other);
             });
    default: return true;
  }
}

void Assertions::add(const Json& schema) {
  Members own_members;
  Elements own_elements;
  const auto values_are = [&](std::vector<const Json*> listed) {
    if (values) {
      const auto shared = [&](const Json* value) {
        return std::any_of(values->begin(), values->end(),
                           [&](const Json* other) { return same_value(*value, *other); });
      };
      listed.erase(std::remove_if(listed.begin(), listed.end(),
                                  [&](const Json* value) { return !shared(value); }),
                   listed.end());
    }
    values = std::move(listed);
  };
  for (const auto& [name, value] : schema.fields) {
    const auto is = [&name = name](const char* keyword) { return name == keyword; };
    if (is("type")) {
      types &= types_of(value);
    } else if (is("const")) {
      check_value(value);
      values_are({&value});
    } else if (is("enum")) {
      if (!value.is(Json::Kind::array)) throw wrong(name, "a list");
      check_value(value);
      std::vector<const Json*> listed;
      for (const Json& one : value.items) listed.push_back(&one);
      values_are(std::move(listed));
    } else if (is("minimum") || is("exclusiveMinimum")) {
      narrow(low, {number(name, value), name[0] == 'e'}, 1);
    } else if (is("maximum") || is("exclusiveMaximum")) {
      narrow(high, {number(name, value), name[0] == 'e'}, -1);
    } else if (is("minLength")) {
      min_length = std::max(min_length, least(name, value));
    } else if (is("maxLength")) {
      max_length = std::min(max_length, count(name, value));
    } else if (is("minItems")) {
      min_items = std::max(min_items, least(name, value));
    } else if (is("maxItems")) {
      max_items = std::min(max_items, count(name, value));
    } else if (is("pattern") || is("format")) {
      if (!value.is(Json::Kind::string)) throw wrong(name, "a string");
      auto& texts = name == "pattern" ? patterns : formats;
      if (std::find(texts.begin(), texts.end(), value.string) == texts.end())
        texts.push_back(value.string);
    } else if (is("properties")) {
      if (!value.is(Json::Kind::object)) throw wrong(name, "an object of schemas");
      own_members.properties = &value;
    } else if (is("additionalProperties")) {
      own_members.additional = &value;
    } else if (is("required")) {
      if (!value.is(Json::Kind::array)) throw wrong(name, "a list of names");
      for (const Json& one : value.items) {
        if (!one.is(Json::Kind::string)) throw wrong(name, "a list of names");
        if (std::find(required.begin(), required.end(), one.string) == required.end())
          required.push_back(one.string);
      }
    } else if (is("prefixItems")) {
      if (!value.is(Json::Kind::array)) throw wrong(name, "a list of schemas");
      own_elements.prefix = &value;
    } else if (is("items")) {
      if (value.is(Json::Kind::array))
        throw GrammarError("'items' with a list is not supported; use 'prefixItems'");
      own_elements.rest = &value;
    } else if (is("uniqueItems") && value.is(Json::Kind::boolean) && !value.boolean) {
      // says nothing
    } else if (!is("anyOf") && !is("oneOf") && !is("allOf") && !is("$ref") &&
               std::none_of(std::begin(kAnnotations), std::end(kAnnotations), is)) {
      throw GrammarError("the keyword '" + name.substr(0, 60) + "' is not supported");
    }
  }
  if (own_members.properties || own_members.additional) members.push_back(own_members);
  if (own_elements.prefix || own_elements.rest) elements.push_back(own_elements);
}

std::vector<const Json*> Assertions::allowed_values() const {
  std::vector<const Json*> out;
  for (const Json* value : *values) {
    const uint32_t type = type_of(*value);
    if (!(types & type)) continue;
    const auto refuse = [](bool present, const char* what) {
      if (present)
        throw GrammarError(std::string("'enum' or 'const' together with ") + what +
                           " is not supported");
    };
    if (type == kString) {
      refuse(!patterns.empty(), "'pattern'");
      refuse(!formats.empty(), "'format'");
      const size_t length = characters_of(value->string);
      if (length < min_length || length > max_length) continue;
    } else if (type & (kNumber | kInteger)) {
      const Decimal number = Decimal::read(value->string);
      const int above = low ? number.compare(low->value) : 1;
      const int below = high ? number.compare(high->value) : -1;
      if (above < 0 || (above == 0 && low->exclusive) || below > 0 ||
          (below == 0 && high->exclusive))
        continue;
    } else if (type == kObject) {
      refuse(!members.empty() || !required.empty(), "what says something of members");
    } else if (type == kArray) {
      refuse(!elements.empty(), "what says something of elements");
      if (value->items.size() < min_items || value->items.size() > max_items) continue;
    }
    out.push_back(value);
  }
  return out;
}

const Json& Schemas::target(const std::string& reference) const {
  const auto fail = [&](const char* why) {
    return GrammarError("the $ref '" + reference.substr(0, 100) + "' " + why);
  };
  if (reference.empty() || reference[0] != '#' || (reference.size() > 1 && reference[1] != '/'))
    throw fail("is not supported; expected one within the schema, such as '#/$defs/name'");
  const Json* at = &root_;
  for (size_t from = 1; from < reference.size();) {
    const size_t end = std::min(reference.find('/', from + 1), reference.size());
    std::string name;
    for (size_t i = from + 1; i < end; ++i) {
      unsigned code = 0;
      if (reference[i] == '%' && end - i > 2 &&
          std::sscanf(reference.substr(i + 1, 2).c_str(), "%2x", &code) == 1) {
        name += static_cast<char>(code);
        i += 2;
      } else if (reference[i] == '~' && end - i > 1) {
        name += reference[++i] == '1' ? '/' : '~';
      } else {
        name += reference[i];
      }
    }
    const Json* next = at->find(name);
    if (!next && at->is(Json::Kind::array) && !name.empty() && name.size() < 7 &&
        name.find_first_not_of("0123456789") == std::string::npos) {
      const size_t index = std::stoul(name);
      if (index < at->items.size()) next = &at->items[index];
    }
    if (!next) throw fail("leads nowhere");
    at = next;
    from = end;
  }
  return *at;
}

void Schemas::expand(const Item& item, Items& out, std::vector<const Json*>& path) const {
  const Json& schema = *item.schema;
  if (schema.is(Json::Kind::boolean) && schema.boolean) return;
  if (!schema.is(Json::Kind::boolean) && !schema.is(Json::Kind::object))
    throw GrammarError("a schema must be an object, true or false");
  if (std::find(path.begin(), path.end(), &schema) != path.end())
    throw GrammarError("a $ref leads to itself");
  const auto same = [&](const Item& known) { return known.schema == &schema; };
  const bool known = std::any_of(out.begin(), out.end(), same);
  if (known && !path.empty()) return;
  if (path.size() > kMaxReferences) throw GrammarError("$ref and allOf lead too far");
  if (!known) out.push_back(item);
  if (schema.find("$id") && &schema != &root_)
    throw GrammarError("'$id' within a schema is not supported");
  path.push_back(&schema);
  if (const Json* reference = schema.find("$ref")) {
    if (!reference->is(Json::Kind::string)) throw wrong("$ref", "a string");
    expand({&target(reference->string)}, out, path);
  }
  if (const Json* all = schema.find("allOf")) {
    if (!all->is(Json::Kind::array)) throw wrong("allOf", "a list of schemas");
    for (const Json& one : all->items) expand({&one}, out, path);
  }
  path.pop_back();
}

Items Schemas::expanded(const Items& items) const {
  Items out;  // those that were branched already stand for themselves wherever a $ref leads to them
  for (const Item& item : items)
    if (item.branched) out.push_back(item);
  std::vector<const Json*> path;
  for (const Item& item : items) expand(item, out, path);
  return out;
}

// What a schema that is nothing but a reference refers to.
const Json& Schemas::resolved(const Json& schema) const {
  const Json* at = &schema;
  for (size_t i = 0; i < kMaxReferences; ++i) {
    const Json* reference = at->find("$ref");
    if (!reference || !reference->is(Json::Kind::string)) break;
    at = &target(reference->string);
  }
  return *at;
}

bool Schemas::disjoint(const Json& first, const Json& second, int depth) const {
  const Json &a = resolved(first), &b = resolved(second);
  if (depth > 4 || !a.is(Json::Kind::object) || !b.is(Json::Kind::object)) return false;
  const auto values = [](const Json& schema) {
    std::vector<const Json*> out;
    if (const Json* value = schema.find("const")) return std::vector<const Json*>{value};
    if (const Json* list = schema.find("enum"))
      for (const Json& value : list->items) out.push_back(&value);
    return out;
  };
  const auto types = [&](const Json& schema) {
    uint32_t out = kAllTypes;
    if (const Json* type = schema.find("type")) out = types_of(*type);
    uint32_t listed = 0;
    for (const Json* value : values(schema)) listed |= type_of(*value);
    return listed ? out & listed : out;
  };
  const uint32_t types_a = types(a), types_b = types(b);
  if (!(types_a & types_b)) return true;
  const auto values_a = values(a), values_b = values(b);
  if (!values_a.empty() && !values_b.empty())
    return std::none_of(values_a.begin(), values_a.end(), [&](const Json* value) {
      return std::any_of(values_b.begin(), values_b.end(),
                         [&](const Json* other) { return same_value(*value, *other); });
    });
  if ((types_a & types_b) != kObject) return false;
  const auto requires_it = [](const Json& schema, const std::string& name) {
    const Json* required = schema.find("required");
    return required && std::any_of(required->items.begin(), required->items.end(),
                                   [&](const Json& one) { return one.string == name; });
  };
  const auto of = [](const Json& schema, const std::string& name) -> const Json* {
    const Json* properties = schema.find("properties");
    return properties ? properties->find(name) : nullptr;
  };
  const auto forbids = [&](const Json& schema, const std::string& name) {
    const Json* additional = schema.find("additionalProperties");
    return additional && additional->is(Json::Kind::boolean) && !additional->boolean &&
           !of(schema, name);
  };
  for (const auto* pair : {&a, &b}) {
    const Json &one = *pair, &other = pair == &a ? b : a;
    const Json* required = one.find("required");
    if (!required) continue;
    for (const Json& name : required->items) {
      if (forbids(other, name.string)) return true;
      const Json *here = of(one, name.string), *there = of(other, name.string);
      if (here && there && requires_it(other, name.string) && disjoint(*here, *there, depth + 1))
        return true;
    }
  }
  return false;
}

}  // namespace pocketslm::grammar
