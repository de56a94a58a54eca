// Attention of many queries to many keys, and its gradients, block by block. Included as vector.h is.
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

// The softmax of a block of queries so far; every number is of one query.
struct RunningSoftmax {
  float largest[kBlock];  // score
  float sum[kBlock];      // of powers of two of the scores less the largest, times `factor`
  float shrunk[kBlock];   // what the last block of keys made of the earlier weights
};

// Makes weights of a block of scores: words along the keys, [keys / numbers per word, kBlock].
template <class T, bool kMasked>
MEGATRON_7B_INLINE void weigh_block(const float* scores, const Pair& pair, float factor, bool first,
                                    RunningSoftmax& softmax, Word* weights) {
  constexpr float kNothing = -std::numeric_limits<float>::infinity();
  for (std::int64_t i = 0; i < pair.columns(); i += kLanes) {
    const auto score = [&](std::int64_t key) {
      const Vector x = load(scores + key * kBlock + i);
      return kMasked ? (sees(i, key, pair) ? x : broadcast(kNothing)) : x;
    };
    const Vector before = first ? broadcast(kNothing) : load(softmax.largest + i);
    Vector largest = before;
    Vector other = before;
    for (std::int64_t key = 0; key < pair.keys; key += 2) {
      largest = maximum(score(key), largest);
      other = maximum(score(std::min(key + 1, pair.keys - 1)), other);
    }
    largest = maximum(largest, other);
    store(softmax.largest + i, largest);
    const Vector shift = largest * factor;
    Vector sum{};
    const auto weight = [&](std::int64_t key) {
      const Vector x = power_of_two(load(scores + key * kBlock + i) * factor - shift);
      return kMasked ? (sees(i, key, pair) ? x : Vector{}) : x;
    };
    for (std::int64_t key = 0; key < pair.keys; key += 2) {
      const Vector low = weight(key);
      const Vector high = key + 1 < pair.keys ? weight(key + 1) : Vector{};
      sum += low + high;
      store_pair<T>(weights + key / kNumbersPerWord<T> * kBlock + i, low, high, kBlock);
    }
    if (first) {
      store(softmax.sum + i, sum);
    } else {
      // A query whose window begins behind the block before has seen nothing yet: infinitely less.
      const Vector shrunk = power_of_two(maximum(broadcast(-200.0F), before * factor - shift));
      store(softmax.shrunk + i, shrunk);
      store(softmax.sum + i, load(softmax.sum + i) * shrunk + sum);
    }
  }
}

