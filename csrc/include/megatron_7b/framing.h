// Documents as the corpus stores them: narrowed ids, with special tokens around each document that has any.
#pragma once

#include <cstddef>
#include <cstdint>
#include <optional>

namespace megatron_7b {

struct Frame {
  std::optional<std::uint32_t> bos;
  std::optional<std::uint32_t> eod;
};

// Lengths with the frame; returns their sum. Throws std::invalid_argument where `lengths` do not add up to `num_ids`.
std::int64_t frame_lengths(const std::int64_t* lengths, std::size_t num_documents, std::int64_t num_ids,
                           const Frame& frame, std::int64_t* framed);

// Id is std::uint16_t or std::int32_t; `framed` has room for what frame_lengths returned. Throws FormatError where an
// id does not fit.
template <typename Id>
void frame_documents(const std::uint32_t* ids, const std::int64_t* lengths, std::size_t num_documents,
                     const Frame& frame, Id* framed);

}  // namespace megatron_7b
