#include "megatron_7b/jsonl.h"

#include <algorithm>
#include <array>
#include <cstring>

#ifdef __SSE2__
#include <emmintrin.h>
#endif

namespace megatron_7b {

namespace {

constexpr std::size_t kStep = 16;
constexpr int kMaxDepth = 64;
// A number this short is one for every parser; a longer one might overflow.
constexpr std::ptrdiff_t kMaxNumberLength = 18;

bool is_plain(char c) { return static_cast<signed char>(c) >= 0x20 && c != '"' && c != '\\'; }

// Copies the plain ASCII that `from` begins with, and returns how much that is. May read up to `end`, and write up to
// kStep bytes more than it returns.
std::size_t copy_plain(const char* from, const char* end, char* to) {
  const char* position = from;
#ifdef __SSE2__
  const __m128i space = _mm_set1_epi8(0x20);
  const __m128i quote = _mm_set1_epi8('"');
  const __m128i backslash = _mm_set1_epi8('\\');
  while (end - position >= static_cast<std::ptrdiff_t>(kStep)) {
    const __m128i bytes = _mm_loadu_si128(reinterpret_cast<const __m128i*>(position));
    _mm_storeu_si128(reinterpret_cast<__m128i*>(to + (position - from)), bytes);
    // Signed: bytes from 0x80 on are below the space, as control characters are.
    const __m128i special = _mm_or_si128(_mm_cmplt_epi8(bytes, space),
                                         _mm_or_si128(_mm_cmpeq_epi8(bytes, quote), _mm_cmpeq_epi8(bytes, backslash)));
    const int mask = _mm_movemask_epi8(special);
    if (mask != 0) {
      return static_cast<std::size_t>(position - from) +
             static_cast<std::size_t>(__builtin_ctz(static_cast<unsigned>(mask)));
    }
    position += kStep;
  }
#endif
  while (position < end && is_plain(*position)) {
    to[position - from] = *position;
    ++position;
  }
  return static_cast<std::size_t>(position - from);
}

// Length of the valid UTF-8 sequence of more than one byte at `from`, or 0.
std::size_t multibyte_length(const char* from, const char* end) {
  const auto byte = [&](std::ptrdiff_t i) { return static_cast<std::uint8_t>(from[i]); };
  const auto continues = [&](std::ptrdiff_t i, unsigned low = 0x80, unsigned high = 0xBF) {
    return i < end - from && byte(i) >= low && byte(i) <= high;
  };
  const unsigned first = byte(0);
  if (first >= 0xC2 && first <= 0xDF) {
    return continues(1) ? 2 : 0;
  }
  if (first >= 0xE0 && first <= 0xEF) {
    const bool second = continues(1, first == 0xE0 ? 0xA0U : 0x80U, first == 0xED ? 0x9FU : 0xBFU);
    return second && continues(2) ? 3 : 0;
  }
  if (first >= 0xF0 && first <= 0xF4) {
    const bool second = continues(1, first == 0xF0 ? 0x90U : 0x80U, first == 0xF4 ? 0x8FU : 0xBFU);
    return second && continues(2) && continues(3) ? 4 : 0;
  }
  return 0;
}

std::size_t encode_utf8(unsigned point, char* to) {
  if (point < 0x80) {
    to[0] = static_cast<char>(point);
    return 1;
  }
  if (point < 0x800) {
    to[0] = static_cast<char>(0xC0 | (point >> 6));
    to[1] = static_cast<char>(0x80 | (point & 0x3F));
    return 2;
  }
  if (point < 0x10000) {
    to[0] = static_cast<char>(0xE0 | (point >> 12));
    to[1] = static_cast<char>(0x80 | ((point >> 6) & 0x3F));
    to[2] = static_cast<char>(0x80 | (point & 0x3F));
    return 3;
  }
  to[0] = static_cast<char>(0xF0 | (point >> 18));
  to[1] = static_cast<char>(0x80 | ((point >> 12) & 0x3F));
  to[2] = static_cast<char>(0x80 | ((point >> 6) & 0x3F));
  to[3] = static_cast<char>(0x80 | (point & 0x3F));
  return 4;
}

// One line. Every function returns false where it is not certain, and then the line is a doubt.
class LineScanner {
 public:
  LineScanner(const std::vector<std::string>& keys, char* decoded, std::size_t used, JsonlBlock::Text* texts)
      : keys_(keys), decoded_(decoded), used_(used), texts_(texts), found_(keys.size(), false) {}

