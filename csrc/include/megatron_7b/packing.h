// Best-fit-decreasing bin packing: whole documents into rows of a fixed number of tokens.
#pragma once

#include <cstdint>
#include <vector>

namespace megatron_7b {

// Pieces of documents by row. Row r holds pieces [row_begin[r], row_begin[r + 1]), in the order of their documents.
struct Packing {
  std::vector<std::int64_t> row_begin;
  std::vector<std::int64_t> document;
  std::vector<std::int64_t> offset;  // Of the piece's first token in its document.
  std::vector<std::int64_t> length;
};

// Packs documents of these lengths. One that is longer than `capacity` gives full rows of its own first, and its rest
// is packed like any other; none else is cut. Empty documents have no piece. The longest piece goes first, each into
// the fullest row that has room. Time: linear in the number of documents.
Packing pack_best_fit(const std::int64_t* lengths, std::int64_t num_documents, std::int64_t capacity);

}  // namespace megatron_7b
