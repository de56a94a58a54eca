// One token of each text through a layer: products of few rows, and attention of one query per head over a cache.
// Included as vector.h is.

#ifdef MEGATRON_7B_DOT_BF16
// The processor multiplies pairs of BF16 numbers: they stay as they are.
typedef BFloat16 Factor;
typedef __m512bh Factors;
constexpr std::int64_t kFactors = 2 * kLanes;

MEGATRON_7B_INLINE Factors load_factors(const BFloat16* from) {
  Factors x;
  std::memcpy(&x, from, sizeof x);
  return x;
}

MEGATRON_7B_INLINE Factors load_factors(const BFloat16* from, std::int64_t count) {
  BFloat16 buffer[kFactors] = {};
  std::memcpy(buffer, from, static_cast<std::size_t>(count) * sizeof(BFloat16));
  return load_factors(buffer);
}

MEGATRON_7B_INLINE Vector plus_product(Vector sum, Factors a, Factors b) {
  return reinterpret_cast<Vector>(_mm512_dpbf16_ps(reinterpret_cast<__m512>(sum), a, b));
}
#else
typedef float Factor;
#endif

MEGATRON_7B_INLINE Vector load_factors(const float* from) { return load(from); }
MEGATRON_7B_INLINE Vector load_factors(const float* from, std::int64_t count) { return load_part(from, count); }
MEGATRON_7B_INLINE Vector plus_product(Vector sum, Vector a, Vector b) { return sum + a * b; }
#ifndef MEGATRON_7B_DOT_BF16
MEGATRON_7B_INLINE Vector load_factors(const BFloat16* from) { return load(from); }
MEGATRON_7B_INLINE Vector load_factors(const BFloat16* from, std::int64_t count) { return load_part(from, count); }
#endif

// Rows of x times `kOutputs` rows of the weight. Every output is one sum in one order, whatever `kRows` is: what comes
// out for a text does not depend on those beside it.
template <std::size_t kRows, std::size_t kOutputs, class F, class T>
MEGATRON_7B_INLINE void product_block(const F* x, const T* weight, const T* bias, T* y, std::int64_t inputs,
                                      std::int64_t outputs) {
  const auto at = [](std::size_t number) { return static_cast<std::int64_t>(number); };
  constexpr std::int64_t kStep = static_cast<std::int64_t>(sizeof(load_factors(x)) / sizeof(F));
  Vector sums[kRows * kOutputs] = {};
  std::int64_t i = 0;
  const auto add = [&](auto load_from) {
    decltype(load_from(x)) v[kRows];
    for (std::size_t row = 0; row < kRows; ++row) {
      v[row] = load_from(x + at(row) * inputs);
    }
    for (std::size_t o = 0; o < kOutputs; ++o) {
      const auto w = load_from(weight + at(o) * inputs);
      __builtin_prefetch(weight + at(o + 2 * kOutputs) * inputs + i);  // two blocks ahead; harmless beyond the end
      for (std::size_t row = 0; row < kRows; ++row) {
        sums[row * kOutputs + o] = plus_product(sums[row * kOutputs + o], w, v[row]);
      }
    }
  };
  for (; i + kStep <= inputs; i += kStep) {
    add([=](const auto* from) { return load_factors(from + i); });
  }
  if (i < inputs) {
    add([=](const auto* from) { return load_factors(from + i, inputs - i); });
  }
#ifdef MEGATRON_7B_SUMS_OF
  constexpr auto kWidth = static_cast<std::size_t>(kLanes);
  if constexpr (kRows * kOutputs % kWidth == 0 && kOutputs <= kWidth) {
    // Sums are taken, and rounded, a vector at a time.
    Vector offsets{};
    if (bias != nullptr) {
      float of_outputs[kWidth];
      for (std::size_t n = 0; n < kWidth; ++n) {
        of_outputs[n] = to_float(bias[n % kOutputs]);
      }
      offsets = load(of_outputs);
    }
    for (std::size_t first = 0; first < kRows * kOutputs; first += kWidth) {
      T totals[kWidth];
      store(totals, sums_of(sums + first) + offsets);
      for (std::size_t n = 0; n < kWidth; n += kOutputs) {
        std::memcpy(y + at((first + n) / kOutputs) * outputs, totals + n, kOutputs * sizeof(T));
      }
    }
    return;
  }
#endif
  for (std::size_t row = 0; row < kRows; ++row) {
    for (std::size_t o = 0; o < kOutputs; ++o) {
      const float sum = sum_of(sums[row * kOutputs + o]) + (bias != nullptr ? to_float(bias[o]) : 0.0F);
      y[at(row) * outputs + at(o)] = from_float<T>(sum);
    }
  }
}

