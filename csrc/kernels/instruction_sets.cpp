// The kernels, compiled once per instruction set, and the choice among them by what the processor has.

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <new>
#include <stdexcept>
#include <string>
#include <vector>

#include "megatron_7b/kernels.h"

#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__)
#define MEGATRON_7B_X86_VERSIONS
#include <immintrin.h>
#endif

#define MEGATRON_7B_INLINE static inline __attribute__((always_inline))

namespace megatron_7b {

namespace baseline {
#define MEGATRON_7B_LANES 4
#include "table.h"
}  // namespace baseline

#ifdef MEGATRON_7B_X86_VERSIONS
#pragma GCC push_options
#pragma GCC target("avx2,fma")
namespace avx2 {
#undef MEGATRON_7B_LANES
#define MEGATRON_7B_LANES 8
#include "table.h"
}  // namespace avx2
#pragma GCC pop_options

#pragma GCC push_options
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma")
namespace avx512 {
#undef MEGATRON_7B_LANES
#define MEGATRON_7B_LANES 16
#include "table.h"
}  // namespace avx512
#pragma GCC pop_options

#pragma GCC push_options
#pragma GCC target("avx512bf16,avx512f,avx512bw,avx512dq,avx512vl,avx2,fma")
namespace avx512_bf16 {
#define MEGATRON_7B_DOT_BF16
#include "table.h"
#undef MEGATRON_7B_DOT_BF16
}  // namespace avx512_bf16
#pragma GCC pop_options
#endif

const char* const* instruction_sets() {
  static const std::vector<const char*> names = [] {
    std::vector<const char*> found;
#ifdef MEGATRON_7B_X86_VERSIONS
    if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
        __builtin_cpu_supports("avx512vl")) {
      if (__builtin_cpu_supports("avx512bf16")) {
        found.push_back("avx512_bf16");
      }
      found.push_back("avx512");
    }
    if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) {
      found.push_back("avx2");
    }
#endif
    found.push_back("baseline");
    found.push_back(nullptr);
    return found;
  }();
  return names.data();
}

template <class T>
const Kernels<T>& kernels(const char* name) {
  for (const char* const* known = instruction_sets(); *known != nullptr; ++known) {
    if (std::string(*known) != name) {
      continue;
    }
#ifdef MEGATRON_7B_X86_VERSIONS
    if (std::string(name) == "avx512_bf16") {
      static constexpr Kernels<T> kTable = avx512_bf16::table<T>();
      return kTable;
    }
    if (std::string(name) == "avx512") {
      static constexpr Kernels<T> kTable = avx512::table<T>();
      return kTable;
    }
    if (std::string(name) == "avx2") {
      static constexpr Kernels<T> kTable = avx2::table<T>();
      return kTable;
    }
#endif
    static constexpr Kernels<T> kTable = baseline::table<T>();
    return kTable;
  }
  throw std::invalid_argument(std::string("this processor does not run '") + name + "'");
}

template const Kernels<float>& kernels<float>(const char* name);
template const Kernels<BFloat16>& kernels<BFloat16>(const char* name);

}  // namespace megatron_7b