template <class T>
void attention(HeadsAt<const T> query, HeadsAt<const T> key, HeadsAt<const T> value, T* y, float* log_sum,
               AttentionShape shape, float scale, int threads) {
  const HeadSizes<T> sizes{shape.width};
  const std::int64_t query_blocks = blocks_of(shape.queries);
  const std::int64_t key_blocks = blocks_of(shape.keys);
  const std::int64_t values_room = sizes.columns * kBlockWords<T>;
  const std::int64_t all_blocks = shape.batch * shape.groups * key_blocks;
  Scratch packed(all_blocks * (sizes.rows_room() + values_room));
  Word* const keys = packed.take(all_blocks * sizes.rows_room());
  Word* const values = packed.take(all_blocks * values_room);
  for_each_task(all_blocks, threads, [&](std::int64_t task) {
    const std::int64_t first = task % key_blocks * kBlock;
    const std::int64_t group = task / key_blocks % shape.groups;
    const std::int64_t text = task / key_blocks / shape.groups;
    const std::int64_t count = std::min(kBlock, shape.keys - first);
    pack_rows(head_at(key, first, text, group), key.strides.position, count, shape.width,
              keys + task * sizes.rows_room(), sizes.row);
    Scratch pairs(values_room);
    pack_channels(head_at(value, first, text, group), value.strides.position, count, sizes, pairs.take(values_room),
                  values + task * values_room);
  });
  const std::int64_t all_heads = shape.batch * shape.heads;
  const float factor = scale * 1.44269504088896341F;  // the scores' powers are of two
  for_each_task(all_heads * query_blocks, threads, [&](std::int64_t task) {
    const std::int64_t block = query_blocks - 1 - task / all_heads;  // those with the most keys first
    const std::int64_t head = task % all_heads % shape.heads;
    const std::int64_t text = task % all_heads / shape.heads;
    const std::int64_t first = block * kBlock;
    const std::int64_t group = head / (shape.heads / shape.groups);
    const std::int64_t first_key_block = (text * shape.groups + group) * key_blocks;
    const std::int64_t room = std::max(sizes.rows_room(), sizes.columns_room());
    Scratch scratch(2 * room + sizes.columns_room() + 2 * kBlock * kBlock);
    Word* const rows = scratch.take(room);
    Word* const queries = scratch.take(room);
    float* const sums = scratch.take_floats(sizes.columns_room());
    float* const scores = scratch.take_floats(kBlock * kBlock);
    Word* const weights = scratch.take(kBlock * kBlock);
    RunningSoftmax softmax;
    const std::int64_t count = std::min(kBlock, shape.queries - first);
    pack_columns(head_at(query, first, text, head), query.strides.position, count, sizes, rows, queries);
    const BlockRange visible = visible_key_blocks(shape, block);
    for (std::int64_t key_block = visible.begin; key_block < visible.end; ++key_block) {
      const Pair pair(shape, block, key_block);
      const bool is_first = key_block == visible.begin;
      const std::int64_t at = first_key_block + key_block;
      multiply<T, Sum::kNew>({keys + at * sizes.rows_room(), sizes.row}, {queries, kBlock}, {scores, kBlock}, pair.keys,
                             pair.columns(), sizes.words);
      if (pair.masked) {
        weigh_block<T, true>(scores, pair, factor, is_first, softmax, weights);
      } else {
        weigh_block<T, false>(scores, pair, factor, is_first, softmax, weights);
      }
      const Block<const Word> channels{values + at * values_room, kBlockWords<T>};
      const std::int64_t depth = (pair.keys + kNumbersPerWord<T> - 1) / kNumbersPerWord<T>;
      if (is_first) {
        multiply<T, Sum::kNew>(channels, {weights, kBlock}, {sums, kBlock}, shape.width, pair.columns(), depth);
      } else {
        multiply<T, Sum::kScaled>(channels, {weights, kBlock}, {sums, kBlock}, shape.width, pair.columns(), depth,
                                  softmax.shrunk);
      }
    }
    float* const logs = log_sum + (text * shape.heads + head) * shape.queries + first;
    for (std::int64_t i = 0; i < count; ++i) {
      logs[i] = softmax.largest[i] * factor + std::log2(softmax.sum[i]);
    }
    for (std::int64_t i = 0; i < count; i += kLanes) {
      store(softmax.sum + i, 1.0F / load(softmax.sum + i));
    }
    T* const out = y + ((first * shape.batch + text) * shape.heads + head) * shape.width;
    unpack_columns(sums, softmax.sum, count, sizes, reinterpret_cast<float*>(queries), out, all_heads * shape.width);
  });
}

// Of one block of queries, packed for every product of the backward pass.
template <class T>
struct QueryBlock {
  Word* query_columns;  // [row, kBlock]
  Word* grad_columns;   // of the output's gradient
  Word* query_pairs;    // [kBlockWords, columns]
  Word* grad_pairs;
  float* grad_query;  // sums, [columns, kBlock]
  float* log_sum;     // [kBlock]
  float* along;       // the output's gradient times the output, [kBlock]

  static std::int64_t room(const HeadSizes<T>& sizes) {
    return 2 * sizes.rows_room() + 2 * sizes.columns * kBlockWords<T> + sizes.columns_room() + 2 * kBlock;
  }

