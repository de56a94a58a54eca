// Weighted blends: global sample number -> (set, sample of that set), exact to less than one sample at every prefix.
//
// With integer weights m_k of sum D, set k has been read floor(m_k n / D) or ceil(m_k n / D) times after any n samples.
// That is proportionate ("Pfair") scheduling on one processor: the j-th sample of set k may be taken in the slots
// [floor(j D / m_k), ceil((j + 1) D / m_k)), and taking the released sample of earliest deadline meets all of them.
//
// Random access: the counts before any sample n are computed from n alone. Among the sets between two integers (m_k n /
// D not whole), those counted up are chosen so that
//   (backward) the samples before n can be scheduled: for all t < n, of the sets counted down at most
//              sum_k ceil(m_k t / D) - t have released their current sample before t;
//   (forward)  those after it can: the sets counted up are those of earliest deadline that (backward) allows. The
//              choices that (backward) allows are a matroid, whose greedy basis is best for every forward condition at
//              once, and some valid schedule exists, so this one satisfies them.
// These are the counts of earliest-deadline-first from the stream's beginning: a set between two integers has a
// deadline after n, so it gives way to all that are not, and among themselves the earliest deadline is served first.
// Single samples are looked up in blocks of B >= D / min m_k slots, in which that rule is run from border to border.
// Source: Baruah, Cohen, Plaxton, Varvel, "Proportionate progress: a notion of fairness in resource allocation", 1996.
#pragma once

#include <array>
#include <cstdint>
#include <memory>
#include <mutex>
#include <vector>

namespace megatron_7b {

class Blend {
 public:
  struct Pick {
    std::int64_t set;
    std::int64_t sample;
  };

  // Positive weights whose sum is at most 2^40, each at least a 2^24th of it.
  explicit Blend(std::vector<std::int64_t> weights);

  std::int64_t num_sets() const { return static_cast<std::int64_t>(weights_.size()); }
  std::int64_t block_size() const { return block_size_; }

  // What global sample n is. Thread-safe; the two latest blocks are kept.
  Pick pick(std::int64_t n) const;
  // Samples taken from each set before global sample n: arithmetic, no schedule is built.
  std::vector<std::int64_t> counts(std::int64_t n) const;

  struct Exhaustion {
    std::int64_t end;                  // Behind the sample with which the first set has given its limit,
    std::size_t set;                   // that set,
    std::vector<std::int64_t> counts;  // and what every set has given by then.
  };
  // For limits of which none is reached before sample `from`, and one is at some time.
  Exhaustion first_exhausted(const std::vector<std::int64_t>& limits, std::int64_t from) const;
  // The global number of a set's sample, and the earliest that it can have.
  std::int64_t slot_of(std::size_t set, std::int64_t sample) const;
  std::int64_t earliest_slot(std::size_t set, std::int64_t sample) const { return release(set, sample); }

 private:
  struct Block {
    std::int64_t number = -1;
    std::vector<std::int64_t> base;    // Counts at the block's beginning.
    std::vector<std::int32_t> set;     // Per slot.
    std::vector<std::int32_t> sample;  // Per slot, since base.
  };

  std::int64_t floor_count(std::size_t k, std::int64_t n) const;
  std::int64_t ceil_count(std::size_t k, std::int64_t n) const;
  std::int64_t release(std::size_t k, std::int64_t sample) const;
  std::int64_t deadline(std::size_t k, std::int64_t sample) const;
  std::vector<std::int64_t> slack_before(std::int64_t first, std::int64_t n) const;
  std::shared_ptr<const Block> build_block(std::int64_t number) const;
  std::shared_ptr<const Block> block(std::int64_t number) const;

  std::vector<std::int64_t> weights_;
  std::int64_t total_ = 0;
  std::int64_t block_size_ = 0;
  mutable std::mutex mutex_;
  mutable std::array<std::shared_ptr<const Block>, 2> cache_;
};

}  // namespace megatron_7b
