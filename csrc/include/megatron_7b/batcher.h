// Global sample numbers -> one microbatch, straight from the maps.
#pragma once

#include <cstdint>
#include <memory>
#include <mutex>
#include <optional>
#include <vector>

#include "megatron_7b/blend.h"
#include "megatron_7b/token_stream.h"

namespace megatron_7b {

// Where the arrays of one microbatch lie, each [b, s], in one buffer.
struct BatchView {
  std::int64_t* tokens;
  std::int64_t* labels;
  std::int64_t* position_ids;
  float* loss_mask;
};

class Batcher {
 public:
  // vocab_size 0: ids are not checked. masked_eod: an input token whose prediction stays out of the loss.
  Batcher(std::vector<TokenStream> streams, std::optional<std::vector<std::int64_t>> weights, std::int64_t seq_length,
          std::int64_t vocab_size, std::optional<std::int64_t> masked_eod);

  std::int64_t seq_length() const { return seq_length_; }
  const std::vector<TokenStream>& streams() const { return streams_; }
  const Blend* blend() const { return blend_.get(); }

  // The set and the number within it of a global sample.
  Blend::Pick pick(std::int64_t index) const;
  static std::size_t batch_bytes(std::int64_t num_samples, std::int64_t seq_length);
  BatchView view(void* buffer, std::int64_t num_samples) const;
  void assemble(const std::int64_t* indices, std::int64_t num_samples, const BatchView& batch) const;

 private:
  std::vector<TokenStream> streams_;
  std::unique_ptr<Blend> blend_;
  std::int64_t seq_length_;
  std::int64_t vocab_size_;
  std::optional<std::int64_t> masked_eod_;
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
