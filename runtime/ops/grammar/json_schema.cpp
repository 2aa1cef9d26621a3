#include "grammar/json_schema.h"

#include <algorithm>
#include <map>
#include <set>

#include "grammar/formats.h"
#include "grammar/json_assertions.h"
#include "grammar/regex.h"

namespace pocketslm::grammar {
namespace {

constexpr size_t kMaxBranches = 4096;   // of anyOf and oneOf, all together
constexpr size_t kMembersInARule = 32;  // so that no expression nests too deep

// A string as JSON.
std::string json_text(std::string_view text) {
  constexpr std::string_view kCodes = "\"\\\b\f\n\r\t", kLetters = "\"\\bfnrt";
  std::string out = "\"";
  for (const char c : text) {
    const size_t at = kCodes.find(c);
    if (at != std::string_view::npos) {
      out += {'\\', kLetters[at]};
    } else if (static_cast<unsigned char>(c) < 0x20) {
      char escaped[8];
      std::snprintf(escaped, sizeof escaped, "\\u%04x", static_cast<unsigned>(c));
      out += escaped;
    } else {
      out += c;
    }
  }
  return out + '"';
}

class Compiler {
 public:
  explicit Compiler(const Json& root)
      : root_(root), schemas_(root), character_(json_character()) {
    const Expr indent =
        builder_.characters(CodeSet::of(" \t"), Writing::plain, 0, 20);
    space_ = builder_.alt({builder_.empty(), builder_.text(" "),
                           builder_.seq({builder_.text("\n"), indent})});
    comma_ = builder_.seq({builder_.text(","), space_});
    colon_ = builder_.seq({builder_.text(":"), space_});
  }

  Automaton whole() {
    const Expr root = value({{&root_}});
    while (!pending_.empty()) {
      auto [rule, items] = std::move(pending_.back());
      pending_.pop_back();
      builder_.define(rule, body(schemas_.expanded(items)));
    }
    return builder_.build(root, "the schema");
  }

 private:
  // A value that all of these schemas allow. What it is made of is written later, so that schemas may
  // refer to each other.
  Expr value(Items items) {
    std::sort(items.begin(), items.end());
    items.erase(std::unique(items.begin(), items.end()), items.end());
    const auto [at, fresh] = rules_.emplace(items, 0);
    if (fresh) {
      at->second = builder_.rule("a schema that refers to itself");
      pending_.emplace_back(at->second, items);
    }
    return builder_.call(at->second);
  }

  Expr body(const Items& items) {
    for (const Item& item : items) {
      if (item.schema->is(Json::Kind::boolean)) return builder_.never();  // true was left out
      const Json *any = item.schema->find("anyOf"), *one = item.schema->find("oneOf");
      if (item.branched || (!any && !one)) continue;
      if (any && one) throw GrammarError("'anyOf' beside 'oneOf' is not supported");
      return branches(items, item, any ? *any : *one, one != nullptr);
    }
    Assertions assertions;
    for (const Item& item : items) assertions.add(*item.schema);
    if (assertions.values) return values(assertions);
    return types(assertions);
  }

  Expr branches(const Items& items, const Item& branched, const Json& list, bool one) {
    if (!list.is(Json::Kind::array)) throw GrammarError("'anyOf' must be a list of schemas");
    if ((branches_ += list.items.size()) > kMaxBranches)
      throw GrammarError("the schema has too many alternatives");
    if (one)
      for (size_t i = 0; i < list.items.size(); ++i)
        for (size_t j = 0; j < i; ++j)
          if (!schemas_.disjoint(list.items[i], list.items[j]))
            throw GrammarError(
                "'oneOf' with alternatives that may match at once is not supported; use 'anyOf'");
    std::vector<Expr> options;
    for (const Json& alternative : list.items) {
      Items chosen = items;
      std::find(chosen.begin(), chosen.end(), branched)->branched = true;
      for (const Item& reached : schemas_.expanded({{&alternative}}))
        if (std::find(chosen.begin(), chosen.end(), Item{reached.schema, true}) != chosen.end())
          throw GrammarError("a $ref leads to itself");
      chosen.push_back({&alternative});
      options.push_back(value(std::move(chosen)));
    }
    return builder_.alt(options);
  }

  Expr values(const Assertions& assertions) {
    std::vector<std::string> texts;
    std::vector<Expr> options;
    for (const Json* value : assertions.allowed_values()) {
      if (value->is(Json::Kind::object) || value->is(Json::Kind::array))
        options.push_back(written(*value));
      else
        texts.push_back(scalar(*value));
    }
    options.push_back(builder_.words(std::move(texts)));
    return builder_.alt(options);
  }

