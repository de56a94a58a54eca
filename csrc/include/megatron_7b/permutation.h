// A keyed bijection of [0, size): shuffles without a table, in constant memory and constant expected time.
//
// An unbalanced Feistel network over the smallest power of two that holds `size`, walked along its cycle until the
// value is back inside (fewer than two steps on average, since less than half of the domain is outside).
#pragma once

#include <cstdint>

namespace megatron_7b {

// The finaliser of SplitMix64: every bit of the input reaches every bit of the output.
inline std::uint64_t mix(std::uint64_t value) {
  value += 0x9E3779B97F4A7C15u;
  value = (value ^ (value >> 30)) * 0xBF58476D1CE4E5B9u;
  value = (value ^ (value >> 27)) * 0x94D049BB133111EBu;
  return value ^ (value >> 31);
}

inline std::uint64_t mix(std::uint64_t first, std::uint64_t second) { return mix(mix(first) ^ second); }

class Permutation {
 public:
  // size > 0
  Permutation(std::int64_t size, std::uint64_t key) : size_(static_cast<std::uint64_t>(size)), key_(key) {
    int bits = 2;
    while (bits < 64 && (std::uint64_t{1} << bits) < size_) {
      ++bits;
    }
    low_bits_ = bits / 2;
    low_mask_ = (std::uint64_t{1} << low_bits_) - 1;
    high_mask_ = (std::uint64_t{1} << (bits - low_bits_)) - 1;
  }

  std::int64_t operator()(std::int64_t index) const {
    auto value = static_cast<std::uint64_t>(index);
    do {
      value = encipher(value);
    } while (value >= size_);
    return static_cast<std::int64_t>(value);
  }

 private:
  static constexpr std::uint64_t kRounds = 4;  // Of two half-rounds each.

  std::uint64_t encipher(std::uint64_t value) const {
    std::uint64_t low = value & low_mask_;
    std::uint64_t high = value >> low_bits_;
    for (std::uint64_t round = 0; round < kRounds; ++round) {
      low ^= mix(key_ + 2 * round, high) & low_mask_;
      high ^= mix(key_ + 2 * round + 1, low) & high_mask_;
    }
    return (high << low_bits_) | low;
  }

  std::uint64_t size_;
  std::uint64_t key_;
  int low_bits_;
  std::uint64_t low_mask_;
  std::uint64_t high_mask_;
};

}  // namespace megatron_7b
