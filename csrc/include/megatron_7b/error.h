// What a user can fix, as opposed to our bugs: becomes megatron_7b.errors.DataFormatError in Python.
#pragma once

#include <stdexcept>
#include <string>
#include <utility>

namespace megatron_7b {

class FormatError : public std::runtime_error {
 public:
  explicit FormatError(const std::string& message, std::string hint = "")
      : std::runtime_error(message), hint_(std::move(hint)) {}
  const std::string& hint() const { return hint_; }

 private:
  std::string hint_;
};

}  // namespace megatron_7b