  static std::string scalar(const Json& value) {
    switch (value.kind) {
      case Json::Kind::null: return "null";
      case Json::Kind::boolean: return value.boolean ? "true" : "false";
      case Json::Kind::string: return json_text(value.string);
      default: return value.string;
    }
  }

  // This very value.
  Expr written(const Json& value) {
    const bool object = value.is(Json::Kind::object);
    if (!object && !value.is(Json::Kind::array)) return builder_.text(scalar(value));
    std::vector<Expr> parts{builder_.text(object ? "{" : "["), space_};
    for (const Json& item : value.items) {
      if (parts.size() > 2) parts.push_back(comma_);
      parts.push_back(written(item));
    }
    for (const auto& [name, field] : value.fields) {
      if (parts.size() > 2) parts.push_back(comma_);
      parts.insert(parts.end(), {builder_.text(json_text(name)), colon_, written(field)});
    }
    if (parts.size() > 2) parts.push_back(space_);
    parts.push_back(builder_.text(object ? "}" : "]"));
    return builder_.seq(parts);
  }

  Expr types(const Assertions& assertions) {
    const uint32_t types = assertions.types;
    std::vector<Expr> options;
    if (types & kNull) options.push_back(builder_.text("null"));
    if (types & kBoolean) options.push_back(builder_.words({"true", "false"}));
    if (types & kNumber)
      options.push_back(write_numbers(builder_, assertions.low, assertions.high));
    else if (types & kInteger)
      options.push_back(write_integers(builder_, assertions.low, assertions.high));
    if (types & kString) options.push_back(string(assertions));
    if (types & kArray) options.push_back(array(assertions));
    if (types & kObject) options.push_back(object(assertions));
    return builder_.alt(options);
  }

  Expr string(const Assertions& assertions) {
    const uint32_t min = assertions.min_length, max = assertions.max_length;
    std::vector<Pattern> patterns;
    for (const std::string& text : assertions.patterns)
      patterns.push_back(parse_regex(text, Dialect::search));
    for (const std::string& name : assertions.formats)
      patterns.push_back(parse_regex(format_expression(name), Dialect::whole));
    const Expr inside = patterns.empty()
                            ? builder_.characters(character_, min, max)
                            : write_common(builder_, patterns, min, max, Writing::json);
    return builder_.seq({builder_.text("\""), inside, builder_.text("\"")});
  }

  Expr array(const Assertions& assertions) {
    size_t prefix = 0;
    for (const auto& part : assertions.elements)
      if (part.prefix) prefix = std::max(prefix, part.prefix->items.size());
    const auto element = [&](size_t index) {
      Items items;
      for (const auto& part : assertions.elements) {
        if (part.prefix && index < part.prefix->items.size())
          items.push_back({&part.prefix->items[index]});
        else if (part.rest)
          items.push_back({part.rest});
      }
      return value(std::move(items));
    };
    const uint32_t min = assertions.min_items, max = assertions.max_items;
    if (prefix > kMaxNesting) throw GrammarError("'prefixItems' has too many schemas");
    // Behind `index` elements, from the last one back.
    const auto left = [](uint32_t bound, size_t index) {
      if (bound == kUnlimited) return bound;
      return bound > index ? bound - static_cast<uint32_t>(index) : 0;
    };
    const size_t fixed = std::max<size_t>(prefix, 1);
    const uint32_t fewest = left(min, fixed), most = left(max, fixed);
    Expr rest = fewest > most ? builder_.never()
                              : builder_.repeat(builder_.seq({comma_, element(fixed)}), fewest, most);
    rest = builder_.seq({rest, space_});
    for (size_t index = fixed; index-- > 0;) {
      const Expr one = index >= max ? builder_.never()
                                    : builder_.seq({index ? comma_ : builder_.empty(),
                                                    element(index), rest});
      const Expr none = index >= min ? (index ? space_ : builder_.empty()) : builder_.never();
      rest = builder_.alt({one, none});
    }
    return builder_.seq({builder_.text("["), space_, rest, builder_.text("]")});
  }

  // What the schemas say together of the member `name`; null: of members that none of them names.
  Expr member(const Assertions& assertions, const std::string* name) {
    Items items;
    for (const auto& part : assertions.members) {
      const Json* own = name && part.properties ? part.properties->find(*name) : nullptr;
      if (own)
        items.push_back({own});
      else if (part.additional)
        items.push_back({part.additional});
    }
    return value(std::move(items));
  }

