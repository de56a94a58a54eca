#include <random>
#include <stdexcept>

#include "check.h"
#include "megatron_7b/error.h"
#include "megatron_7b/framing.h"
#include "megatron_7b/jsonl.h"

using namespace megatron_7b;

namespace {

std::string text_of(const JsonlBlock& block, std::size_t index) {
  const auto& text = block.texts[index];
  return {block.decoded.data() + text.begin, text.size};
}

// On the heap and to the byte, so that the sanitizer sees every read behind the end.
JsonlBlock scan(const std::string& data, const std::vector<std::string>& keys) {
  const std::vector<char> exact(data.begin(), data.end());
  return scan_jsonl({exact.data(), exact.size()}, keys);
}

}  // namespace

TEST(plain_records_are_decoded) {
  const auto block = scan(
      "{\"id\": [1, {\"a\": -2.5}], \"text\": \"a\\n\\u00e9\\ud83d\\ude00 \xe4\xb8\x80\"}\n\n "
      "\r\nno\n{\"text\":\"b\",\"id\":\"\"}",
      {"text"});
  CHECK(block.lines == (std::vector<std::int64_t>{0, 4}));
  CHECK(text_of(block, 0) == "a\n\xc3\xa9\xf0\x9f\x98\x80 \xe4\xb8\x80" && !block.texts[0].is_ascii);
  CHECK(text_of(block, 1) == "b" && block.texts[1].is_ascii);
  CHECK(block.doubts.size() == 1 && block.doubts[0].before == 1 && block.doubts[0].line == 3 &&
        block.doubts[0].size == 2);
}

TEST(any_bytes_are_scanned) {
  std::mt19937 random(7);
  const std::string record =
      "{\"text\": \"some \\u00e9 \\ud83d\\ude00 words, \xe4\xb8\x80, and more than sixteen\", \"b\": [null, 1]}";
  for (int round = 0; round < 20000; ++round) {
    std::string data = record + "\n" + record;
    for (int change = 0; change < 3; ++change) {
      data[random() % data.size()] = static_cast<char>(random());
    }
    data.resize(random() % (data.size() + 1));
    const auto block = scan(data, {"text", "b"});
    CHECK(block.texts.size() == 2 * block.lines.size());
    for (const auto& text : block.texts) {
      CHECK(text.begin + text.size <= data.size());
    }
    for (const auto& doubt : block.doubts) {
      CHECK(doubt.begin + doubt.size <= data.size());
    }
  }
}

TEST(documents_are_framed) {
  const std::vector<std::uint32_t> ids{5, 6, 7};
  const std::vector<std::int64_t> lengths{2, 0, 1};
  std::vector<std::int64_t> framed_lengths(3);
  const Frame frame{1, 2};
  CHECK(frame_lengths(lengths.data(), 3, 3, frame, framed_lengths.data()) == 7);
  std::vector<std::uint16_t> framed(7);
  frame_documents(ids.data(), lengths.data(), 3, frame, framed.data());
  CHECK(framed == (std::vector<std::uint16_t>{1, 5, 6, 2, 1, 7, 2}));
  CHECK_THROWS(std::invalid_argument, frame_lengths(lengths.data(), 3, 4, frame, framed_lengths.data()));
  const std::vector<std::uint32_t> wide{70000};
  CHECK_THROWS(FormatError, frame_documents(wide.data(), &lengths[2], 1, Frame{}, framed.data()));
}
