#include "megatron_7b/framing.h"

#include <limits>
#include <stdexcept>
#include <string>

#include "megatron_7b/error.h"

namespace megatron_7b {

std::int64_t frame_lengths(const std::int64_t* lengths, std::size_t num_documents, std::int64_t num_ids,
                           const Frame& frame, std::int64_t* framed) {
  const std::int64_t added = frame.bos.has_value() + frame.eod.has_value();
  std::int64_t left = num_ids;
  std::int64_t total = 0;
  for (std::size_t i = 0; i < num_documents; ++i) {
    if (lengths[i] < 0 || lengths[i] > left) {
      throw std::invalid_argument("length " + std::to_string(i) + " is " + std::to_string(lengths[i]) + ", but only " +
                                  std::to_string(left) + " ids are left");
    }
    left -= lengths[i];
    framed[i] = lengths[i] > 0 ? lengths[i] + added : 0;
    total += framed[i];
  }
  if (left != 0) {
    throw std::invalid_argument("the lengths leave " + std::to_string(left) + " ids over");
  }
  return total;
}

template <typename Id>
void frame_documents(const std::uint32_t* ids, const std::int64_t* lengths, std::size_t num_documents,
                     const Frame& frame, Id* framed) {
  std::uint32_t largest = 0;
  for (std::size_t i = 0; i < num_documents; ++i) {
    if (lengths[i] == 0) {
      continue;
    }
    if (frame.bos) {
      *framed++ = static_cast<Id>(*frame.bos);
    }
    for (std::int64_t j = 0; j < lengths[i]; ++j) {
      largest = ids[j] > largest ? ids[j] : largest;
      framed[j] = static_cast<Id>(ids[j]);
    }
    ids += lengths[i];
    framed += lengths[i];
    if (frame.eod) {
      *framed++ = static_cast<Id>(*frame.eod);
    }
  }
  if (largest > static_cast<std::uint32_t>(std::numeric_limits<Id>::max())) {
    throw FormatError("the tokenizer gave id " + std::to_string(largest) + ", which " + std::to_string(sizeof(Id)) +
                      " bytes do not hold: its vocabulary is larger than it says");
  }
}

template void frame_documents(const std::uint32_t*, const std::int64_t*, std::size_t, const Frame&, std::uint16_t*);
template void frame_documents(const std::uint32_t*, const std::int64_t*, std::size_t, const Frame&, std::int32_t*);

}  // namespace megatron_7b
