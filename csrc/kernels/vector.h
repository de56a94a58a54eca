// A register full of floats at a time: MEGATRON_7B_LANES of them.
//
// Included once per instruction set, inside a namespace of its own and under that set's target pragma: nothing here may
// be shared between them. Compilers' vector extension (GCC, Clang) rather than intrinsics: one text for all processors.

constexpr std::int64_t kLanes = MEGATRON_7B_LANES;

typedef float Vector __attribute__((vector_size(4 * MEGATRON_7B_LANES)));
typedef std::int32_t IntVector __attribute__((vector_size(4 * MEGATRON_7B_LANES)));
typedef std::uint32_t UintVector __attribute__((vector_size(4 * MEGATRON_7B_LANES)));
typedef std::uint16_t HalfVector __attribute__((vector_size(2 * MEGATRON_7B_LANES)));

#if MEGATRON_7B_LANES == 16
// Functions without a mask start from a variable that is not initialised, which GCC 12 warns of (its bug 105593).
constexpr __mmask16 kAllLanes = 0xffff;
#endif

MEGATRON_7B_INLINE float to_float(float value) { return value; }

MEGATRON_7B_INLINE float to_float(BFloat16 value) {
  const std::uint32_t bits = static_cast<std::uint32_t>(value.bits) << 16;
  float x;
  std::memcpy(&x, &bits, sizeof x);
  return x;
}

MEGATRON_7B_INLINE Vector broadcast(float value) { return value - Vector{}; }

MEGATRON_7B_INLINE Vector load(const float* from) {
  Vector x;
  std::memcpy(&x, from, sizeof x);
  return x;
}

MEGATRON_7B_INLINE void store(float* to, Vector x) { std::memcpy(to, &x, sizeof x); }

// Each number in the low half of a lane. By name where the compiler would take it in two parts.
MEGATRON_7B_INLINE UintVector widened(HalfVector halves) {
#if MEGATRON_7B_LANES == 16
  return reinterpret_cast<UintVector>(_mm512_maskz_cvtepu16_epi32(kAllLanes, reinterpret_cast<__m256i>(halves)));
#else
  return __builtin_convertvector(halves, UintVector);
#endif
}

MEGATRON_7B_INLINE Vector load(const BFloat16* from) {
  HalfVector halves;
  std::memcpy(&halves, from, sizeof halves);
  const UintVector bits = widened(halves) << 16;
  Vector x;
  std::memcpy(&x, &bits, sizeof x);
  return x;
}

// Rounds to nearest, ties to even; not a number stays one. A processor with BF16 makes zero of what is below 2^-126.
MEGATRON_7B_INLINE HalfVector rounded(Vector x) {
#ifdef MEGATRON_7B_DOT_BF16
  return reinterpret_cast<HalfVector>(_mm512_cvtneps_pbh(reinterpret_cast<__m512>(x)));
#else
  UintVector bits;
  std::memcpy(&bits, &x, sizeof bits);
  const UintVector upper = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
  const IntVector ordered = x == x;
  return __builtin_convertvector(ordered ? upper : UintVector{} + 0x7fc0u, HalfVector);
#endif
}

MEGATRON_7B_INLINE void store(BFloat16* to, Vector x) {
  const HalfVector halves = rounded(x);
  std::memcpy(to, &halves, sizeof halves);
}

// Rounds as `store` does.
template <class T>
MEGATRON_7B_INLINE T from_float(float value) {
  T lanes[kLanes];
  store(lanes, broadcast(value));
  return lanes[0];
}

// The first `count` < kLanes elements; the other lanes are zero.
template <class T>
MEGATRON_7B_INLINE Vector load_part(const T* from, std::int64_t count) {
  T buffer[kLanes] = {};
  std::memcpy(buffer, from, static_cast<std::size_t>(count) * sizeof(T));
  return load(buffer);
}

template <class T>
MEGATRON_7B_INLINE void store_part(T* to, Vector x, std::int64_t count) {
  T buffer[kLanes];
  store(buffer, x);
  std::memcpy(to, buffer, static_cast<std::size_t>(count) * sizeof(T));
}

MEGATRON_7B_INLINE Vector maximum(Vector a, Vector b) { return a > b ? a : b; }

MEGATRON_7B_INLINE Vector minimum(Vector a, Vector b) { return a < b ? a : b; }

MEGATRON_7B_INLINE float sum_of(Vector x) {
  float lanes[kLanes];
  store(lanes, x);
  for (std::int64_t half = kLanes / 2; half > 0; half /= 2) {
    for (std::int64_t i = 0; i < half; ++i) {
      lanes[i] += lanes[i + half];
    }
  }
  return lanes[0];
}

#if defined(__GNUC__) && !defined(__clang__)
#define MEGATRON_7B_SUMS_OF

// Halves the lanes of every sum: of two vectors of sums that are 2 × kHalf lanes wide each, one of sums half as wide.
template <std::int64_t kHalf>
MEGATRON_7B_INLINE Vector folded(Vector a, Vector b) {
  IntVector low;
  for (std::int64_t i = 0; i < kLanes; ++i) {
    low[i] = static_cast<std::int32_t>(i / kHalf * 2 * kHalf + i % kHalf);
  }
  return __builtin_shuffle(a, b, low) + __builtin_shuffle(a, b, low + static_cast<std::int32_t>(kHalf));
}