  QueryBlock(const HeadSizes<T>& sizes, Word* memory)
      : query_columns(memory),
        grad_columns(query_columns + sizes.rows_room()),
        query_pairs(grad_columns + sizes.rows_room()),
        grad_pairs(query_pairs + sizes.columns * kBlockWords<T>),
        grad_query(reinterpret_cast<float*>(grad_pairs + sizes.columns * kBlockWords<T>)),
        log_sum(grad_query + sizes.columns_room()),
        along(log_sum + kBlock) {}
};

// The gradients by a block of scores, from the scores (overwritten) and the gradients by the weights.
struct ScoreGradients {
  Word* weights;     // words along the queries, [keys, kBlockWords]
  Word* of_scores;   // the same
  Word* along_keys;  // words along the keys, [keys / numbers per word, kBlock]
};

template <class T>
MEGATRON_7B_INLINE void store_row(Word* to, Vector x) {
  if constexpr (kNumbersPerWord<T> == 2) {
    const HalfVector halves = rounded(x);
    std::memcpy(to, &halves, sizeof halves);
  } else {
    store_words(to, reinterpret_cast<UintVector>(x));
  }
}

template <class T, bool kMasked>
MEGATRON_7B_INLINE void score_gradients(const float* scores, const float* by_weights, const Pair& pair, float factor,
                                        const float* log_sum, const float* along, ScoreGradients to) {
  for (std::int64_t i = 0; i < pair.columns(); i += kLanes) {
    const Vector logs = load(log_sum + i);
    const Vector of_output = load(along + i);
    const auto row = [&](std::int64_t key) {
      Vector weight = power_of_two(load(scores + key * kBlock + i) * factor - logs);
      if constexpr (kMasked) {
        weight = sees(i, key, pair) ? weight : Vector{};
      }
      const Vector gradient = weight * (load(by_weights + key * kBlock + i) - of_output);
      store_row<T>(to.weights + key * kBlockWords<T> + i / kNumbersPerWord<T>, weight);
      store_row<T>(to.of_scores + key * kBlockWords<T> + i / kNumbersPerWord<T>, gradient);
      return gradient;
    };
    for (std::int64_t key = 0; key < pair.keys; key += 2) {
      const Vector low = row(key);
      const Vector high = key + 1 < pair.keys ? row(key + 1) : Vector{};
      if constexpr (kNumbersPerWord<T> == 2) {
        store_pair<T>(to.along_keys + key / 2 * kBlock + i, low, high, kBlock);
      }
    }
  }
}

template <class T>
void pack_query_block(const HeadsAt<const T>& query, const T* y, std::int64_t y_position,
                      const HeadsAt<const T>& grad_y, const float* log_sum, std::int64_t first, std::int64_t text,
                      std::int64_t head, std::int64_t count, const HeadSizes<T>& sizes, Word* rows,
                      const QueryBlock<T>& to) {
  const T* const q = head_at(query, first, text, head);
  const T* const grad = head_at(grad_y, first, text, head);
  pack_columns(q, query.strides.position, count, sizes, rows, to.query_columns);
  pack_columns(grad, grad_y.strides.position, count, sizes, rows, to.grad_columns);
  pack_pairs_of_rows(q, query.strides.position, count, sizes.width, to.query_pairs, sizes.columns);
  pack_pairs_of_rows(grad, grad_y.strides.position, count, sizes.width, to.grad_pairs, sizes.columns);
  for (std::int64_t i = 0; i < kBlock; ++i) {
    to.log_sum[i] = i < count ? log_sum[i] : 0.0F;
    to.along[i] = i < count ? dot(y + i * y_position, grad + i * grad_y.strides.position, sizes.width) : 0.0F;
  }
}

