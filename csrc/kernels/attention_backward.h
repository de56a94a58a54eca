// The gradients of attention, block by block, from scores that are computed again. Included as vector.h is.

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
