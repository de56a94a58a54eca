// libFuzzer target: whatever the bytes, the scanner of JSON lines stays inside of them and gives valid UTF-8.
//
// Input: one byte of flags (from 128 on two keys are asked for), then the lines; the inputs of tests/fuzz/jsonl_corpus.
// What the scanner reads is compared with the standard library's reader by tests/fuzz/fuzz_jsonl.py.
#include <algorithm>
#include <cstdlib>
#include <memory>
#include <string>
#include <string_view>
#include <vector>

#include "megatron_7b/jsonl.h"
#include "replay.h"

using namespace megatron_7b;

namespace {

void require(bool condition) {
  if (!condition) {
    std::abort();
  }
}

// Bytes of the character at `text`, 0 where it is none that may stand in a text.
std::size_t character_bytes(const unsigned char* text, std::size_t left) {
  const std::size_t bytes = text[0] < 0x80   ? 1
                            : text[0] < 0xC2 ? 0
                            : text[0] < 0xE0 ? 2
                            : text[0] < 0xF0 ? 3
                            : text[0] < 0xF5 ? 4
                                             : 0;
  if (bytes == 0 || bytes > left) {
    return 0;
  }
  for (std::size_t i = 1; i < bytes; ++i) {
    if ((text[i] & 0xC0) != 0x80) {
      return 0;
    }
  }
  const bool overlong = (text[0] == 0xE0 && text[1] < 0xA0) || (text[0] == 0xF0 && text[1] < 0x90);
  const bool surrogate = text[0] == 0xED && text[1] >= 0xA0;
  const bool beyond = text[0] == 0xF4 && text[1] >= 0x90;
  return overlong || surrogate || beyond ? 0 : bytes;
}

void check_text(const JsonlBlock& block, const JsonlBlock::Text& text) {
  require(text.begin <= block.decoded.size() && text.size <= block.decoded.size() - text.begin);
  const auto* bytes = reinterpret_cast<const unsigned char*>(block.decoded.data()) + text.begin;
  bool ascii = true;
  for (std::size_t at = 0; at < text.size;) {
    const std::size_t length = character_bytes(bytes + at, text.size - at);
    require(length > 0);
    ascii = ascii && length == 1;
    at += length;
  }
  require(ascii == text.is_ascii);
}

}  // namespace

extern "C" int LLVMFuzzerTestOneInput(const std::uint8_t* data, std::size_t size) {
  if (size == 0) {
    return 0;
  }
  // A block of its own, so that reading one byte beyond it is noticed.
  const std::unique_ptr<char[]> lines(new char[size - 1]);
  std::copy(data + 1, data + size, lines.get());
  const std::vector<std::string> keys =
      data[0] >= 128 ? std::vector<std::string>{"text", "b"} : std::vector<std::string>{"text"};
  const JsonlBlock block = scan_jsonl(std::string_view(lines.get(), size - 1), keys);
  require(block.texts.size() == block.lines.size() * keys.size());
  for (const auto& text : block.texts) {
    check_text(block, text);
  }
  std::int64_t line = -1;
  for (const std::int64_t record : block.lines) {
    require(record > line);
    line = record;
  }
  line = -1;
  for (const auto& doubt : block.doubts) {
    require(doubt.begin <= size - 1 && doubt.size <= size - 1 - doubt.begin && doubt.line > line);
    require(0 <= doubt.before && doubt.before <= static_cast<std::int64_t>(block.lines.size()));
    line = doubt.line;
  }
  return 0;
}
