// Work of a transformer layer on a CPU: element-wise, each function one pass over memory, and of one token per text.
//
// Arrays are dense unless strides are given, rows × width; `T` is float or BFloat16, arithmetic is float. Rows are
// shared out over `threads` threads. A result depends neither on their number nor on where the arrays are in memory.
#pragma once

#include <cstdint>

namespace megatron_7b {

// The upper half of a float.
struct BFloat16 {
  std::uint16_t bits;
};

// Tensor of [positions, batch, heads, width], the last dense; strides in elements.
struct HeadStrides {
  std::int64_t position;
  std::int64_t batch;
  std::int64_t head;
};

struct HeadShape {
  std::int64_t positions;
  std::int64_t batch;
  std::int64_t heads;
  std::int64_t width;
};

// Heads of `width` channels at positions of texts, the channels dense; strides in elements.
template <class T>
struct HeadsAt {
  T* data;
  HeadStrides strides;
};

// Of `batch` texts: `queries` positions attend to `keys`, the last to the last. Equal shares of the heads share a
// group. Where it is causal, a query sees the newest `window` keys up to its own; each key is seen by some query.
struct AttentionShape {
  std::int64_t batch;
  std::int64_t heads;
  std::int64_t groups;
  std::int64_t queries;
  std::int64_t keys;
  std::int64_t width;
  std::int64_t window;
  bool causal;
};

// Heads of several texts, [rows, groups, …, width]; strides in elements.
template <class T>
struct HeadsOf {
  T* data;
  std::int64_t row;
  std::int64_t group;
};

// One query per head: `queries` heads of `width` channels share the keys of a group; `turned` channels are rotated.
struct DecodeShape {
  std::int64_t rows;
  std::int64_t groups;
  std::int64_t queries;
  std::int64_t width;
  std::int64_t turned;
};

constexpr std::int64_t kMaxWidth = 512;  // of a head in decode_attention

// One instruction set's versions.
template <class T>
struct Kernels {
  // y = x / rms(x) × weight; keeps 1 / rms(x) by row.
  void (*rms_norm)(const T* x, const T* weight, T* y, float* inverse_rms, std::int64_t rows, std::int64_t width,
                   float epsilon, int threads);
  // grad_weight [width] is overwritten.
  void (*rms_norm_backward)(const T* grad_y, const T* x, const T* weight, const float* inverse_rms, T* grad_x,
                            float* grad_weight, std::int64_t rows, std::int64_t width, int threads);
  // y = silu(gate) × up, where x holds gate and up side by side: [rows, 2 × width].
  void (*swiglu)(const T* x, T* y, std::int64_t rows, std::int64_t width, int threads);
  void (*swiglu_backward)(const T* grad_y, const T* x, T* grad_x, std::int64_t rows, std::int64_t width, int threads);
  // Turns channel pairs (i, i + turned / 2) by the angle whose cosine and sine are [positions, turned / 2]; the
  // channels from `turned` on are copied. `sign` -1 turns back.
  void (*rotate)(const T* x, HeadStrides x_strides, T* y, HeadStrides y_strides, HeadShape shape, const float* cosine,
                 const float* sine, std::int64_t turned, float sign, int threads);
  // In place: softmax over the first `num_true` of `width` columns, times the row's factor; the rest becomes zero.
  // Keeps the logarithm of the sum of exponentials by row.
  void (*softmax)(T* x, const float* factor, float* log_sum_exp, std::int64_t rows, std::int64_t width,
                  std::int64_t num_true, int threads);
  // total += x, of `count` elements.
  void (*accumulate)(const T* x, float* total, std::int64_t count, int threads);
  // y = x × weightᵀ + bias, of few rows: [rows, inputs], [outputs, inputs], [outputs] or nullptr, [rows, outputs]. A
  // row of y depends on its row of x alone.
  void (*product)(const T* x, const T* weight, const T* bias, T* y, std::int64_t rows, std::int64_t inputs,
                  std::int64_t outputs, int threads);
  // Turns queries and keys by the angles of their rows, [rows, turned / 2], puts keys and values into the cache at the
  // position of each row, and attends to all positions up to it. y is [rows, groups, queries, width], dense.
  void (*decode_attention)(HeadsOf<const T> query, HeadsOf<const T> key, HeadsOf<const T> value, HeadsOf<T> keys,
                           HeadsOf<T> values, T* y, const float* cosine, const float* sine,
                           const std::int64_t* positions, DecodeShape shape, float scale, int threads);
  // y = softmax(scale × query × keyᵀ) × value, [queries, batch, heads, width] and dense. Keeps the logarithm to base 2
  // of the sum of exponentials, [batch, heads, queries]. No matrix of queries × keys is stored. `scale` is positive.
  void (*attention)(HeadsAt<const T> query, HeadsAt<const T> key, HeadsAt<const T> value, T* y, float* log_sum,
                    AttentionShape shape, float scale, int threads);
  // The gradients are dense: [queries, batch, heads, width], and [keys, batch, groups, width].
  void (*attention_backward)(HeadsAt<const T> query, HeadsAt<const T> key, HeadsAt<const T> value, const T* y,
                             HeadsAt<const T> grad_y, const float* log_sum, T* grad_query, T* grad_key, T* grad_value,
                             AttentionShape shape, float scale, int threads);
};

// Names of the versions that this processor can run, best first, ended by nullptr.
const char* const* instruction_sets();

// The version of that name. Throws std::invalid_argument for one that is not in `instruction_sets`.
template <class T>
const Kernels<T>& kernels(const char* name);

}  // namespace megatron_7b