template <std::size_t kRows, class F, class T>
MEGATRON_7B_INLINE void product_rows(const F* x, const T* weight, const T* bias, T* y, std::int64_t first,
                                     std::int64_t last, std::int64_t inputs, std::int64_t outputs) {
  constexpr std::size_t kSums = kLanes > 8 ? 16 : 8;  // as many as there are registers for, beside the factors
  constexpr std::size_t kOutputs = kSums / kRows;
  constexpr auto kStep = static_cast<std::int64_t>(kOutputs);
  std::int64_t o = first;
  for (; o + kStep <= last; o += kStep) {
    product_block<kRows, kOutputs>(x, weight + o * inputs, bias != nullptr ? bias + o : nullptr, y + o, inputs,
                                   outputs);
  }
  for (; o < last; ++o) {
    product_block<kRows, 1>(x, weight + o * inputs, bias != nullptr ? bias + o : nullptr, y + o, inputs, outputs);
  }
}

// What `product` multiplies: BF16 numbers if the processor does, and floats that they become otherwise.
inline const float* factors_of(const float* x, std::int64_t, std::vector<Factor>&) { return x; }

inline const Factor* factors_of(const BFloat16* x, std::int64_t count, std::vector<Factor>& converted) {
#ifdef MEGATRON_7B_DOT_BF16
  (void)count;
  (void)converted;
  return x;
#else
  converted.resize(static_cast<std::size_t>(count));
  for (std::int64_t i = 0; i < count; ++i) {
    converted[static_cast<std::size_t>(i)] = to_float(x[i]);
  }
  return converted.data();
#endif
}

template <class T>
void product(const T* x, const T* weight, const T* bias, T* y, std::int64_t rows, std::int64_t inputs,
             std::int64_t outputs, int threads) {
  std::vector<Factor> converted;
  const auto* const factors = factors_of(x, rows * inputs, converted);
  constexpr std::int64_t kBlock = 32;  // outputs that a thread computes for all rows while their weights are in a cache
  const std::int64_t blocks = (outputs + kBlock - 1) / kBlock;
  for_each_row(blocks, kBlock * inputs, threads, [=](std::int64_t block) {
    const std::int64_t first = block * kBlock;
    const std::int64_t last = std::min(outputs, first + kBlock);
    const auto* from = factors;
    T* to = y;
    std::int64_t left = rows;
    const auto advance = [&](std::int64_t count) {
      from += count * inputs;
      to += count * outputs;
      left -= count;
    };
    for (; left >= 8; advance(8)) {
      product_rows<8>(from, weight, bias, to, first, last, inputs, outputs);
    }
    for (; left >= 4; advance(4)) {
      product_rows<4>(from, weight, bias, to, first, last, inputs, outputs);
    }
    for (; left >= 2; advance(2)) {
      product_rows<2>(from, weight, bias, to, first, last, inputs, outputs);
    }
    for (; left >= 1; advance(1)) {
      product_rows<1>(from, weight, bias, to, first, last, inputs, outputs);
    }
  });
}

template <class A, class B>
MEGATRON_7B_INLINE float dot(const A* a, const B* b, std::int64_t width) {
  Vector sums{};
  for_each_vector(
      width, [&](std::int64_t i) { sums += load(a + i) * load(b + i); },
      [&](std::int64_t i, std::int64_t n) { sums += load_part(a + i, n) * load_part(b + i, n); });
  return sum_of(sums);
}

