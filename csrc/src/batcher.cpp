#include "megatron_7b/batcher.h"

#include <algorithm>
#include <cstring>
#include <numeric>
#include <stdexcept>
#include <string>
#include <utility>

namespace megatron_7b {

Batcher::Batcher(std::vector<TokenStream> streams, std::optional<std::vector<std::int64_t>> weights,
                 std::int64_t seq_length, std::int64_t vocab_size, std::optional<std::int64_t> masked_eod)
    : streams_(std::move(streams)), seq_length_(seq_length), vocab_size_(vocab_size), masked_eod_(masked_eod) {
  if (streams_.empty() || (streams_.size() > 1) != weights.has_value() ||
      (weights && weights->size() != streams_.size())) {
    throw std::invalid_argument("several streams need one weight each, a single one needs none");
  }
  if (weights) {
    blend_ = std::make_unique<Blend>(std::move(*weights));
  }
}

Blend::Pick Batcher::pick(std::int64_t index) const { return blend_ ? blend_->pick(index) : Blend::Pick{0, index}; }

std::size_t Batcher::batch_bytes(std::int64_t num_samples, std::int64_t seq_length) {
  const auto tokens = static_cast<std::size_t>(num_samples) * static_cast<std::size_t>(seq_length);
  return tokens * (3 * sizeof(std::int64_t) + sizeof(float));
}

BatchView Batcher::view(void* buffer, std::int64_t num_samples) const {
  auto* ids = static_cast<std::int64_t*>(buffer);
  const std::int64_t tokens = num_samples * seq_length_;
  return {ids, ids + tokens, ids + 2 * tokens, reinterpret_cast<float*>(ids + 3 * tokens)};
}

void Batcher::assemble(const std::int64_t* indices, std::int64_t num_samples, const BatchView& batch) const {
  const auto row_bytes = static_cast<std::size_t>(seq_length_) * sizeof(std::int64_t);
  std::vector<std::int64_t> sample(static_cast<std::size_t>(seq_length_) + 1);
  for (std::int64_t row = 0; row < num_samples; ++row) {
    if (indices[row] < 0) {
      throw std::invalid_argument("sample number " + std::to_string(indices[row]));
    }
    const Blend::Pick picked = pick(indices[row]);
    const std::int64_t real =
        streams_[static_cast<std::size_t>(picked.set)].read(picked.sample, vocab_size_, sample.data());
    const std::int64_t begin = row * seq_length_;
    std::memcpy(batch.tokens + begin, sample.data(), row_bytes);
    std::memcpy(batch.labels + begin, sample.data() + 1, row_bytes);
    std::iota(batch.position_ids + begin, batch.position_ids + begin + seq_length_, std::int64_t{0});
    float* mask = batch.loss_mask + begin;
    const std::int64_t predicted = std::max<std::int64_t>(real - 1, 0);
    std::fill(mask, mask + predicted, 1.0F);
    std::fill(mask + predicted, mask + seq_length_, 0.0F);
    if (masked_eod_) {
      for (std::int64_t i = 0; i < predicted; ++i) {
        mask[i] = sample[static_cast<std::size_t>(i)] == *masked_eod_ ? 0.0F : 1.0F;
      }
    }
  }
}

BufferPool::Buffer BufferPool::take(std::size_t bytes) {
  {
    const std::scoped_lock lock(mutex_);
    const auto fits = std::find_if(free_.begin(), free_.end(), [&](const Buffer& free) { return free.bytes == bytes; });
    if (fits != free_.end()) {
      Buffer buffer = std::move(*fits);
      free_.erase(fits);
      return buffer;
    }
  }
  // Not value-initialised: every byte is written by assemble().
  return {std::unique_ptr<std::uint64_t[]>(new std::uint64_t[(bytes + 7) / 8]), bytes};
}

void BufferPool::give_back(Buffer buffer) {
  const std::scoped_lock lock(mutex_);
  free_.push_back(std::move(buffer));
  if (free_.size() > kept_) {
    free_.erase(free_.begin());  // The oldest one: of a size that is perhaps no longer used.
  }
}

}  // namespace megatron_7b
