#include "chat.h"

#include <algorithm>
#include <ctime>
#include <utility>

#include "platform.h"
#include "unicode.h"

namespace pocketslm {
namespace {

// A date stands in the text as its strftime format between these.
constexpr char kDateStart = '\x01', kDateEnd = '\x02';

// White space as Python's str.strip() has it, which is what Jinja's trim is.
bool is_space(uint32_t code) {
  return char_class(code) == CharClass::space || (code >= 0x1c && code <= 0x1f);
}

std::string_view trimmed(std::string_view text, bool left, bool right) {
  size_t first = text.size(), last = 0;
  for (size_t at = 0; at < text.size();) {
    const size_t start = at;
    if (is_space(next_utf8(text, at))) continue;
    first = std::min(first, start);
    last = at;
  }
  const size_t start = left ? first : 0;
  const size_t end = right ? std::max(last, start) : text.size();
  return text.substr(start, end - start);
}

// The text with today's date in the place of each format.
std::string dated(const std::string& text) {
  std::string out;
  const std::tm local = platform::local_time(std::time(nullptr));
  for (size_t at = 0; at < text.size();) {
    const size_t start = text.find(kDateStart, at), end = text.find(kDateEnd, start);
    if (start == std::string::npos || end == std::string::npos) return out + text.substr(at);
    const std::string form = text.substr(start + 1, end - start - 1);
    char date[256];
    out.append(text, at, start - at);
    out.append(date, std::strftime(date, sizeof date, form.c_str(), &local));
    at = end + 1;
  }
  return out;
}

bool names(const Json* list, const char* name) {
  return list && std::any_of(list->items.begin(), list->items.end(),
                             [&](const Json& item) { return item.string == name; });
}

}  // namespace

std::string Chat::read(const Json& section, uint32_t vocabulary) {
  const std::pair<const char*, Lead*> leads[] = {
      {"start_system", &start_system_},           {"system_to_user", &system_to_user_},
      {"start_user", &start_user_},               {"user_to_assistant", &user_to_assistant_},
      {"assistant_to_user", &assistant_to_user_},
  };
  const Json *left = section.find("trim_left"), *right = section.find("trim_right");
  const bool has_leads = section.find("start_user");  // without, it only says what ends an answer
  for (const auto& [name, lead] : leads) {
    if (!has_leads) break;
    const Json* text = section.find(name);
    if (!text && (lead == &start_system_ || lead == &system_to_user_)) continue;
    if (!text || !text->is(Json::Kind::string)) return "the chat section lacks " + std::string(name);
    *lead = {text->string, true, names(left, name), names(right, name)};
  }
  if (const Json* eos = section.find("eos"))
    for (const Json& id : eos->items) {
      if (!(id.number >= 0 && id.number < vocabulary))
        return "the chat section names an unknown token";
      eos_.push_back(static_cast<int32_t>(id.number));
    }
  return "";
}

const Chat::Lead* Chat::lead(const std::string& previous, const std::string& role) const {
  if (previous.empty() && role == "system") return &start_system_;
  if (previous.empty() && role == "user") return &start_user_;
  if (previous == "system" && role == "user") return &system_to_user_;
  if (previous == "user" && role == "assistant") return &user_to_assistant_;
  if (previous == "assistant" && role == "user") return &assistant_to_user_;
  return nullptr;
}

std::string Chat::compose(const std::vector<Message>& messages, std::vector<TextPart>& parts,
                          std::list<std::string>& written) const {
  const auto write = [&](const std::string& text) {
    written.push_back(dated(text));
    parts.push_back({written.back(), true});
  };
  std::string previous;
  for (const Message& message : messages) {
    const Lead* before = lead(previous, message.role);
    if (!before)
      return "messages must be an optional system message, then user and assistant in turn; got '" +
             message.role + "' after '" + previous + "'";
    if (!before->known) return "the model's chat template takes no system message";
    write(before->text);
    parts.push_back({trimmed(message.content, before->trims_left, before->trims_right), false});
    previous = message.role;
  }
  if (previous != "user") return "the last message must be the user's";
  write(user_to_assistant_.text);
  return "";
}

}  // namespace pocketslm
