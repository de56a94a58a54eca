#include "megatron_7b/corpus.h"

#include <algorithm>
#include <limits>

#include "megatron_7b/error.h"

namespace megatron_7b {

namespace {

const char* const kWrite = "write it again; an interrupted copy is the usual cause";

[[noreturn]] void fail(const std::string& path, const std::string& problem, const std::string& hint = kWrite) {
  throw FormatError(path + ": " + problem, hint);
}

template <typename T>
std::pair<std::int64_t, std::int64_t> range_of(const std::uint8_t* data, std::int64_t count) {
  const T* ids = reinterpret_cast<const T*>(data);  // The map begins on a page.
  T low = std::numeric_limits<T>::max();
  T high = std::numeric_limits<T>::min();
  for (std::int64_t i = 0; i < count; ++i) {
    low = std::min(low, ids[i]);
    high = std::max(high, ids[i]);
  }
  return {static_cast<std::int64_t>(low), static_cast<std::int64_t>(high)};
}

}  // namespace

Corpus::Corpus(const std::string& prefix, bool verify_all)
    : prefix_(prefix), idx_(idx_path(prefix)), bin_(bin_path(prefix)) {
  read_header();
  check_entries(verify_all);
  check_ends();
}

void Corpus::read_header() {
  const std::string& path = idx_.path();
  if (idx_.size() < 9 || std::memcmp(idx_.data(), kMagic, 9) != 0) {
    fail(path, "is not an MMIDIDX index (its first nine bytes are not the format's mark)",
         "give the prefix of a .bin/.idx pair that `megatron-7b preprocess` or Megatron wrote");
  }
  if (idx_.size() < kHeaderBytes) {
    fail(path, "is " + std::to_string(idx_.size()) + " bytes long, shorter than its header");
  }
  const auto version = load_unaligned<std::uint64_t>(idx_.data() + 9);
  if (version != kVersion) {
    fail(path, "has format version " + std::to_string(version) + ", expected 1", "");
  }
  const std::uint8_t code = idx_.data()[17];
  token_bytes_ = megatron_7b::token_bytes(code);
  if (token_bytes_ == 0) {
    fail(path, "has dtype code " + std::to_string(code) + ", which is no integer type", "token ids are integers");
  }
  type_ = static_cast<TokenType>(code);
  const auto sequences = load_unaligned<std::uint64_t>(idx_.data() + 18);
  const auto bounds = load_unaligned<std::uint64_t>(idx_.data() + 26);
  // Counts beyond the file's own size are nonsense, and would overflow what follows.
  const auto limit = static_cast<std::uint64_t>(idx_.size());
  const std::uint64_t expected = sequences > limit || bounds > limit ? 0 : kHeaderBytes + sequences * 12 + bounds * 8;
  if (expected != limit && expected + sequences != limit) {  // Multimodal files end with one more byte per sequence.
    fail(path, "is " + std::to_string(limit) + " bytes long, which does not fit its " + std::to_string(sequences) +
                   " sequences and " + std::to_string(bounds) + " document bounds");
  }
  if (bounds == 0) {
    fail(path, "has no document bounds");
  }
  num_sequences_ = static_cast<std::int64_t>(sequences);
  num_bounds_ = static_cast<std::int64_t>(bounds);
  lengths_ = idx_.data() + kHeaderBytes;
  pointers_ = lengths_ + num_sequences_ * 4;
  bounds_ = pointers_ + num_sequences_ * 8;
}

void Corpus::check_sequence(std::int64_t sequence) {
  const std::int64_t tokens = length(sequence);
  const std::int64_t begin = pointer(sequence);
  const auto where = [&] { return "sequence " + std::to_string(sequence) + " "; };
  if (tokens < 0) {
    fail(idx_.path(), where() + "has length " + std::to_string(tokens));
  }
  if (begin < 0 || begin % token_bytes_ != 0) {
    fail(idx_.path(), where() + "begins at byte " + std::to_string(begin) + ", inside a token");
  }
  if (begin > bin_.size() || tokens > (bin_.size() - begin) / token_bytes_) {
    fail(bin_.path(), "is " + std::to_string(bin_.size()) + " bytes long, but " + where() + "has " +
                          std::to_string(tokens) + " tokens from byte " + std::to_string(begin) + " on");
  }
  // Unsigned: the entry before may not have been checked, and hold anything.
  const auto end_before = [&](std::int64_t before) {
    return static_cast<std::uint64_t>(pointer(before)) + static_cast<std::uint64_t>(length(before) * token_bytes_);
  };
  contiguous_ = contiguous_ && static_cast<std::uint64_t>(begin) == (sequence == 0 ? 0 : end_before(sequence - 1));
}

void Corpus::check_document(std::int64_t document) const {
  const std::int64_t begin = bound(document);
  const std::int64_t end = bound(document + 1);
  if (begin < 0 || end < begin || end > num_sequences_) {
    fail(idx_.path(), "document " + std::to_string(document) + " has the sequences from " + std::to_string(begin) +
                          " to " + std::to_string(end) + ", of " + std::to_string(num_sequences_));
  }
}

void Corpus::check_entries(bool verify_all) {
  const auto stride_of = [&](std::int64_t count) {
    return verify_all || count <= kFullyChecked ? 1 : (count + kSpotChecks - 1) / kSpotChecks;
  };
  const auto check = [&](std::int64_t count, const auto& check_one) {
    for (std::int64_t i = 0; i < count; i += stride_of(count)) {
      check_one(i);
    }
    if (count > 0) {
      check_one(count - 1);
    }
  };
  const bool scattered = stride_of(num_sequences_) > 1 || stride_of(num_documents()) > 1;
  if (scattered) {  // From a disk the pages come all at once instead of one after the other.
    idx_.expect_scattered_reads(true);
    check(num_sequences_, [&](std::int64_t i) {
      idx_.prefetch(lengths_ + i * 4);
      idx_.prefetch(pointers_ + i * 8);
    });
    check(num_documents(), [&](std::int64_t i) { idx_.prefetch(bounds_ + i * 8); });
  }
  check(num_sequences_, [&](std::int64_t i) { check_sequence(i); });
  check(num_documents(), [&](std::int64_t i) { check_document(i); });
  if (scattered) {
    idx_.expect_scattered_reads(false);
  }
}

void Corpus::check_ends() {
  if (bound(0) != 0 || bound(num_bounds_ - 1) != num_sequences_) {
    fail(idx_.path(), "its documents are the sequences from " + std::to_string(bound(0)) + " to " +
                          std::to_string(bound(num_bounds_ - 1)) + ", expected all from 0 to " +
                          std::to_string(num_sequences_));
  }
  const std::int64_t last = num_sequences_ - 1;
  const std::int64_t end = num_sequences_ == 0 ? 0 : pointer(last) + length(last) * token_bytes_;
  if (contiguous_ && end != bin_.size()) {
    fail(bin_.path(),
         "is " + std::to_string(bin_.size()) + " bytes long, but its index ends at byte " + std::to_string(end),
         "the two files are not of one run; write both again");
  }
}

std::int64_t Corpus::document_begin(std::int64_t document) const {
  const std::int64_t sequence = bound(document);
  if (sequence < 0 || sequence > num_sequences_) {  // Opening a large corpus checks a part of its entries.
    fail(idx_.path(), "document " + std::to_string(document) + " begins at sequence " + std::to_string(sequence) +
                          " of " + std::to_string(num_sequences_));
  }
  if (sequence == num_sequences_) {
    return num_tokens();
  }
  const std::int64_t begin = pointer(sequence);
  if (begin < 0 || begin > bin_.size()) {
    fail(idx_.path(), "sequence " + std::to_string(sequence) + " begins at byte " + std::to_string(begin) + " of " +
                          std::to_string(bin_.size()));
  }
  return begin / token_bytes_;
}

std::int64_t Corpus::document_at(std::int64_t position) const {
  std::int64_t low = 0;
  std::int64_t high = num_documents();
  while (high - low > 1) {  // document_begin(low) <= position < document_begin(high)
    const std::int64_t middle = low + (high - low) / 2;
    (document_begin(middle) <= position ? low : high) = middle;
  }
  return low;
}

std::pair<std::int64_t, std::int64_t> Corpus::id_range() const {
  if (num_tokens() == 0) {
    return {0, -1};
  }
  switch (type_) {
    case TokenType::kUint8:
      return range_of<std::uint8_t>(bin(), num_tokens());
    case TokenType::kInt8:
      return range_of<std::int8_t>(bin(), num_tokens());
    case TokenType::kInt16:
      return range_of<std::int16_t>(bin(), num_tokens());
    case TokenType::kInt32:
      return range_of<std::int32_t>(bin(), num_tokens());
    case TokenType::kInt64:
      return range_of<std::int64_t>(bin(), num_tokens());
    case TokenType::kUint16:
      return range_of<std::uint16_t>(bin(), num_tokens());
  }
  return {0, -1};
}

}  // namespace megatron_7b