  Expr object(const Assertions& assertions) {
    std::vector<std::string> names;
    const auto name_it = [&](const std::string& name) {
      if (known_.insert(name).second) names.push_back(name);
    };
    known_.clear();
    for (const auto& part : assertions.members)
      if (part.properties)
        for (const auto& field : part.properties->fields) name_it(field.first);
    for (const std::string& name : assertions.required) name_it(name);
    const auto closed = [](const auto& part) {
      return part.additional && part.additional->is(Json::Kind::boolean) && !part.additional->boolean;
    };
    const bool open = std::none_of(assertions.members.begin(), assertions.members.end(), closed);
    Expr more = builder_.never();
    if (open)
      more = builder_.seq({builder_.text("\""), other_than(names), builder_.text("\""), colon_,
                           member(assertions, nullptr)});
    // What follows where a member was written, and where none was, from the last one back.
    Expr after = builder_.seq({builder_.repeat(builder_.seq({comma_, more}), 0, kUnlimited), space_});
    Expr first = builder_.optional(builder_.seq({more, after}));
    size_t count = 0;
    for (auto name = names.rbegin(); name != names.rend(); ++name) {
      const bool required = std::find(assertions.required.begin(), assertions.required.end(),
                                      *name) != assertions.required.end();
      const Expr pair =
          builder_.seq({builder_.text(json_text(*name)), colon_, member(assertions, &*name)});
      const Expr with = builder_.seq({pair, after}), with_comma = builder_.seq({comma_, pair, after});
      first = required ? with : builder_.alt({with, first});
      after = required ? with_comma : builder_.alt({with_comma, after});
      if (++count % kMembersInARule == 0) {
        first = named(first);
        after = named(after);
      }
    }
    return builder_.seq({builder_.text("{"), space_, first, builder_.text("}")});
  }

  Expr named(Expr body) {
    const uint32_t rule = builder_.rule("members");
    builder_.define(rule, body);
    return builder_.call(rule);
  }

  // A name that is none of these, without escapes.
  Expr other_than(const std::vector<std::string>& names) {
    std::vector<std::vector<uint32_t>> codes;
    for (const std::string& name : names) {
      if (name.size() > 256) throw GrammarError("a member's name has more than 256 bytes");
      codes.emplace_back();
      for (size_t at = 0; at < name.size();) codes.back().push_back(next_utf8(name, at));
    }
    std::sort(codes.begin(), codes.end());
    return other_than(codes, 0, codes.size(), 0);
  }

  Expr other_than(const std::vector<std::vector<uint32_t>>& names, size_t first, size_t last,
                  size_t at) {
    static const CodeSet plain = [] {
      const CodeSet codes{{0x20, CodeSet::kLast}};
      return codes.without(CodeSet::of("\"\\"));
    }();
    CodeSet others = plain;
    std::vector<Expr> options;
    const bool is_name = first < last && names[first].size() == at;
    if (is_name) ++first;
    else options.push_back(builder_.empty());
    while (first < last) {
      const uint32_t code = names[first][at];
      size_t end = first;
      while (end < last && names[end][at] == code) ++end;
      CodeSet single;
      single.add(code, code);
      single = single.common(plain);
      others = others.without(single);
      if (!single.empty())
        options.push_back(builder_.seq({builder_.characters(single, Writing::plain),
                                        other_than(names, first, end, at + 1)}));
      first = end;
    }
    options.push_back(
        builder_.seq({builder_.characters(others, Writing::plain),
                      builder_.characters(plain, Writing::plain, 0, kUnlimited)}));
    return builder_.alt(options);
  }

  const Json& root_;
  Schemas schemas_;
  Builder builder_;
  const CharacterReader character_;
  Expr space_, comma_, colon_;
  std::map<Items, uint32_t> rules_;
  std::vector<std::pair<uint32_t, Items>> pending_;
  std::set<std::string> known_;
  size_t branches_ = 0;
};

}  // namespace

Automaton read_json_schema(std::string_view text) {
  if (text.size() > kMaxText) throw GrammarError("the schema is longer than a megabyte");
  const auto schema = parse_json(text, kMaxSchemaDepth);
  if (!schema)
    throw GrammarError("the schema is not one JSON value, names a member twice or nests deeper than " +
                       std::to_string(kMaxSchemaDepth));
  return read_json_schema(*schema);
}

Automaton read_json_schema(const Json& schema) { return Compiler(schema).whole(); }

}  // namespace pocketslm::grammar