// sum_of of kLanes vectors at once, added in the same order; they are overwritten.
template <std::int64_t kHalf = kLanes / 2>
MEGATRON_7B_INLINE Vector sums_of(Vector* x) {
  for (std::int64_t i = 0; i < kHalf; ++i) {
    x[i] = folded<kHalf>(x[2 * i], x[2 * i + 1]);
  }
  if constexpr (kHalf > 1) {
    return sums_of<kHalf / 2>(x);
  }
  return x[0];
}

// Of two vectors, lanes kHalf apart: those of `a` and `b` that take each other's place in a transposition.
template <std::int64_t kHalf>
MEGATRON_7B_INLINE void exchange(UintVector& a, UintVector& b) {
  UintVector first;
  UintVector second;
  for (std::int64_t i = 0; i < kLanes; ++i) {
    const bool upper = (i & kHalf) != 0;
    first[i] = static_cast<std::uint32_t>(upper ? kLanes + i - kHalf : i);
    second[i] = static_cast<std::uint32_t>(upper ? kLanes + i : i + kHalf);
  }
  const UintVector of_a = __builtin_shuffle(a, b, first);
  b = __builtin_shuffle(a, b, second);
  a = of_a;
}

// Makes columns of kLanes rows.
template <std::int64_t kHalf = kLanes / 2>
MEGATRON_7B_INLINE void transpose_vectors(UintVector* x) {
  for (std::int64_t i = 0; i < kLanes; ++i) {
    if ((i & kHalf) == 0) {
      exchange<kHalf>(x[i], x[i + kHalf]);
    }
  }
  if constexpr (kHalf > 1) {
    transpose_vectors<kHalf / 2>(x);
  }
}
#endif

MEGATRON_7B_INLINE float maximum_of(Vector x) {
  float lanes[kLanes];
  store(lanes, x);
  float largest = lanes[0];
  for (std::int64_t i = 1; i < kLanes; ++i) {
    largest = lanes[i] > largest ? lanes[i] : largest;
  }
  return largest;
}

// e^x to two units in the last place between -87 and 88, and the value at that border beyond; not a number stays one.
// x = n ln 2 + r with |r| <= ln 2 / 2; e^r by its Taylor polynomial, 2^n through the exponent bits.
MEGATRON_7B_INLINE Vector exponential(Vector x) {
  constexpr float kLog2e = 1.44269504088896341F;
  constexpr float kLn2High = 0.693359375F;  // few bits: n × this is exact
  constexpr float kLn2Low = -2.12194440e-4F;
  constexpr float kRound = 12582912.0F;  // 1.5 × 2^23: adding it leaves the nearest integer in the low bits
  const Vector bounded = minimum(maximum(x, broadcast(-87.0F)), broadcast(88.0F));
  const Vector shifted = bounded * kLog2e + kRound;
  const Vector n = shifted - kRound;
  const Vector r = (bounded - n * kLn2High) - n * kLn2Low;
  Vector p = broadcast(1.0F / 5040.0F);
  p = p * r + 1.0F / 720.0F;
  p = p * r + 1.0F / 120.0F;
  p = p * r + 1.0F / 24.0F;
  p = p * r + 1.0F / 6.0F;
  p = p * r + 0.5F;
  p = p * r + 1.0F;
  p = p * r + 1.0F;
  UintVector exponent;
  std::memcpy(&exponent, &shifted, sizeof exponent);
  exponent = (exponent << 23) + 0x3f800000u;  // the integer's low bits change the exponent of 1
  Vector power;
  std::memcpy(&power, &exponent, sizeof power);
  const IntVector ordered = x == x;
  return ordered ? p * power : x;
}

// 2^x for x <= 1, to two units in the last place from -126 on, and less than 2^-125 below; not a number stays one.
MEGATRON_7B_INLINE Vector power_of_two(Vector x) {
#if MEGATRON_7B_LANES == 16
  const Vector n = reinterpret_cast<Vector>(_mm512_maskz_roundscale_ps(kAllLanes, reinterpret_cast<__m512>(x), 0));
  const Vector r = x - n;
#else
  constexpr float kRound = 12582912.0F;  // as in `exponential`
  const Vector bounded = maximum(broadcast(-126.0F), x);
  const Vector shifted = bounded + kRound;
  const Vector r = bounded - (shifted - kRound);
#endif
  // 2^r = e^(r ln 2) by its Taylor polynomial, |r| <= 1/2: the next term is below 2^-25.
  Vector p = broadcast(1.54035304e-4F);
  p = p * r + 1.33335581e-3F;
  p = p * r + 9.61812911e-3F;
  p = p * r + 5.55041087e-2F;
  p = p * r + 2.40226507e-1F;
  p = p * r + 6.93147181e-1F;
  p = p * r + 1.0F;
#if MEGATRON_7B_LANES == 16
  return reinterpret_cast<Vector>(
      _mm512_maskz_scalef_ps(kAllLanes, reinterpret_cast<__m512>(p), reinterpret_cast<__m512>(n)));
#else
  UintVector exponent;
  std::memcpy(&exponent, &shifted, sizeof exponent);
  exponent = (exponent << 23) + 0x3f800000u;
  Vector power;
  std::memcpy(&power, &exponent, sizeof power);
  return p * power;
#endif
}

// Calls body(offset, count) for each whole or partial vector of a row.
template <class Whole, class Part>
MEGATRON_7B_INLINE void for_each_vector(std::int64_t width, Whole whole, Part part) {
  std::int64_t i = 0;
  for (; i + kLanes <= width; i += kLanes) {
    whole(i);
  }
  if (i < width) {
    part(i, width - i);
  }
}
