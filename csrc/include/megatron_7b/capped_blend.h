// A blend whose sets may run out: what was the share of an exhausted set goes to the others, in proportion to their
// weights.
//
// The stream is a row of phases. Within a phase, the sets that are left are a Blend of their weights, from its first
// sample on; a phase ends with the last sample of the first set to run out. So a set's count is exact to less than one
// sample at every prefix of a phase, and no set ever gives more than its limit. Before the first slot in which some set
// can run out, a phase is arithmetic; only from there on is the rule run, to its end. Phases are worked out when they
// are first asked for: 5,000 of them in seconds.
#pragma once

#include <array>
#include <cstdint>
#include <memory>
#include <mutex>
#include <utility>
#include <vector>

#include "megatron_7b/blend.h"

namespace megatron_7b {

class CappedBlend {
 public:
  // Samples that a set may give at most; 0: it has run out already.
  static constexpr std::int64_t kUnlimited = std::int64_t{1} << 62;
  CappedBlend(std::vector<std::int64_t> weights, std::vector<std::int64_t> limits);

  // Samples until all sets have run out, or kUnlimited.
  std::int64_t num_samples() const { return num_samples_; }
  // What global sample n is. Throws std::out_of_range at the end. Thread-safe.
  Blend::Pick pick(std::int64_t n) const;
  // Samples taken from each set before global sample n, which may be num_samples().
  std::vector<std::int64_t> counts(std::int64_t n) const;
  // The global number of a set's sample: pick(number_of(set, sample)) == {set, sample}.
  std::int64_t number_of(std::int64_t set, std::int64_t sample) const;

 private:
  struct Phase {
    std::int64_t begin = 0;          // Its first global sample.
    std::int64_t surely = 0;         // Samples before which no set can run out.
    std::vector<std::size_t> sets;   // Those that are left.
    std::vector<std::int64_t> base;  // Samples taken before from each of them.
  };
  using PhasePointer = std::shared_ptr<const Phase>;

  std::int64_t limit(const Phase& phase, std::size_t i) const { return limits_[phase.sets[i]] - phase.base[i]; }
  PhasePointer make_phase(std::int64_t begin, std::vector<std::size_t> sets, std::vector<std::int64_t> base) const;
  std::shared_ptr<const Blend> blend_of(const Phase& phase) const;
  PhasePointer find_next(const Phase& phase) const;
  PhasePointer phase_of(std::int64_t n) const;
  PhasePointer phase_after(const PhasePointer& phase) const;

  std::vector<std::int64_t> weights_;
  std::vector<std::int64_t> limits_;
  std::int64_t num_samples_ = 0;
  mutable std::mutex mutex_;
  mutable std::vector<PhasePointer> phases_;  // In order; the last one may have an end that is not known yet.
  // Of the two phases that were used last, by their beginnings: a blend keeps a megabyte of its schedule.
  mutable std::mutex blends_mutex_;
  mutable std::array<std::pair<std::int64_t, std::shared_ptr<const Blend>>, 2> blends_;
};

}  // namespace megatron_7b
