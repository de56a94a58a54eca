#include "megatron_7b/fill_in_the_middle.h"

#include <algorithm>

#include "megatron_7b/permutation.h"

namespace megatron_7b {

namespace {

constexpr std::int64_t kSentinels = 3;

// Uniform in [0, 1).
double fraction(std::uint64_t drawn) { return static_cast<double>(drawn >> 11) * 0x1p-53; }

}  // namespace

void FillInTheMiddle::permute(std::int64_t set, std::int64_t sample, const std::vector<std::int64_t>& starts,
                              std::int64_t count, std::int64_t* ids) const {
  const std::uint64_t sample_key = mix(mix(key, static_cast<std::uint64_t>(set)), static_cast<std::uint64_t>(sample));
  std::int64_t begin = 0;
  for (std::size_t document = 0; begin < count; ++document) {
    const std::int64_t end = document < starts.size() ? std::min(starts[document], count) : count;
    const std::int64_t length = end - begin - (eod_id && ids[end - 1] == *eod_id ? 1 : 0);
    permute_document(mix(sample_key, document), length, ids + begin);
    begin = end;
  }
}

void FillInTheMiddle::permute_document(std::uint64_t document_key, std::int64_t length, std::int64_t* ids) const {
  if (length <= kSentinels || fraction(mix(document_key, 0)) >= rate) {
    return;
  }
  const std::int64_t kept = length - kSentinels;
  const auto draw_cut = [&](std::uint64_t purpose) {
    return static_cast<std::int64_t>(mix(document_key, purpose) % static_cast<std::uint64_t>(kept + 1));
  };
  const auto [first, second] = std::minmax({draw_cut(2), draw_cut(3)});
  const std::vector<std::int64_t> original(ids, ids + kept);
  const auto copy = [&](std::int64_t begin, std::int64_t end) {
    ids = std::copy(original.begin() + begin, original.begin() + end, ids);
  };
  const bool spm = fraction(mix(document_key, 1)) < spm_rate;
  *ids++ = prefix_id;
  if (!spm) {
    copy(0, first);
  }
  *ids++ = suffix_id;
  copy(second, kept);
  *ids++ = middle_id;
  copy(spm ? 0 : first, second);
}

}  // namespace megatron_7b
