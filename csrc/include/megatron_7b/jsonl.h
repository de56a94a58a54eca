// JSON lines, for a few keys that hold strings. What is plainly well formed is decoded here, at several times the speed
// of a general parser; whatever is not, or not plainly, is left to one: this scanner never says what is wrong with a
// line.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>
#include <string_view>
#include <vector>

namespace megatron_7b {

struct JsonlBlock {
  struct Text {
    std::size_t begin;
    std::size_t size;
    bool is_ascii;
  };
  // A line that the scanner leaves to a general parser.
  struct Doubt {
    // How many records before it are certain.
    std::int64_t before;
    std::int64_t line;
    std::size_t begin;
    std::size_t size;
  };

  // UTF-8 of all texts, decoded; valid, without surrogates.
  std::vector<char> decoded;
  // Of record i, key k: texts[i * number of keys + k].
  std::vector<Text> texts;
  // The line that each record is, from 0.
  std::vector<std::int64_t> lines;
  std::vector<Doubt> doubts;
};

// Lines that are blank are neither records nor doubts.
JsonlBlock scan_jsonl(std::string_view data, const std::vector<std::string>& keys);

}  // namespace megatron_7b