  bool scan(const char* begin, const char* end) {
    at_ = begin;
    end_ = end;
    skip_blanks();
    if (!take('{')) {
      return false;
    }
    skip_blanks();
    std::size_t missing = keys_.size();
    do {
      skip_blanks();
      std::string_view name;
      if (!scan_name(name)) {
        return false;
      }
      const auto key = static_cast<std::size_t>(std::find(keys_.begin(), keys_.end(), name) - keys_.begin());
      if (key == keys_.size()) {
        if (!skip_value(0)) {
          return false;
        }
      } else {
        if (found_[key] || !decode_text(texts_[key])) {
          return false;
        }
        found_[key] = true;
        --missing;
      }
      skip_blanks();
    } while (take(','));
    if (!take('}')) {
      return false;
    }
    skip_blanks();
    return at_ == end_ && missing == 0;
  }

  std::size_t used() const { return used_; }

 private:
  void skip_blanks() {
    while (at_ < end_ && (*at_ == ' ' || *at_ == '\t' || *at_ == '\r')) {
      ++at_;
    }
  }

  bool take(char c) {
    if (at_ < end_ && *at_ == c) {
      ++at_;
      return true;
    }
    return false;
  }

  // "name" and the colon after it, with blanks; only names of plain ASCII.
  bool scan_name(std::string_view& name) {
    if (!take('"')) {
      return false;
    }
    const char* begin = at_;
    while (at_ < end_ && is_plain(*at_)) {
      ++at_;
    }
    name = std::string_view(begin, static_cast<std::size_t>(at_ - begin));
    if (!take('"')) {
      return false;
    }
    skip_blanks();
    if (!take(':')) {
      return false;
    }
    skip_blanks();
    return true;
  }

  bool decode_text(JsonlBlock::Text& text) {
    text = {used_, 0, true};
    std::size_t size = 0;
    if (!decode_string(decoded_ + used_, size, text.is_ascii)) {
      return false;
    }
    text.size = size;
    used_ += size;
    return true;
  }

  // A string to UTF-8. Never longer than what it is decoded from.
  bool decode_string(char* to, std::size_t& size, bool& is_ascii) {
    if (!take('"')) {
      return false;
    }
    char* const start = to;
    while (true) {
      const std::size_t plain = copy_plain(at_, end_, to);
      at_ += plain;
      to += plain;
      if (at_ == end_) {
        return false;
      }
      if (*at_ == '"') {
        ++at_;
        size = static_cast<std::size_t>(to - start);
        return true;
      }
      if (*at_ == '\\') {
        if (!decode_escape(to, is_ascii)) {
          return false;
        }
        continue;
      }
      // Text in other scripts: many such characters in a row.
      std::size_t length = 0;
      while (at_ < end_ && static_cast<signed char>(*at_) < 0 && (length = multibyte_length(at_, end_)) != 0) {
        std::memcpy(to, at_, length);
        to += length;
        at_ += length;
        is_ascii = false;
      }
      if (length == 0) {
        return false;  // a control character, or not UTF-8
      }
    }
  }

  bool decode_escape(char*& to, bool& is_ascii) {
    if (end_ - at_ < 2) {
      return false;
    }
    const char kind = at_[1];
    at_ += 2;
    constexpr std::string_view kNames = "\"\\/bfnrt";
    constexpr std::string_view kMeanings = "\"\\/\b\f\n\r\t";
    if (const std::size_t index = kNames.find(kind); index != std::string_view::npos) {
      *to++ = kMeanings[index];
      return true;
    }
    unsigned point = 0;
    if (kind != 'u' || !scan_hex(point)) {
      return false;
    }
    if (point >= 0xD800 && point < 0xE000) {
      unsigned low = 0;
      if (point >= 0xDC00 || !take('\\') || !take('u') || !scan_hex(low) || low < 0xDC00 || low > 0xDFFF) {
        return false;
      }
      point = 0x10000 + ((point - 0xD800) << 10) + (low - 0xDC00);
    }
    is_ascii = is_ascii && point < 0x80;
    to += encode_utf8(point, to);
    return true;
  }

