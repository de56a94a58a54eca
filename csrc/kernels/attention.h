// Attention of many queries to many keys, block by block. Included as vector.h is.

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
