// All kernels for one instruction set; included as vector.h is.

// clang-format off: each needs those before it
#include "vector.h"
#include "rows.h"
#include "decode.h"
#include "tiles.h"
#include "attention_blocks.h"
#include "attention.h"
#include "attention_backward.h"
// clang-format on

template <class T>
constexpr Kernels<T> table() {
  return {&rms_norm<T>,          &rms_norm_backward<T>, &swiglu<T>,  &swiglu_backward<T>,  &rotate<T>,
          &softmax<T>,           &accumulate<T>,        &product<T>, &decode_attention<T>, &attention<T>,
          &attention_backward<T>};
}
