#include "megatron_7b/index_writer.h"

#include <unistd.h>

#include <algorithm>
#include <array>
#include <limits>
#include <numeric>
#include <stdexcept>
#include <type_traits>

#include "megatron_7b/error.h"
#include "megatron_7b/mmididx.h"

namespace megatron_7b {

namespace {

constexpr std::size_t kChunk = 8192;
constexpr std::int64_t kLengthBytes = 4;
constexpr std::int64_t kBoundBytes = 8;

std::string bounds_path(const std::string& prefix) { return prefix + ".bounds.tmp"; }

void check_token_bytes(int token_bytes) {
  if (token_bytes != 2 && token_bytes != 4) {
    throw std::invalid_argument("token_bytes is " + std::to_string(token_bytes) + ", expected 2 or 4");
  }
}

// Narrows `count` ids; false where one does not fit. Branch-free inside, so that it vectorises.
template <typename Out, typename Id>
bool narrow(const Id* ids, std::size_t count, Out* out) {
  bool bad = false;
  for (std::size_t i = 0; i < count; ++i) {
    const auto id = static_cast<std::int64_t>(ids[i]);
    bad |= id < 0 || id > static_cast<std::int64_t>(std::numeric_limits<Out>::max());
    out[i] = static_cast<Out>(ids[i]);
  }
  return !bad;
}

}  // namespace

IndexWriter::IndexWriter(const std::string& prefix, int token_bytes) : prefix_(prefix), token_bytes_(token_bytes) {
  check_token_bytes(token_bytes);
  bin_ = std::make_unique<BufferedFile>(bin_path(prefix) + ".tmp");
  try {
    idx_ = std::make_unique<BufferedFile>(idx_path(prefix) + ".tmp");
  } catch (...) {
    bin_->remove();
    throw;
  }
  const std::array<char, kHeaderBytes> header{};  // Filled in by complete(), when the counts are known.
  idx_->write(header.data(), header.size());
}

IndexWriter::IndexWriter(const std::string& prefix, int token_bytes, const Checkpoint& checkpoint)
    : prefix_(prefix), token_bytes_(token_bytes), at_(checkpoint) {
  check_token_bytes(token_bytes);
  auto bin = std::make_unique<BufferedFile>(bin_path(prefix) + ".tmp", at_.num_tokens * token_bytes);
  auto idx = std::make_unique<BufferedFile>(idx_path(prefix) + ".tmp", kHeaderBytes + at_.num_sequences * kLengthBytes);
  if (!at_.bounds_implied) {
    bounds_ = std::make_unique<BufferedFile>(bounds_path(prefix), (at_.num_documents + 1) * kBoundBytes);
  }
  bin_ = std::move(bin);
  idx_ = std::move(idx);
}

IndexWriter::~IndexWriter() { abort(); }

void IndexWriter::check_open() const {
  if (!bin_) {
    throw std::logic_error("the writer of " + prefix_ + " is already finished or aborted");
  }
}

template <typename Id>
void IndexWriter::write_ids(const Id* ids, std::int64_t count) {
  const auto put = [&](auto width) {
    using Out = decltype(width);
    std::array<Out, kChunk> chunk;
    for (std::int64_t begin = 0; begin < count; begin += static_cast<std::int64_t>(kChunk)) {
      const auto size = static_cast<std::size_t>(std::min<std::int64_t>(kChunk, count - begin));
      if (!narrow(ids + begin, size, chunk.data())) {
        throw FormatError("a token id of document " + std::to_string(at_.num_documents) +
                              " or after does not fit the " + std::to_string(sizeof(Out)) + "-byte ids of " +
                              bin_path(prefix_),
                          "write 4-byte ids: the vocabulary is larger than was said");
      }
      bin_->write(chunk.data(), size * sizeof(Out));
    }
  };
  if (token_bytes_ == 2) {
    if constexpr (std::is_same_v<Id, std::uint16_t>) {
      bin_->write(ids, static_cast<std::size_t>(count) * sizeof(Id));
    } else {
      put(std::uint16_t{});
    }
  } else {
    put(std::int32_t{});
  }
  at_.num_tokens += count;
}

void IndexWriter::write_length(std::int64_t length) {
  const auto stored = static_cast<std::int32_t>(length);
  idx_->write(&stored, sizeof(stored));
  ++at_.num_sequences;
}

void IndexWriter::spool_implied_bounds() {
  bounds_ = std::make_unique<BufferedFile>(bounds_path(prefix_));
  for (std::int64_t bound = 0; bound < at_.num_documents; ++bound) {
    bounds_->write(&bound, sizeof(bound));
  }
  at_.bounds_implied = false;
}

void IndexWriter::end_document() {
  ++at_.num_documents;
  if (at_.bounds_implied && at_.num_sequences != at_.num_documents) {
    spool_implied_bounds();
  }
  if (!at_.bounds_implied) {
    bounds_->write(&at_.num_sequences, sizeof(at_.num_sequences));
  }
}

namespace {

template <typename Length>
void check_lengths(const Length* lengths, std::int64_t num, std::int64_t count) {
  std::int64_t sum = 0;
  for (std::int64_t i = 0; i < num; ++i) {
    const auto length = static_cast<std::int64_t>(lengths[i]);
    if (length < 0 || length > std::numeric_limits<std::int32_t>::max() || length > count - sum) {
      throw std::invalid_argument("length " + std::to_string(i) + " is " + std::to_string(length) + " of " +
                                  std::to_string(count) + " ids, " + std::to_string(sum) + " of them already taken");
    }
    sum += length;
  }
  if (sum != count) {
    throw std::invalid_argument("the lengths add up to " + std::to_string(sum) + ", but there are " +
                                std::to_string(count) + " ids");
  }
}

}  // namespace

template <typename Id>
void IndexWriter::add_document(const Id* ids, std::int64_t count, const std::int32_t* lengths,
                               std::int64_t num_sequences) {
  check_open();
  if (lengths == nullptr) {
    check_lengths(&count, 1, count);
    write_ids(ids, count);
    write_length(count);
  } else {
    check_lengths(lengths, num_sequences, count);
    write_ids(ids, count);
    for (std::int64_t i = 0; i < num_sequences; ++i) {
      write_length(lengths[i]);
    }
  }
  end_document();
}

template <typename Id>
void IndexWriter::add_documents(const Id* ids, std::int64_t count, const std::int64_t* lengths,
                                std::int64_t num_documents) {
  check_open();
  check_lengths(lengths, num_documents, count);
  write_ids(ids, count);
  for (std::int64_t i = 0; i < num_documents; ++i) {
    write_length(lengths[i]);
    end_document();
  }
}

void IndexWriter::write_pointers() {
  std::array<std::int32_t, kChunk> lengths;
  std::array<std::int64_t, kChunk> pointers;
  std::int64_t pointer = 0;
  for (std::int64_t begin = 0; begin < at_.num_sequences; begin += static_cast<std::int64_t>(kChunk)) {
    const auto size = static_cast<std::size_t>(std::min<std::int64_t>(kChunk, at_.num_sequences - begin));
    idx_->read_at(kHeaderBytes + begin * 4, lengths.data(), size * sizeof(lengths[0]));
    for (std::size_t i = 0; i < size; ++i) {
      pointers[i] = pointer;
      pointer += static_cast<std::int64_t>(lengths[i]) * token_bytes_;
    }
    idx_->write(pointers.data(), size * sizeof(pointers[0]));
  }
}

void IndexWriter::write_document_bounds() {
  if (at_.bounds_implied) {
    for (std::int64_t bound = 0; bound <= at_.num_documents; ++bound) {
      idx_->write(&bound, sizeof(bound));
    }
    return;
  }
  std::array<std::int64_t, kChunk> bounds;
  const std::int64_t count = at_.num_documents + 1;
  for (std::int64_t begin = 0; begin < count; begin += static_cast<std::int64_t>(kChunk)) {
    const auto size = static_cast<std::size_t>(std::min<std::int64_t>(kChunk, count - begin));
    bounds_->read_at(begin * kBoundBytes, bounds.data(), size * sizeof(bounds[0]));
    idx_->write(bounds.data(), size * sizeof(bounds[0]));
  }
}

IndexWriter::Checkpoint IndexWriter::checkpoint() {
  check_open();
  for (auto* file : {&bin_, &idx_, &bounds_}) {
    if (*file) {
      (*file)->flush();
    }
  }
  return at_;
}

void IndexWriter::complete() {
  check_open();
  write_pointers();
  write_document_bounds();
  std::array<std::uint8_t, kHeaderBytes> header;
  const auto code = static_cast<std::uint8_t>(token_bytes_ == 2 ? TokenType::kUint16 : TokenType::kInt32);
  const std::uint64_t counts[2] = {static_cast<std::uint64_t>(at_.num_sequences),
                                   static_cast<std::uint64_t>(at_.num_documents) + 1};
  std::memcpy(header.data(), kMagic, 9);
  std::memcpy(header.data() + 9, &kVersion, 8);
  header[17] = code;
  std::memcpy(header.data() + 18, counts, 16);
  idx_->write_at(0, header.data(), header.size());

  for (auto* file : {&bin_, &idx_}) {
    (*file)->sync();
    (*file)->close();
  }
  bin_.reset();
  idx_.reset();
}

void IndexWriter::finish() {
  const std::string bin = bin_path(prefix_) + ".tmp";
  const std::string idx = idx_path(prefix_) + ".tmp";
  complete();
  abort();  // Of what is left open: the bounds, which the index now holds.
  try {
    // An index of an earlier corpus must not be found beside the new ids, should we die between the two renames.
    ::unlink(idx_path(prefix_).c_str());
    publish(bin, bin_path(prefix_));
    publish(idx, idx_path(prefix_));
  } catch (...) {
    ::unlink(bin.c_str());
    ::unlink(idx.c_str());
    throw;
  }
}

void IndexWriter::suspend() noexcept {
  for (auto* file : {&bin_, &idx_, &bounds_}) {
    file->reset();
  }
}

void IndexWriter::abort() noexcept {
  for (auto* file : {&bin_, &idx_, &bounds_}) {
    if (*file) {
      (*file)->remove();
      file->reset();
    }
  }
}

template void IndexWriter::add_document(const std::uint16_t*, std::int64_t, const std::int32_t*, std::int64_t);
template void IndexWriter::add_document(const std::int32_t*, std::int64_t, const std::int32_t*, std::int64_t);
template void IndexWriter::add_document(const std::int64_t*, std::int64_t, const std::int32_t*, std::int64_t);
template void IndexWriter::add_documents(const std::uint16_t*, std::int64_t, const std::int64_t*, std::int64_t);
template void IndexWriter::add_documents(const std::int32_t*, std::int64_t, const std::int64_t*, std::int64_t);
template void IndexWriter::add_documents(const std::int64_t*, std::int64_t, const std::int64_t*, std::int64_t);

}  // namespace megatron_7b
