// A context-free grammar over bytes, and the automaton with a stack that it becomes. JSON schemas,
// regular expressions and GBNF are all written as one.
#pragma once

#include <cstdint>
#include <map>
#include <string>
#include <string_view>
#include <vector>

#include "grammar/characters.h"
#include "grammar/error.h"

namespace pocketslm::grammar {

constexpr uint32_t kUnlimited = ~0u;
// What a grammar may cost, whoever wrote it.
constexpr size_t kMaxText = 1 << 20;       // bytes of its source
constexpr size_t kMaxNodes = 1 << 18;      // expressions and states
constexpr size_t kMaxNesting = 200;        // of groups in a source
constexpr size_t kMaxExprDepth = 1500;     // of expressions in each other
constexpr size_t kMaxDepth = 256;          // rules within each other while a text is read
constexpr uint32_t kMaxRepeats = 1 << 20;  // the largest bound of a repetition

// What a state of the automaton does; `next` is where it goes on.
struct State {
  enum class Kind : uint8_t {
    bytes,       // reads one byte of a set
    characters,  // reads min to max characters of a class
    split,       // goes on at any of `count` targets
    call,        // reads what starts at state `index`, then goes on
    loop,        // reads that min to max times
    end          // of what was called
  };
  Kind kind = Kind::end;
  uint32_t index = 0;  // of the set, the class, the first target or the called state
  uint32_t count = 0;  // of a split
  uint32_t next = 0, min = 0, max = 0;
};

// Immutable once built, so that any number of threads may read it.
struct Automaton {
  std::vector<State> states;
  std::vector<ByteSet> sets;
  std::vector<CharacterReader> classes;
  std::vector<uint32_t> targets;
  uint32_t start = 0;
  // Bytes that no set or class tells apart are one symbol.
  uint8_t symbol_of[256] = {};
  uint32_t symbols = 0;
};

using Expr = uint32_t;

class Builder {
 public:
  Builder();

  Expr never() const { return 0; }
  Expr empty() const { return 1; }
  Expr bytes(const ByteSet& set);
  Expr text(std::string_view text);
  // `min` to `max` characters; max may be kUnlimited.
  Expr characters(const CharacterReader& reader, uint32_t min, uint32_t max);
  Expr characters(const CodeSet& set, Writing writing, uint32_t min = 1, uint32_t max = 1);
  Expr seq(const std::vector<Expr>& parts);
  Expr alt(std::vector<Expr> options);
  Expr optional(Expr part) { return alt({part, empty()}); }
  Expr repeat(Expr part, uint32_t min, uint32_t max);
  // Any of these texts, as a tree of what they share.
  Expr words(std::vector<std::string> texts);

  uint32_t rule(std::string name);  // its expression comes later
  void define(uint32_t rule, Expr body);
  Expr call(uint32_t rule);

  // Throws GrammarError where `root` matches nothing, or a rule begins with itself.
  Automaton build(Expr root, const std::string& what);

 private:
  enum class Kind : uint8_t { never, empty, bytes, characters, seq, alt, repeat, call };
  struct Node {
    Kind kind;
    uint32_t index = 0, count = 0;  // children, or a set, a class, a rule, the repeated one
    uint32_t min = 0, max = 0;
    uint32_t depth = 0, size = 1;
  };
  struct Rule {
    std::string name;
    Expr body = 0;
    bool defined = false;
  };

  Expr add(Node node);
  Expr with_children(Kind kind, const std::vector<Expr>& parts);
  Expr words(const std::vector<std::string>& texts, size_t first, size_t last, size_t at,
             size_t depth);
  uint32_t class_of(const CharacterReader& reader);
  void analyse();
  bool productive(const Node& node) const;
  bool nullable(const Node& node) const;
  void refuse_left_recursion() const;
  std::vector<uint32_t> first_rules(Expr body) const;

  uint32_t compile(Expr expr, uint32_t next);
  uint32_t compile_repeat(const Node& node, uint32_t next);
  uint32_t push(State state);
  uint32_t split(const std::vector<uint32_t>& targets);
  uint32_t entry(Expr body);
  void find_symbols();

  std::vector<Node> nodes_;
  std::vector<Expr> children_;
  std::vector<Rule> rules_;
  std::vector<bool> productive_, nullable_;  // of each node, once analysed
  std::vector<ByteSet> sets_;
  std::vector<CharacterReader> classes_;
  std::map<std::string, uint32_t> set_index_;
  std::map<std::vector<std::array<uint8_t, 256>>, uint32_t> class_index_;
  std::map<std::pair<CodeSet, Writing>, uint32_t> code_index_;
  Automaton out_;
  std::map<std::pair<Expr, uint32_t>, uint32_t> compiled_;
  std::map<Expr, uint32_t> entries_;
  std::vector<std::pair<uint32_t, Expr>> pending_;  // states to be, and what starts there
};

}  // namespace pocketslm::grammar
