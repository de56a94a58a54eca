// Products of blocks that fit into a cache, of numbers packed for them. Included as vector.h is.
//
// Everything is in words of 32 bits: a float, or where the processor multiplies them two BF16 numbers that are
// neighbours along the dimension that a product sums over. Scratch arrays are padded to whole vectors.

typedef std::uint32_t Word;

#ifdef MEGATRON_7B_DOT_BF16
template <class T>
constexpr std::int64_t kNumbersPerWord = sizeof(T) == 2 ? 2 : 1;
#else
template <class T>
constexpr std::int64_t kNumbersPerWord = 1;
#endif

constexpr std::int64_t round_up(std::int64_t count, std::int64_t multiple) {
  return (count + multiple - 1) / multiple * multiple;
}

MEGATRON_7B_INLINE UintVector load_words(const Word* from) {
  UintVector x;
  std::memcpy(&x, from, sizeof x);
  return x;
}

MEGATRON_7B_INLINE void store_words(Word* to, UintVector x) { std::memcpy(to, &x, sizeof x); }

MEGATRON_7B_INLINE UintVector same_words(const Word* from) {
  Word x;
  std::memcpy(&x, from, sizeof x);
  return UintVector{} + x;
}

template <class T>
MEGATRON_7B_INLINE Vector plus_words(Vector sum, UintVector a, UintVector b) {
#ifdef MEGATRON_7B_DOT_BF16
  if constexpr (kNumbersPerWord<T> == 2) {
    return reinterpret_cast<Vector>(
        _mm512_dpbf16_ps(reinterpret_cast<__m512>(sum), reinterpret_cast<__m512bh>(a), reinterpret_cast<__m512bh>(b)));
  }
#endif
  return sum + reinterpret_cast<Vector>(a) * reinterpret_cast<Vector>(b);
}

// What becomes of the numbers that are in the result already.
enum class Sum { kNew, kAdded, kScaled };

// A view of packed words or of float results: `row` elements from one row to the next.
template <class E>
struct Block {
  E* data;
  std::int64_t row;

  Block<E> at(std::int64_t row_number, std::int64_t column) const { return {data + row_number * row + column, row}; }
};

template <class T, Sum kSum, std::size_t kRows, std::size_t kColumns>
MEGATRON_7B_INLINE void multiply_tile(Block<const Word> a, Block<const Word> b, Block<float> c, std::int64_t depth,
                                      const float* scale) {
  const auto at = [](std::size_t number) { return static_cast<std::int64_t>(number); };
  Vector sums[kRows * kColumns];
  for (std::size_t row = 0; row < kRows; ++row) {
    for (std::size_t column = 0; column < kColumns; ++column) {
      Vector& sum = sums[row * kColumns + column];
      if constexpr (kSum == Sum::kNew) {
        sum = Vector{};
      } else {
        sum = load(c.data + at(row) * c.row + at(column) * kLanes);
        if constexpr (kSum == Sum::kScaled) {
          sum *= load(scale + at(column) * kLanes);
        }
      }
    }
  }
  for (std::int64_t k = 0; k < depth; ++k) {
    UintVector from_b[kColumns];
    for (std::size_t column = 0; column < kColumns; ++column) {
      from_b[column] = load_words(b.data + k * b.row + at(column) * kLanes);
    }
    for (std::size_t row = 0; row < kRows; ++row) {
      const UintVector from_a = same_words(a.data + at(row) * a.row + k);
      for (std::size_t column = 0; column < kColumns; ++column) {
        sums[row * kColumns + column] = plus_words<T>(sums[row * kColumns + column], from_a, from_b[column]);
      }
    }
  }
  for (std::size_t row = 0; row < kRows; ++row) {
    for (std::size_t column = 0; column < kColumns; ++column) {
      store(c.data + at(row) * c.row + at(column) * kLanes, sums[row * kColumns + column]);
    }
  }
}

template <class T, Sum kSum, std::size_t kColumns>
void multiply_columns(Block<const Word> a, Block<const Word> b, Block<float> c, std::int64_t rows, std::int64_t depth,
                      const float* scale) {
  std::int64_t row = 0;
  for (; row + 6 <= rows; row += 6) {
    multiply_tile<T, kSum, 6, kColumns>(a.at(row, 0), b, c.at(row, 0), depth, scale);
  }
  for (; row + 2 <= rows; row += 2) {
    multiply_tile<T, kSum, 2, kColumns>(a.at(row, 0), b, c.at(row, 0), depth, scale);
  }
  if (row < rows) {
    multiply_tile<T, kSum, 1, kColumns>(a.at(row, 0), b, c.at(row, 0), depth, scale);
  }
}