// Replaces scores by their softmax.
MEGATRON_7B_INLINE void weigh(float* scores, std::int64_t count) {
  float largest = scores[0];
  for (std::int64_t i = 1; i < count; ++i) {
    largest = scores[i] > largest ? scores[i] : largest;
  }
  double sum = 0.0;
  for_each_vector(
      count,
      [&](std::int64_t i) {
        const Vector e = exponential(load(scores + i) - largest);
        store(scores + i, e);
        sum += static_cast<double>(sum_of(e));
      },
      [&](std::int64_t i, std::int64_t n) {
        store_part(scores + i, exponential(load_part(scores + i, n) - largest), n);
        for (std::int64_t k = i; k < i + n; ++k) {
          sum += static_cast<double>(scores[k]);
        }
      });
  const auto scale = static_cast<float>(1.0 / sum);
  for_each_vector(
      count, [&](std::int64_t i) { store(scores + i, load(scores + i) * scale); },
      [&](std::int64_t i, std::int64_t n) { store_part(scores + i, load_part(scores + i, n) * scale, n); });
}

// The queries of one text and group: stores its key and value, then attends to all that are there.
template <class T>
MEGATRON_7B_INLINE void attend_group(const T* query, const T* key, const T* value, T* keys, T* values, T* y,
                                     const float* cosine, const float* sine, std::int64_t position,
                                     const DecodeShape& shape, float scale, float* scratch) {
  const std::int64_t d = shape.width;
  const std::int64_t half = shape.turned / 2;
  T* const new_key = keys + position * d;
  if (half > 0) {
    rotate_head(key, new_key, cosine, sine, half, 1.0F);
  }
  std::memcpy(new_key + shape.turned, key + shape.turned, static_cast<std::size_t>(d - shape.turned) * sizeof(T));
  std::memcpy(values + position * d, value, static_cast<std::size_t>(d) * sizeof(T));
  const std::int64_t count = position + 1;
  float* const turned = scratch;  // one query
  float* const scores = scratch + d;
  for (std::int64_t head = 0; head < shape.queries; ++head) {
    const T* const q = query + head * d;
    T rotated[kMaxWidth];
    if (half > 0) {
      rotate_head(q, rotated, cosine, sine, half, 1.0F);  // rounded to T, as between separate operators
    }
    std::memcpy(rotated + shape.turned, q + shape.turned, static_cast<std::size_t>(d - shape.turned) * sizeof(T));
    for (std::int64_t i = 0; i < d; ++i) {
      turned[i] = to_float(rotated[i]) * scale;
    }
    for (std::int64_t p = 0; p < count; ++p) {
      scores[p] = dot(turned, keys + p * d, d);
    }
    weigh(scores, count);
    T* const out = y + head * d;
    for_each_vector(
        d,
        [&](std::int64_t i) {
          Vector sum{};
          for (std::int64_t p = 0; p < count; ++p) {
            sum += load(values + p * d + i) * scores[p];
          }
          store(out + i, sum);
        },
        [&](std::int64_t i, std::int64_t n) {
          Vector sum{};
          for (std::int64_t p = 0; p < count; ++p) {
            sum += load_part(values + p * d + i, n) * scores[p];
          }
          store_part(out + i, sum, n);
        });
  }
}

template <class T>
void decode_attention(HeadsOf<const T> query, HeadsOf<const T> key, HeadsOf<const T> value, HeadsOf<T> keys,
                      HeadsOf<T> values, T* y, const float* cosine, const float* sine, const std::int64_t* positions,
                      DecodeShape shape, float scale, int threads) {
  std::int64_t longest = 0;
  for (std::int64_t row = 0; row < shape.rows; ++row) {
    longest = std::max(longest, positions[row] + 1);
  }
  const std::int64_t tasks = shape.rows * shape.groups;
  const std::int64_t half = shape.turned / 2;
  for_each_row(tasks, longest * shape.width * shape.queries, threads, [=](std::int64_t task) {
    const std::int64_t row = task / shape.groups;
    const std::int64_t group = task % shape.groups;
    const auto part = [=](const auto& heads) { return heads.data + row * heads.row + group * heads.group; };
    std::vector<float> scratch(static_cast<std::size_t>(shape.width + longest));
    attend_group(part(query), part(key), part(value), part(keys), part(values),
                 y + (row * shape.groups + group) * shape.queries * shape.width, cosine + row * half, sine + row * half,
                 positions[row], shape, scale, scratch.data());
  });
}