template <class T>
void attention_backward(HeadsAt<const T> query, HeadsAt<const T> key, HeadsAt<const T> value, const T* y,
                        HeadsAt<const T> grad_y, const float* log_sum, T* grad_query, T* grad_key, T* grad_value,
                        AttentionShape shape, float scale, int threads) {
  const HeadSizes<T> sizes{shape.width};
  const std::int64_t query_blocks = blocks_of(shape.queries);
  const std::int64_t key_blocks = blocks_of(shape.keys);
  const std::int64_t all_heads = shape.batch * shape.heads;
  const std::int64_t per_group = shape.heads / shape.groups;
  const float factor = scale * 1.44269504088896341F;
  // Where heads share keys, each has sums of its own: which thread is first must not matter.
  const std::int64_t part_size = per_group == 1 ? 0 : all_heads * shape.keys * shape.width;
  Scratch parts(2 * Scratch::room(part_size));
  float* const key_parts = parts.take_floats(part_size);
  float* const value_parts = parts.take_floats(part_size);
  for_each_task(all_heads, threads, [&](std::int64_t task) {
    const std::int64_t text = task / shape.heads;
    const std::int64_t head = task % shape.heads;
    const std::int64_t group = head / per_group;
    const std::int64_t room = std::max(sizes.rows_room(), sizes.columns_room());
    const std::int64_t block_room = QueryBlock<T>::room(sizes);
    Scratch scratch(query_blocks * block_room + 6 * room + 5 * kBlock * kBlock);
    Word* const blocks = scratch.take(query_blocks * block_room);
    Word* const rows = scratch.take(room);
    Word* const keys = scratch.take(room);
    Word* const values = scratch.take(room);
    Word* const channels = scratch.take(room);
    float* const by_keys = scratch.take_floats(room);
    float* const by_values = scratch.take_floats(room);
    float* const scores = scratch.take_floats(kBlock * kBlock);
    float* const by_weights = scratch.take_floats(kBlock * kBlock);
    ScoreGradients gradients{scratch.take(kBlock * kBlock), scratch.take(kBlock * kBlock),
                             scratch.take(kBlock * kBlock)};
    if constexpr (kNumbersPerWord<T> == 1) {
      gradients.along_keys = gradients.of_scores;
    }
    const auto query_block = [&](std::int64_t number) { return QueryBlock<T>(sizes, blocks + number * block_room); };
    const std::int64_t y_position = all_heads * shape.width;
    for (std::int64_t number = 0; number < query_blocks; ++number) {
      const std::int64_t first = number * kBlock;
      pack_query_block(query, y + first * y_position + (text * shape.heads + head) * shape.width, y_position, grad_y,
                       log_sum + (text * shape.heads + head) * shape.queries + first, first, text, head,
                       std::min(kBlock, shape.queries - first), sizes, rows, query_block(number));
    }
    for (std::int64_t key_block = 0; key_block < key_blocks; ++key_block) {
      const std::int64_t first = key_block * kBlock;
      const std::int64_t count = std::min(kBlock, shape.keys - first);
      pack_rows(head_at(key, first, text, group), key.strides.position, count, shape.width, keys, sizes.row);
      pack_rows(head_at(value, first, text, group), value.strides.position, count, shape.width, values, sizes.row);
      pack_channels(head_at(key, first, text, group), key.strides.position, count, sizes, rows, channels);
      const BlockRange seeing = seeing_query_blocks(shape, key_block);
      for (std::int64_t number = seeing.begin; number < seeing.end; ++number) {
        const Pair pair(shape, number, key_block);
        const QueryBlock<T> block = query_block(number);
        multiply<T, Sum::kNew>({keys, sizes.row}, {block.query_columns, kBlock}, {scores, kBlock}, pair.keys,
                               pair.columns(), sizes.words);
        multiply<T, Sum::kNew>({values, sizes.row}, {block.grad_columns, kBlock}, {by_weights, kBlock}, pair.keys,
                               pair.columns(), sizes.words);
        if (pair.masked) {
          score_gradients<T, true>(scores, by_weights, pair, factor, block.log_sum, block.along, gradients);
        } else {
          score_gradients<T, false>(scores, by_weights, pair, factor, block.log_sum, block.along, gradients);
        }
        const std::int64_t query_words = (pair.queries + kNumbersPerWord<T> - 1) / kNumbersPerWord<T>;
        const std::int64_t key_words = (pair.keys + kNumbersPerWord<T> - 1) / kNumbersPerWord<T>;
        const auto add = [&](bool is_first, Block<const Word> a, Block<const Word> b, Block<float> c,
                             std::int64_t num_rows, std::int64_t num_columns, std::int64_t depth) {
          if (is_first) {
            multiply<T, Sum::kNew>(a, b, c, num_rows, num_columns, depth);
          } else {
            multiply<T, Sum::kAdded>(a, b, c, num_rows, num_columns, depth);
          }
        };
        add(number == seeing.begin, {gradients.weights, kBlockWords<T>}, {block.grad_pairs, sizes.columns},
            {by_values, sizes.columns}, pair.keys, sizes.columns, query_words);
        add(number == seeing.begin, {gradients.of_scores, kBlockWords<T>}, {block.query_pairs, sizes.columns},
            {by_keys, sizes.columns}, pair.keys, sizes.columns, query_words);
        add(key_block == visible_key_blocks(shape, number).begin, {channels, kBlockWords<T>},
            {gradients.along_keys, kBlock}, {block.grad_query, kBlock}, shape.width, pair.columns(), key_words);
      }
      const auto store_rows = [&](const float* sums, float by, auto* to, std::int64_t heads, std::int64_t number) {
        for (std::int64_t row = 0; row < count; ++row) {
          auto* const out = to + (((first + row) * shape.batch + text) * heads + number) * shape.width;
          const float* const in = sums + row * sizes.columns;
          for_each_vector(
              shape.width, [&](std::int64_t i) { store(out + i, load(in + i) * by); },
              [&](std::int64_t i, std::int64_t n) { store_part(out + i, load(in + i) * by, n); });
        }
      };
      if (per_group == 1) {
        store_rows(by_keys, scale, grad_key, shape.heads, head);
        store_rows(by_values, 1.0F, grad_value, shape.heads, head);
      } else {
        store_rows(by_keys, scale, key_parts, shape.heads, head);
        store_rows(by_values, 1.0F, value_parts, shape.heads, head);
      }
    }
    float* const scales = scores;
    for (std::int64_t i = 0; i < kBlock; ++i) {
      scales[i] = scale;
    }
    for (std::int64_t number = 0; number < query_blocks; ++number) {
      const std::int64_t first = number * kBlock;
      unpack_columns(query_block(number).grad_query, scales, std::min(kBlock, shape.queries - first), sizes, by_keys,
                     grad_query + ((first * shape.batch + text) * shape.heads + head) * shape.width, y_position);
    }
  });
  if (per_group == 1) {
    return;
  }
  for_each_row(shape.keys * shape.batch * shape.groups, per_group * shape.width, threads, [=](std::int64_t row) {
    const auto sum_heads = [=](const float* of_heads, T* to) {
      const float* const from = of_heads + row * per_group * shape.width;
      const auto sum = [=](auto load_from) {
        Vector total = load_from(from);
        for (std::int64_t head = 1; head < per_group; ++head) {
          total += load_from(from + head * shape.width);
        }
        return total;
      };
      T* const out = to + row * shape.width;
      for_each_vector(
          shape.width, [&](std::int64_t i) { store(out + i, sum([=](const float* x) { return load(x + i); })); },
          [&](std::int64_t i, std::int64_t n) {
            store_part(out + i, sum([=](const float* x) { return load_part(x + i, n); }), n);
          });
    };
    sum_heads(key_parts, grad_key);
    sum_heads(value_parts, grad_value);
  });
}
