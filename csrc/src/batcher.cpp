#include "megatron_7b/batcher.h"

#include <algorithm>
#include <cstring>
#include <limits>
#include <numeric>
#include <stdexcept>
#include <string>
#include <utility>

namespace megatron_7b {

Batcher::Batcher(std::vector<TokenStream> streams, std::unique_ptr<const CappedBlend> blend, std::int64_t seq_length,
                 BatchOptions options, Origin origin)
    : streams_(std::move(streams)),
      blend_(std::move(blend)),
      seq_length_(seq_length),
      options_(std::move(options)),
      origin_(std::move(origin)) {
  if (streams_.empty() || (streams_.size() > 1 && !blend_)) {
    throw std::invalid_argument("several streams need a blend");
  }
  if (options_.reads_per_window < 1) {
    throw std::invalid_argument("each window is read at least once");
  }
  if (!origin_.consumed.empty() && origin_.consumed.size() != streams_.size()) {
    throw std::invalid_argument("every stream needs its number of consumed samples");
  }
}

Blend::Pick Batcher::pick(std::int64_t index) const {
  const std::int64_t number = index - origin_.first_sample;
  if (index < 0 || number < 0) {
    throw std::invalid_argument("sample number " + std::to_string(index));
  }
  Blend::Pick picked = blend_ ? blend_->pick(number) : Blend::Pick{0, number};
  if (!origin_.consumed.empty()) {
    picked.sample += origin_.consumed[static_cast<std::size_t>(picked.set)];
  }
  return picked;
}

std::size_t Batcher::batch_bytes(std::int64_t num_samples, std::int64_t seq_length) {
  const auto tokens = static_cast<std::size_t>(num_samples) * static_cast<std::size_t>(seq_length);
  return tokens * (3 * sizeof(std::int64_t) + sizeof(float));
}

BatchView Batcher::view(void* buffer, std::int64_t num_samples) const {
  auto* ids = static_cast<std::int64_t*>(buffer);
  const std::int64_t tokens = num_samples * seq_length_;
  return {ids, ids + tokens, ids + 2 * tokens, reinterpret_cast<float*>(ids + 3 * tokens)};
}

std::vector<std::int32_t> Batcher::assemble(const std::int64_t* indices, std::int64_t num_samples,
                                            const BatchView& batch) const {
  const auto row_bytes = static_cast<std::size_t>(seq_length_) * sizeof(std::int64_t);
  if (options_.document_boundaries && num_samples > std::numeric_limits<std::int32_t>::max() / seq_length_) {
    throw std::invalid_argument("cumulative lengths are 32 bits wide: too many tokens in one batch");
  }
  std::vector<std::int64_t> sample(static_cast<std::size_t>(seq_length_) + 1);
  std::vector<std::int64_t> starts;
  std::vector<std::int32_t> cumulative;
  const bool wants_starts =
      options_.document_boundaries || options_.reset_position_ids || options_.fill_in_the_middle.has_value();
  for (std::int64_t row = 0; row < num_samples; ++row) {
    const Blend::Pick picked = pick(indices[row]);
    const std::int64_t real = streams_[static_cast<std::size_t>(picked.set)].read(
        picked.sample / options_.reads_per_window, options_.vocab_size, sample.data(),
        wants_starts ? &starts : nullptr);
    if (options_.fill_in_the_middle) {
      options_.fill_in_the_middle->permute(picked.set, picked.sample, starts, real, sample.data());
    }
    const std::int64_t begin = row * seq_length_;
    std::memcpy(batch.tokens + begin, sample.data(), row_bytes);
    std::memcpy(batch.labels + begin, sample.data() + 1, row_bytes);
    fill_positions(starts, batch.position_ids + begin);
    fill_mask(sample.data(), std::max<std::int64_t>(real - 1, 0), batch.loss_mask + begin);
    if (options_.document_boundaries) {
      cumulative.push_back(static_cast<std::int32_t>(begin));
      for (const std::int64_t start : starts) {
        if (start < seq_length_) {  // One that begins with the last label has no input in this row.
          cumulative.push_back(static_cast<std::int32_t>(begin + start));
        }
      }
    }
  }
  if (options_.document_boundaries) {
    cumulative.push_back(static_cast<std::int32_t>(num_samples * seq_length_));
  }
  return cumulative;
}

void Batcher::fill_positions(const std::vector<std::int64_t>& starts, std::int64_t* positions) const {
  std::iota(positions, positions + seq_length_, std::int64_t{0});
  if (options_.reset_position_ids) {
    for (std::size_t i = 0; i < starts.size(); ++i) {
      const std::int64_t end = i + 1 < starts.size() ? starts[i + 1] : seq_length_;
      std::iota(positions + starts[i], positions + std::min(end, seq_length_), std::int64_t{0});
    }
  }
}

void Batcher::fill_mask(const std::int64_t* sample, std::int64_t predicted, float* mask) const {
  std::fill(mask, mask + predicted, 1.0F);
  std::fill(mask + predicted, mask + seq_length_, 0.0F);
  if (options_.masked_eod) {
    for (std::int64_t i = 0; i < predicted; ++i) {
      mask[i] = sample[i] == *options_.masked_eod ? 0.0F : 1.0F;
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
