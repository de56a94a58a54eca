// The order in which one corpus is read: sample number -> tokens, without any index.
//
// The documents [first_document, end_document) are one run of T tokens in the .bin. Epoch e reads that run once, as a
// ring, from the beginning of a document drawn by (key, e); the epochs follow one another without a gap in one endless
// stream; sample i takes the s + 1 tokens from i * s on (the last one is only a label, and the first input of sample
// i + 1). So each epoch reads every token exactly once as an input, whatever T and s: no remainder is dropped, and the
// sample at the end of an epoch continues into the next one. Cuts fall differently in each epoch.
//
// The samples that begin in epoch e are N_e = ceil((e + 1) T / s) - ceil(e T / s) in number, and are read in the order
// of a keyed bijection of [0, N_e). All of it is arithmetic: the millionth epoch costs what the first does.
//
// Not shuffled, the corpus is read once from its first token to its last; what comes after its end is masked.
#pragma once

#include <cstdint>
#include <memory>
#include <vector>

#include "megatron_7b/corpus.h"

namespace megatron_7b {

class TokenStream {
 public:
  // Throws FormatError where the corpus is not contiguous, or holds too few tokens for one sample.
  TokenStream(std::shared_ptr<const Corpus> corpus, std::int64_t first_document, std::int64_t end_document,
              std::int64_t seq_length, std::uint64_t key, bool shuffle);

  const Corpus& corpus() const { return *corpus_; }
  std::int64_t num_tokens() const { return num_tokens_; }
  // Shuffled: samples that begin in the first epoch. Else: samples of the single pass.
  std::int64_t num_samples() const;
  std::int64_t epoch_of(std::int64_t sample) const;

  // Copies the seq_length + 1 ids of a sample to `ids`, zeros after the end, and returns how many are real.
  // Throws FormatError for an id at or above vocab_size (0: not checked) or below zero.
  // Where `starts` is given, it receives the places in (0, seq_length] of the sample at which a document begins, in
  // ascending order; what comes after the end counts as one more document.
  std::int64_t read(std::int64_t sample, std::int64_t vocab_size, std::int64_t* ids,
                    std::vector<std::int64_t>* starts = nullptr) const;

 private:
  struct Place {
    std::int64_t epoch;
    std::int64_t offset;  // Tokens since the epoch's beginning.
  };

  std::int64_t first_sample_of(std::int64_t epoch) const;
  std::int64_t ring_start(std::int64_t epoch) const;
  Place locate(std::int64_t sample) const;
  void find_starts(std::int64_t position, std::int64_t count, std::int64_t place,
                   std::vector<std::int64_t>& starts) const;
  void copy(std::int64_t position, std::int64_t count, std::int64_t vocab_size, std::int64_t* ids) const;
  [[noreturn]] void refuse_id(std::int64_t position, std::int64_t id, std::int64_t vocab_size) const;

  std::shared_ptr<const Corpus> corpus_;
  std::int64_t token_begin_ = 0;
  std::int64_t num_tokens_ = 0;
  std::int64_t seq_length_;
  std::uint64_t key_;
  bool shuffle_;
};

}  // namespace megatron_7b
