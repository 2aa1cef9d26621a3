// The chat template of a model whose conversations alternate, taken apart by export.
#pragma once

#include <cstdint>
#include <list>
#include <string>
#include <vector>

#include "json.h"
#include "tokenizer.h"

namespace pocketslm {

struct Message {
  std::string role, content;
};

class Chat {
 public:
  // Empty, or what is wrong with the section, which export/lower/native_chat.py wrote.
  std::string read(const Json& section, uint32_t vocabulary);
  bool loaded() const { return start_user_.known; }
  const std::vector<int32_t>& eos() const { return eos_; }

  // Empty, or why the conversation does not fit. The parts refer to `messages` and to `written`,
  // where the template's own text goes with today's date in it.
  std::string compose(const std::vector<Message>& messages, std::vector<TextPart>& parts,
                      std::list<std::string>& written) const;

 private:
  // What the template writes before a message, and which white space of the message it drops.
  struct Lead {
    std::string text;
    bool known = false, trims_left = false, trims_right = false;
  };
  const Lead* lead(const std::string& previous, const std::string& role) const;

  Lead start_system_, system_to_user_, start_user_, user_to_assistant_, assistant_to_user_;
  std::vector<int32_t> eos_;
};

}  // namespace pocketslm
