// Global sample numbers -> one microbatch, straight from the maps.
#pragma once

#include <cstdint>
#include <memory>
#include <mutex>
#include <optional>
#include <vector>

#include "megatron_7b/capped_blend.h"
#include "megatron_7b/fill_in_the_middle.h"
#include "megatron_7b/token_stream.h"

namespace megatron_7b {

// What a batch holds besides tokens and labels.
struct BatchOptions {
  // 0: ids are not checked.
  std::int64_t vocab_size = 0;
  // Samples in a row of a set that hold the same window; the numbers of a blend count samples.
  std::int64_t reads_per_window = 1;
  // An input token whose prediction stays out of the loss.
  std::optional<std::int64_t> masked_eod;
  // Say where documents begin.
  bool document_boundaries = false;
  // Count positions from each document's first token in the sample.
  bool reset_position_ids = false;
  // Permute documents.
  std::optional<FillInTheMiddle> fill_in_the_middle;
};

// Where a blend begins that takes over from an earlier one.
struct Origin {
  // The first global sample.
  std::int64_t first_sample = 0;
  // Samples that were read from each stream before; empty: none.
  std::vector<std::int64_t> consumed;
};

// Where the arrays of one microbatch are, each [b, s], in one buffer.
struct BatchView {
  std::int64_t* tokens;
  std::int64_t* labels;
  std::int64_t* position_ids;
  float* loss_mask;
};

class Batcher {
 public:
  // blend: how several streams take turns, or when a single one ends.
  Batcher(std::vector<TokenStream> streams, std::unique_ptr<const CappedBlend> blend, std::int64_t seq_length,
          BatchOptions options, Origin origin = {});

  std::int64_t seq_length() const { return seq_length_; }
  const BatchOptions& options() const { return options_; }

  // The set and the number within it of a global sample, which must not be before the origin.
  Blend::Pick pick(std::int64_t index) const;
  static std::size_t batch_bytes(std::int64_t num_samples, std::int64_t seq_length);
  BatchView view(void* buffer, std::int64_t num_samples) const;
  // Fills `batch`. Returns the cumulative lengths of the documents in the rows laid one after the other: 0, …, b s with
  // the beginning of each row among them; nothing where options().document_boundaries is off.
  std::vector<std::int32_t> assemble(const std::int64_t* indices, std::int64_t num_samples,
                                     const BatchView& batch) const;

 private:
  void fill_positions(const std::vector<std::int64_t>& starts, std::int64_t* positions) const;
  void fill_mask(const std::int64_t* sample, std::int64_t predicted, float* mask) const;

  std::vector<TokenStream> streams_;
  std::unique_ptr<const CappedBlend> blend_;
  std::int64_t seq_length_;
  BatchOptions options_;
  Origin origin_;
};

// Buffers handed out and taken back, so that a training step writes to warm pages instead of faulting in new ones.
class BufferPool {
 public:
  explicit BufferPool(std::size_t kept) : kept_(kept) {}
  struct Buffer {
    std::unique_ptr<std::uint64_t[]> data;
    std::size_t bytes = 0;
  };
  Buffer take(std::size_t bytes);
  void give_back(Buffer buffer);

 private:
  std::size_t kept_;
  std::mutex mutex_;
  std::vector<Buffer> free_;
};

}  // namespace megatron_7b
