// A corpus opened for reading: both files mapped, nothing copied, nothing that takes longer for more documents.
#pragma once

#include <cstdint>
#include <memory>
#include <string>
#include <utility>

#include "megatron_7b/file.h"
#include "megatron_7b/mmididx.h"

namespace megatron_7b {

class Corpus {
 public:
  // Checks header, counts and sizes, the ends of every table, and its entries: all of up to kFullyChecked sequences,
  // else kSpotChecks evenly spread ones; `verify_all` checks all of them. Throws FormatError, naming the file.
  Corpus(const std::string& prefix, bool verify_all);

  const std::string& prefix() const { return prefix_; }
  TokenType token_type() const { return type_; }
  std::int64_t token_bytes() const { return token_bytes_; }
  std::int64_t num_sequences() const { return num_sequences_; }
  std::int64_t num_documents() const { return num_bounds_ - 1; }
  std::int64_t num_tokens() const { return bin_.size() / token_bytes_; }
  std::int64_t idx_bytes() const { return idx_.size(); }
  std::int64_t bin_bytes() const { return bin_.size(); }

  // Whether each sequence begins where the one before it ends, from the first byte to the last: so it is in every file
  // that Megatron or IndexWriter wrote. Only then is the corpus one stream of tokens that can be cut anywhere.
  bool is_contiguous() const { return contiguous_; }

  std::int64_t length(std::int64_t sequence) const { return load_unaligned<std::int32_t>(lengths_ + sequence * 4); }
  std::int64_t pointer(std::int64_t sequence) const { return load_unaligned<std::int64_t>(pointers_ + sequence * 8); }
  std::int64_t bound(std::int64_t document) const { return load_unaligned<std::int64_t>(bounds_ + document * 8); }
  const std::uint8_t* bin() const { return bin_.data(); }
  const std::uint8_t* lengths() const { return lengths_; }
  const std::uint8_t* pointers() const { return pointers_; }
  const std::uint8_t* bounds() const { return bounds_; }

  // Position of a document's first token in the stream; contiguous corpora only. document == num_documents: the end.
  std::int64_t document_begin(std::int64_t document) const;
  // The last document that begins at or before a position of the stream and isn't empty; contiguous corpora only.
  std::int64_t document_at(std::int64_t position) const;

  // Smallest and largest id of the whole file; (0, -1) when it is empty.
  std::pair<std::int64_t, std::int64_t> id_range() const;

#ifdef MEGATRON_7B_FULLY_CHECKED  // The fuzz target wants to see, within small files, what large ones go through.
  static constexpr std::int64_t kFullyChecked = MEGATRON_7B_FULLY_CHECKED;
  static constexpr std::int64_t kSpotChecks = 2;
#else
  static constexpr std::int64_t kFullyChecked = 1 << 16;
  // Few: each may be a page that has to come from a disk.
  static constexpr std::int64_t kSpotChecks = 1 << 8;
#endif

 private:
  void read_header();
  void check_sequence(std::int64_t sequence);
  void check_document(std::int64_t document) const;
  void check_entries(bool verify_all);
  void check_ends();

  std::string prefix_;
  MappedFile idx_;
  MappedFile bin_;
  TokenType type_ = TokenType::kInt32;
  std::int64_t token_bytes_ = 4;
  std::int64_t num_sequences_ = 0;
  std::int64_t num_bounds_ = 0;
  const std::uint8_t* lengths_ = nullptr;
  const std::uint8_t* pointers_ = nullptr;
  const std::uint8_t* bounds_ = nullptr;
  bool contiguous_ = true;
};

}  // namespace megatron_7b