  bool scan_hex(unsigned& value) {
    if (end_ - at_ < 4) {
      return false;
    }
    value = 0;
    for (int i = 0; i < 4; ++i, ++at_) {
      const char c = *at_;
      const int digit = c >= '0' && c <= '9'   ? c - '0'
                        : c >= 'a' && c <= 'f' ? c - 'a' + 10
                        : c >= 'A' && c <= 'F' ? c - 'A' + 10
                                               : -1;
      if (digit < 0) {
        return false;
      }
      value = value * 16 + static_cast<unsigned>(digit);
    }
    return true;
  }

  bool skip_value(int depth) {
    if (at_ == end_ || depth > kMaxDepth) {
      return false;
    }
    switch (*at_) {
      case '"': {
        // Decoded after the texts, where the next one will overwrite it.
        std::size_t size = 0;
        bool is_ascii = true;
        return decode_string(decoded_ + used_, size, is_ascii);
      }
      case '{':
        ++at_;
        return skip_members('}', depth, true);
      case '[':
        ++at_;
        return skip_members(']', depth, false);
      case 't':
        return skip_word("true");
      case 'f':
        return skip_word("false");
      case 'n':
        return skip_word("null");
      default:
        return skip_number();
    }
  }

  bool skip_members(char closing, int depth, bool named) {
    skip_blanks();
    if (take(closing)) {
      return true;
    }
    do {
      skip_blanks();
      std::string_view name;
      if ((named && !scan_name(name)) || !skip_value(depth + 1)) {
        return false;
      }
      skip_blanks();
    } while (take(','));
    return take(closing);
  }

  bool skip_word(std::string_view word) {
    if (static_cast<std::size_t>(end_ - at_) < word.size() || std::memcmp(at_, word.data(), word.size()) != 0) {
      return false;
    }
    at_ += word.size();
    return true;
  }

  bool skip_digits() {
    const char* begin = at_;
    while (at_ < end_ && *at_ >= '0' && *at_ <= '9') {
      ++at_;
    }
    return at_ > begin;
  }

  bool skip_number() {
    const char* begin = at_;
    take('-');
    if (take('0')) {
      if (at_ < end_ && *at_ >= '0' && *at_ <= '9') {
        return false;
      }
    } else if (!skip_digits()) {
      return false;
    }
    if (take('.') && !skip_digits()) {
      return false;
    }
    return at_ - begin <= kMaxNumberLength;  // an exponent is left over, and with it the line a doubt
  }

  const std::vector<std::string>& keys_;
  char* decoded_;
  std::size_t used_;
  JsonlBlock::Text* texts_;
  std::vector<bool> found_;
  const char* at_ = nullptr;
  const char* end_ = nullptr;
};

bool is_blank(const char* begin, const char* end) {
  return std::all_of(begin, end, [](char c) { return c == ' ' || c == '\t' || c == '\r'; });
}

}  // namespace

JsonlBlock scan_jsonl(std::string_view data, const std::vector<std::string>& keys) {
  JsonlBlock block;
  block.decoded.resize(data.size() + kStep);
  std::vector<JsonlBlock::Text> texts(keys.size());
  std::size_t used = 0;
  std::int64_t line = 0;
  const char* const end = data.data() + data.size();
  for (const char* begin = data.data(); begin < end; ++line) {
    const void* found = std::memchr(begin, '\n', static_cast<std::size_t>(end - begin));
    const char* line_end = found == nullptr ? end : static_cast<const char*>(found);
    LineScanner scanner(keys, block.decoded.data(), used, texts.data());
    if (scanner.scan(begin, line_end)) {
      used = scanner.used();
      block.lines.push_back(line);
      block.texts.insert(block.texts.end(), texts.begin(), texts.end());
    } else if (!is_blank(begin, line_end)) {
      block.doubts.push_back({static_cast<std::int64_t>(block.lines.size()), line,
                              static_cast<std::size_t>(begin - data.data()),
                              static_cast<std::size_t>(line_end - begin)});
    }
    begin = line_end + 1;
  }
  return block;
}

}  // namespace megatron_7b
