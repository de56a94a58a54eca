// Fill-in-the-middle: a document's pieces in another order, so that a left-to-right model learns to complete a gap.
//
// With prefix, middle and suffix of a document, and three tokens that announce them:
//   PSM  <prefix> prefix <suffix> suffix <middle> middle
//   SPM  <prefix> <suffix> suffix <middle> prefix middle
// The three tokens take the place of the document's last three, so its length stays; a closing end-of-document token
// stays where it is. Whether, how and where a document is cut is a function of the key, the sample and the document's
// place in it.
// Source: Bavarian et al., "Efficient Training of Language Models to Fill in the Middle", 2022 (SPM in its variant 2).
#pragma once

#include <cstdint>
#include <optional>
#include <vector>

namespace megatron_7b {

struct FillInTheMiddle {
  double rate = 0;      // Share of the documents that are permuted.
  double spm_rate = 0;  // Share of those that are written as SPM.
  std::int64_t prefix_id = 0;
  std::int64_t middle_id = 0;
  std::int64_t suffix_id = 0;
  std::optional<std::int64_t> eod_id;
  std::uint64_t key = 0;

  // Permutes the documents of one sample in place.
  //   starts: where documents begin in the sample, as TokenStream::read gives them; count: tokens of the sample.
  void permute(std::int64_t set, std::int64_t sample, const std::vector<std::int64_t>& starts, std::int64_t count,
               std::int64_t* ids) const;

 private:
  void permute_document(std::uint64_t document_key, std::int64_t length, std::int64_t* ids) const;
};

}  // namespace megatron_7b