// c = a × b, or added to c or to c with its columns scaled: [rows, depth words], [depth words, columns], [rows,
// columns], of whole vectors of columns.
template <class T, Sum kSum>
void multiply(Block<const Word> a, Block<const Word> b, Block<float> c, std::int64_t rows, std::int64_t columns,
              std::int64_t depth, const float* scale = nullptr) {
  constexpr std::int64_t kMost = kLanes > 8 ? 4 : 2;  // vectors of columns that there are registers for
  for (std::int64_t left = columns / kLanes; left > 0;) {
    std::int64_t taken = std::min(left, kMost);
    if constexpr (kMost == 4) {
      taken = left == 5 ? 3 : taken;
      if (taken == 4) {
        multiply_columns<T, kSum, 4>(a, b, c, rows, depth, scale);
      } else if (taken == 3) {
        multiply_columns<T, kSum, 3>(a, b, c, rows, depth, scale);
      }
    }
    if (taken == 2) {
      multiply_columns<T, kSum, 2>(a, b, c, rows, depth, scale);
    } else if (taken == 1) {
      multiply_columns<T, kSum, 1>(a, b, c, rows, depth, scale);
    }
    b = b.at(0, taken * kLanes);
    c = c.at(0, taken * kLanes);
    scale = scale == nullptr ? nullptr : scale + taken * kLanes;
    left -= taken;
  }
}

// A square of kLanes × kLanes words, its rows become columns.
MEGATRON_7B_INLINE void transpose_square(Block<const Word> from, Block<Word> to) {
#ifdef MEGATRON_7B_SUMS_OF
  UintVector x[kLanes];
  for (std::int64_t i = 0; i < kLanes; ++i) {
    x[i] = load_words(from.data + i * from.row);
  }
  transpose_vectors(x);
  for (std::int64_t i = 0; i < kLanes; ++i) {
    store_words(to.data + i * to.row, x[i]);
  }
#else
  for (std::int64_t i = 0; i < kLanes; ++i) {
    for (std::int64_t k = 0; k < kLanes; ++k) {
      to.data[k * to.row + i] = from.data[i * from.row + k];
    }
  }
#endif
}

// Both sizes are multiples of kLanes.
MEGATRON_7B_INLINE void transpose(Block<const Word> from, Block<Word> to, std::int64_t rows, std::int64_t columns) {
  for (std::int64_t row = 0; row < rows; row += kLanes) {
    for (std::int64_t column = 0; column < columns; column += kLanes) {
      transpose_square(from.at(row, column), to.at(column, row));
    }
  }
}

// The bits of two vectors of numbers as one of words, the first below the second.
MEGATRON_7B_INLINE UintVector paired(HalfVector low, HalfVector high) { return widened(low) | (widened(high) << 16); }

MEGATRON_7B_INLINE HalfVector load_halves(const BFloat16* from, std::int64_t count = kLanes) {
  HalfVector x{};
  std::memcpy(&x, from, static_cast<std::size_t>(count) * sizeof(BFloat16));
  return x;
}

// Memory of one thread, every part of it at the start of a cache line.
class Scratch {
 public:
  explicit Scratch(std::int64_t words)
      : start_(static_cast<Word*>(::operator new(static_cast<std::size_t>(words) * sizeof(Word), kLine))),
        next_(start_) {}
  Scratch(const Scratch&) = delete;
  Scratch& operator=(const Scratch&) = delete;
  ~Scratch() { ::operator delete(start_, kLine); }

  static constexpr std::int64_t room(std::int64_t words) { return round_up(words, 16); }

  Word* take(std::int64_t words) {
    Word* const part = next_;
    next_ += room(words);
    return part;
  }
  float* take_floats(std::int64_t count) { return reinterpret_cast<float*>(take(count)); }

 private:
  static constexpr std::align_val_t kLine{64};
  Word* start_;
  Word* next_;
};

// Rows of `width` numbers, words along the width; padded with zeros to `padded` words a row.
template <class T>
MEGATRON_7B_INLINE void pack_rows(const T* from, std::int64_t stride, std::int64_t rows, std::int64_t width, Word* to,
                                  std::int64_t padded) {
  for (std::int64_t row = 0; row < rows; ++row, from += stride, to += padded) {
    std::memset(to + width / kNumbersPerWord<T>, 0,
                static_cast<std::size_t>(padded - width / kNumbersPerWord<T>) * sizeof(Word));
    if constexpr (sizeof(T) * kNumbersPerWord<T> == sizeof(Word)) {
      std::memcpy(to, from, static_cast<std::size_t>(width) * sizeof(T));
    } else {
      float* const numbers = reinterpret_cast<float*>(to);
      for_each_vector(
          width, [&](std::int64_t i) { store(numbers + i, load(from + i)); },
          [&](std::int64_t i, std::int64_t n) { store(numbers + i, load_part(from + i, n)); });
    }
  }
}

// The same, but words along the rows: [rows / numbers per word, padded], where `padded` is a multiple of kLanes.
template <class T>
MEGATRON_7B_INLINE void pack_pairs_of_rows(const T* from, std::int64_t stride, std::int64_t rows, std::int64_t width,
                                           Word* to, std::int64_t padded) {
  if constexpr (kNumbersPerWord<T> == 1) {
    pack_rows(from, stride, rows, width, to, padded);
  } else {
    for (std::int64_t row = 0; row < rows; row += 2, from += 2 * stride, to += padded) {
      const bool last = row + 1 == rows;
      for_each_vector(
          width,
          [&](std::int64_t i) {
            store_words(to + i, paired(load_halves(from + i), last ? HalfVector{} : load_halves(from + stride + i)));
          },
          [&](std::int64_t i, std::int64_t n) {
            store_words(to + i,
                        paired(load_halves(from + i, n), last ? HalfVector{} : load_halves(from + stride + i, n)));
          });
    }
  }
}
