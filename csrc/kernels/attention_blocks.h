// What attention and its gradients share: blocks of queries beside blocks of keys, and heads packed for products.
// Included as vector.h is.
//
// Scores are kept as [keys, queries]: what belongs to one query is in one lane, so that its maximum and sum need
// nothing across lanes, and the weights are what the next product takes as they are.
//
// Source: FlashAttention (Dao et al., 2022), whose online softmax and recomputation this is.

constexpr std::int64_t kBlock = 64;  // queries, and keys, of a block

template <class T>
constexpr std::int64_t kBlockWords = kBlock / kNumbersPerWord<T>;

// Sizes of packed heads.
template <class T>
struct HeadSizes {
  std::int64_t width;
  std::int64_t words = (width + kNumbersPerWord<T> - 1) / kNumbersPerWord<T>;
  std::int64_t row = round_up(words, kLanes);      // words of a packed row
  std::int64_t columns = round_up(width, kLanes);  // a row's numbers, each in a lane

  std::int64_t rows_room() const { return kBlock * row; }
  std::int64_t columns_room() const { return columns * kBlock; }
};

inline std::int64_t blocks_of(std::int64_t count) { return (count + kBlock - 1) / kBlock; }

// One block of queries beside one of keys: their counts, and which queries see which keys.
struct Pair {
  std::int64_t queries;
  std::int64_t keys;
  std::int64_t ahead;  // a query sees the keys up to its own number plus this, both counted within their blocks
  std::uint32_t window;
  bool masked;

  Pair(const AttentionShape& shape, std::int64_t query_block, std::int64_t key_block)
      : queries(std::min(kBlock, shape.queries - query_block * kBlock)),
        keys(std::min(kBlock, shape.keys - key_block * kBlock)),
        ahead((query_block - key_block) * kBlock + shape.keys - shape.queries),
        window(static_cast<std::uint32_t>(std::min<std::int64_t>(shape.window, 1 << 30))),
        masked(shape.causal && (ahead < keys - 1 || queries + ahead > shape.window)) {}

  std::int64_t columns() const { return round_up(queries, kLanes); }
};

// Blocks from `begin` to before `end`.
struct BlockRange {
  std::int64_t begin;
  std::int64_t end;
};

// Key blocks that a block of queries sees.
inline BlockRange visible_key_blocks(const AttentionShape& shape, std::int64_t query_block) {
  if (!shape.causal) {
    return {0, blocks_of(shape.keys)};
  }
  const std::int64_t earlier = shape.keys - shape.queries;
  const std::int64_t oldest = query_block * kBlock + earlier - (shape.window - 1);
  const std::int64_t end = std::min(shape.queries, (query_block + 1) * kBlock) + earlier;
  return {std::max<std::int64_t>(oldest, 0) / kBlock, blocks_of(end)};
}

// Blocks of queries that see a block of keys.
inline BlockRange seeing_query_blocks(const AttentionShape& shape, std::int64_t key_block) {
  if (!shape.causal) {
    return {0, blocks_of(shape.queries)};
  }
  const std::int64_t earlier = shape.keys - shape.queries;
  const std::int64_t first = key_block * kBlock - earlier;
  const std::int64_t end = std::min(shape.keys, (key_block + 1) * kBlock) + (shape.window - 1) - earlier;
  return {std::max<std::int64_t>(first, 0) / kBlock, blocks_of(std::min(shape.queries, end))};
}

template <class T>
MEGATRON_7B_INLINE const T* head_at(const HeadsAt<const T>& heads, std::int64_t position, std::int64_t text,
                                    std::int64_t head) {
  return heads.data + position * heads.strides.position + text * heads.strides.batch + head * heads.strides.head;
}

// Which lanes' queries, the first of them `query`, see a key.
MEGATRON_7B_INLINE IntVector sees(std::int64_t query, std::int64_t key, const Pair& pair) {
  IntVector number;
  for (std::int64_t lane = 0; lane < kLanes; ++lane) {
    number[lane] = static_cast<std::int32_t>(lane);
  }
  // How far a query is beyond the first that sees the key; without sign, those before it are very far.
  const IntVector beyond = number - static_cast<std::int32_t>(key - pair.ahead - query);
  return reinterpret_cast<UintVector>(beyond) < pair.window;
}

template <class Body>
MEGATRON_7B_INLINE void for_each_task(std::int64_t tasks, int threads, Body body) {
#ifdef _OPENMP
#pragma omp parallel for schedule(dynamic) num_threads(threads) if (threads > 1 && tasks > 1)
#else
  (void)threads;
#endif
  for (std::int64_t task = 0; task < tasks; ++task) {
    body(task);
  }
}

// Rows of a block, words along the width, as columns: [row, kBlock]. `rows` is scratch; the spare columns are zero.
template <class T>
MEGATRON_7B_INLINE void pack_columns(const T* from, std::int64_t stride, std::int64_t count, const HeadSizes<T>& sizes,
                                     Word* rows, Word* to) {
  const std::int64_t padded = round_up(count, kLanes);
  pack_rows(from, stride, count, sizes.width, rows, sizes.row);
  std::memset(rows + count * sizes.row, 0, static_cast<std::size_t>((padded - count) * sizes.row) * sizeof(Word));
  transpose({rows, sizes.row}, {to, kBlock}, padded, sizes.row);
}

// Channels of a block of keys, words along the keys: [columns, kBlockWords]. `pairs` is scratch.
template <class T>
MEGATRON_7B_INLINE void pack_channels(const T* from, std::int64_t stride, std::int64_t count, const HeadSizes<T>& sizes,
                                      Word* pairs, Word* to) {
  pack_pairs_of_rows(from, stride, count, sizes.width, pairs, sizes.columns);
  const std::int64_t words = (count + kNumbersPerWord<T> - 1) / kNumbersPerWord<T>;
  transpose({pairs, sizes.columns}, {to, kBlockWords<T>}, round_up(words, kLanes), sizes.columns);
}

// The opposite: columns of sums times their factors, as rows of T.
template <class T>
MEGATRON_7B_INLINE void unpack_columns(float* sums, const float* factors, std::int64_t count, const HeadSizes<T>& sizes,
                                       float* rows, T* to, std::int64_t stride) {
  for (std::int64_t channel = 0; channel < sizes.width; ++channel) {
    for (std::int64_t i = 0; i < count; i += kLanes) {
      float* const x = sums + channel * kBlock + i;
      store(x, load(x) * load(factors + i));
    }
  }
  transpose({reinterpret_cast<const Word*>(sums), kBlock}, {reinterpret_cast<Word*>(rows), sizes.columns},
            sizes.columns, round_up(count, kLanes));
  for (std::int64_t row = 0; row < count; ++row, to += stride, rows += sizes.columns) {
    for_each_vector(
        sizes.width, [&](std::int64_t i) { store(to + i, load(rows + i)); },
        [&](std::int64_t i, std::int64_t n) { store_part(to + i, load(rows + i), n); });
  }
}

// Writes numbers of two keys as words along the keys; `second` is zero where there is none.
template <class T>
MEGATRON_7B_INLINE void store_pair(Word* to, Vector first, Vector second, std::int64_t row) {
  if constexpr (kNumbersPerWord<T> == 2) {
    store_words(to, paired(rounded(first), rounded(second)));
  } else {
    store_words(to, reinterpret_cast<UintVector>(first));
    store_words(to + row, reinterpret_cast<UintVector>(second));
  }
}
