#include "grammar/formats.h"

#include "grammar/error.h"

namespace pocketslm::grammar {
namespace {

// A day of RFC 3339: 29 February in leap years only.
std::string date() {
  const std::string year = "(\\d\\d\\d[1-9]|\\d\\d[1-9]\\d|\\d[1-9]\\d\\d|[1-9]\\d\\d\\d)";
  const std::string leap =
      "(\\d\\d(0[48]|[2468][048]|[13579][26])|(0[48]|[2468][048]|[13579][26])00)";
  return "(" + year +
         "-((0[13578]|1[02])-(0[1-9]|[12]\\d|3[01])|(0[469]|11)-(0[1-9]|[12]\\d|30)|"
         "02-(0[1-9]|1\\d|2[0-8]))|" +
         leap + "-02-29)";
}

// With the offset from UTC that RFC 3339 asks for.
std::string time() {
  return "([01]\\d|2[0-3]):[0-5]\\d:[0-5]\\d(\\.\\d{1,6})?(Z|[+-]([01]\\d|2[0-3]):[0-5]\\d)";
}

}  // namespace

std::string format_expression(const std::string& name) {
  if (name == "date") return date();
  if (name == "time") return time();
  if (name == "date-time") return date() + "T" + time();
  if (name == "email") {
    const std::string label = "[A-Za-z0-9]([A-Za-z0-9-]{0,30}[A-Za-z0-9])?";
    const std::string atom = "[A-Za-z0-9_+-]{1,20}";
    return atom + "(\\." + atom + "){0,2}@(" + label + "\\.){1,3}[A-Za-z]{2,10}";
  }
  if (name == "uuid") return "[0-9a-fA-F]{8}(-[0-9a-fA-F]{4}){3}-[0-9a-fA-F]{12}";
  if (name == "ipv4") {
    const std::string byte = "(25[0-5]|2[0-4]\\d|1\\d\\d|[1-9]?\\d)";
    return byte + "(\\." + byte + "){3}";
  }
  throw GrammarError("the format '" + name.substr(0, 60) +
                     "' is not supported; known: date, time, date-time, email, uuid, ipv4");
}

}  // namespace pocketslm::grammar
