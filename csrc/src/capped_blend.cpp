#include "megatron_7b/capped_blend.h"

#include <algorithm>
#include <functional>
#include <stdexcept>
#include <string>
#include <utility>

namespace megatron_7b {

CappedBlend::CappedBlend(std::vector<std::int64_t> weights, std::vector<std::int64_t> limits)
    : weights_(std::move(weights)), limits_(std::move(limits)) {
  if (weights_.empty() || weights_.size() != limits_.size()) {
    throw std::invalid_argument("a blend needs at least one set, and a limit for each");
  }
  for (const std::int64_t limit : limits_) {
    if (limit < 0) {
      throw std::invalid_argument("a limit of " + std::to_string(limit) + " samples is below 0");
    }
    num_samples_ = limit >= kUnlimited - num_samples_ ? kUnlimited : num_samples_ + limit;
  }
  std::vector<std::size_t> sets;  // Those that have anything to give.
  for (std::size_t set = 0; set < limits_.size(); ++set) {
    if (limits_[set] > 0) {
      sets.push_back(set);
    }
  }
  std::vector<std::int64_t> base(sets.size(), 0);
  phases_.push_back(make_phase(0, std::move(sets), std::move(base)));
}

CappedBlend::PhasePointer CappedBlend::make_phase(std::int64_t begin, std::vector<std::size_t> sets,
                                                  std::vector<std::int64_t> base) const {
  auto phase = std::make_shared<Phase>();
  phase->begin = begin;
  phase->sets = std::move(sets);
  phase->base = std::move(base);
  phase->surely = kUnlimited;
  if (!phase->sets.empty()) {
    const std::shared_ptr<const Blend> blend = blend_of(*phase);
    for (std::size_t i = 0; i < phase->sets.size(); ++i) {
      if (limits_[phase->sets[i]] < kUnlimited) {
        phase->surely = std::min(phase->surely, blend->earliest_slot(i, limit(*phase, i) - 1));
      }
    }
  }
  return phase;
}

std::shared_ptr<const Blend> CappedBlend::blend_of(const Phase& phase) const {
  const std::scoped_lock lock(blends_mutex_);
  if (!blends_[0].second || blends_[0].first != phase.begin) {
    std::swap(blends_[0], blends_[1]);
    if (!blends_[0].second || blends_[0].first != phase.begin) {
      std::vector<std::int64_t> weights;
      weights.reserve(phase.sets.size());
      for (const std::size_t set : phase.sets) {
        weights.push_back(weights_[set]);
      }
      blends_[0] = {phase.begin, std::make_shared<const Blend>(std::move(weights))};
    }
  }
  return blends_[0].second;
}

// Only for a phase in which a set runs out.
CappedBlend::PhasePointer CappedBlend::find_next(const Phase& phase) const {
  const std::shared_ptr<const Blend> blend = blend_of(phase);
  std::vector<std::int64_t> limits(phase.sets.size());
  for (std::size_t i = 0; i < limits.size(); ++i) {
    limits[i] = limit(phase, i);
  }
  const Blend::Exhaustion first = blend->first_exhausted(limits, phase.surely);
  std::vector<std::size_t> sets = phase.sets;
  std::vector<std::int64_t> base = phase.base;
  std::transform(base.begin(), base.end(), first.counts.begin(), base.begin(), std::plus<>());
  sets.erase(sets.begin() + static_cast<std::ptrdiff_t>(first.set));
  base.erase(base.begin() + static_cast<std::ptrdiff_t>(first.set));
  return make_phase(phase.begin + first.end, std::move(sets), std::move(base));
}

CappedBlend::PhasePointer CappedBlend::phase_of(std::int64_t n) const {
  if (n < 0) {
    throw std::invalid_argument("sample number " + std::to_string(n));
  }
  if (n >= num_samples_) {
    throw std::out_of_range("sample number " + std::to_string(n) + " of " + std::to_string(num_samples_));
  }
  const std::scoped_lock lock(mutex_);
  while (n - phases_.back()->begin >= phases_.back()->surely) {
    phases_.push_back(find_next(*phases_.back()));
  }
  const auto is_before = [](std::int64_t number, const PhasePointer& phase) { return number < phase->begin; };
  return *std::prev(std::upper_bound(phases_.begin(), phases_.end(), n, is_before));
}

// Null where nothing ever runs out.
CappedBlend::PhasePointer CappedBlend::phase_after(const PhasePointer& phase) const {
  const std::scoped_lock lock(mutex_);
  if (phases_.back() == phase) {
    if (phase->surely == kUnlimited) {
      return nullptr;
    }
    phases_.push_back(find_next(*phase));
  }
  return *std::next(std::find(phases_.begin(), phases_.end(), phase));
}

Blend::Pick CappedBlend::pick(std::int64_t n) const {
  const PhasePointer phase = phase_of(n);
  const Blend::Pick picked = blend_of(*phase)->pick(n - phase->begin);
  const auto i = static_cast<std::size_t>(picked.set);
  return {static_cast<std::int64_t>(phase->sets[i]), phase->base[i] + picked.sample};
}

std::vector<std::int64_t> CappedBlend::counts(std::int64_t n) const {
  if (n == num_samples_) {
    return limits_;
  }
  const PhasePointer phase = phase_of(n);
  const std::vector<std::int64_t> taken = blend_of(*phase)->counts(n - phase->begin);
  std::vector<std::int64_t> result = limits_;  // Of the sets that have run out.
  for (std::size_t i = 0; i < phase->sets.size(); ++i) {
    result[phase->sets[i]] = phase->base[i] + taken[i];
  }
  return result;
}

std::int64_t CappedBlend::number_of(std::int64_t set, std::int64_t sample) const {
  if (set < 0 || set >= static_cast<std::int64_t>(weights_.size()) || sample < 0 ||
      sample >= limits_[static_cast<std::size_t>(set)]) {
    throw std::out_of_range("sample " + std::to_string(sample) + " of set " + std::to_string(set));
  }
  PhasePointer phase = phase_of(0);
  for (;;) {
    const auto found = std::lower_bound(phase->sets.begin(), phase->sets.end(), static_cast<std::size_t>(set));
    const auto i = static_cast<std::size_t>(found - phase->sets.begin());
    const std::int64_t local = sample - phase->base[i];
    const PhasePointer after = phase_after(phase);
    const std::int64_t end = after ? after->begin - phase->begin : kUnlimited;
    const std::shared_ptr<const Blend> blend = blend_of(*phase);
    if (blend->earliest_slot(i, local) < end) {
      const std::int64_t slot = blend->slot_of(i, local);
      if (slot < end) {
        return phase->begin + slot;
      }
    }
    phase = after;
  }
}

}  // namespace megatron_7b
