// The element-wise kernels of megatron_7b/kernels.h for one instruction set; included as vector.h is.

// Below this many elements, waking other threads takes longer than the work.
constexpr std::int64_t kElementsWorthThreads = 32768;

template <class Body>
MEGATRON_7B_INLINE void for_each_row(std::int64_t rows, std::int64_t width, int threads, Body body) {
#ifdef _OPENMP
  if (threads > 1 && rows * width >= kElementsWorthThreads) {
#pragma omp parallel for schedule(static) num_threads(threads)
    for (std::int64_t row = 0; row < rows; ++row) {
      body(row);
    }
    return;
  }
#else
  (void)width;
  (void)threads;
#endif
  for (std::int64_t row = 0; row < rows; ++row) {
    body(row);
  }
}

template <class T>
void rms_norm(const T* x, const T* weight, T* y, float* inverse_rms, std::int64_t rows, std::int64_t width,
              float epsilon, int threads) {
  for_each_row(rows, width, threads, [=](std::int64_t row) {
    const T* in = x + row * width;
    T* out = y + row * width;
    Vector squares{};
    for_each_vector(
        width,
        [&](std::int64_t i) {
          const Vector v = load(in + i);
          squares += v * v;
        },
        [&](std::int64_t i, std::int64_t n) {
          const Vector v = load_part(in + i, n);
          squares += v * v;
        });
    const float scale = 1.0F / std::sqrt(sum_of(squares) / static_cast<float>(width) + epsilon);
    inverse_rms[row] = scale;
    for_each_vector(
        width, [&](std::int64_t i) { store(out + i, load(in + i) * scale * load(weight + i)); },
        [&](std::int64_t i, std::int64_t n) {
          store_part(out + i, load_part(in + i, n) * scale * load_part(weight + i, n), n);
        });
  });
}

// Gradients of one row; adds its part to grad_weight.
template <class T>
MEGATRON_7B_INLINE void rms_norm_backward_row(const T* grad_y, const T* x, const T* weight, float scale, T* grad_x,
                                              float* grad_weight, std::int64_t width) {
  Vector products{};
  for_each_vector(
      width, [&](std::int64_t i) { products += load(grad_y + i) * load(weight + i) * load(x + i); },
      [&](std::int64_t i, std::int64_t n) {
        products += load_part(grad_y + i, n) * load_part(weight + i, n) * load_part(x + i, n);
      });
  const float along = sum_of(products) * scale * scale / static_cast<float>(width);
  const auto grad = [&](Vector g, Vector w, Vector v) { return (g * w - v * along) * scale; };
  for_each_vector(
      width,
      [&](std::int64_t i) {
        const Vector g = load(grad_y + i);
        const Vector v = load(x + i);
        store(grad_weight + i, load(grad_weight + i) + g * v * scale);
        store(grad_x + i, grad(g, load(weight + i), v));
      },
      [&](std::int64_t i, std::int64_t n) {
        const Vector g = load_part(grad_y + i, n);
        const Vector v = load_part(x + i, n);
        store_part(grad_weight + i, load_part(grad_weight + i, n) + g * v * scale, n);
        store_part(grad_x + i, grad(g, load_part(weight + i, n), v), n);
      });
}

template <class T>
void rms_norm_backward(const T* grad_y, const T* x, const T* weight, const float* inverse_rms, T* grad_x,
                       float* grad_weight, std::int64_t rows, std::int64_t width, int threads) {
  // As many partial sums as the rows ask for, not the threads: the order of the additions is always the same.
  const std::int64_t blocks = std::min<std::int64_t>(64, std::max<std::int64_t>(1, rows / 32));
  std::vector<float> sums(static_cast<std::size_t>(blocks * width));
  float* const first_sum = sums.data();
  for_each_row(blocks, rows * width / blocks, threads, [=](std::int64_t block) {
    for (std::int64_t row = rows * block / blocks; row < rows * (block + 1) / blocks; ++row) {
      rms_norm_backward_row(grad_y + row * width, x + row * width, weight, inverse_rms[row], grad_x + row * width,
                            first_sum + block * width, width);
    }
  });
  for (std::int64_t i = 0; i < width; ++i) {
    float sum = 0.0F;
    for (std::int64_t block = 0; block < blocks; ++block) {
      sum += first_sum[block * width + i];
    }
    grad_weight[i] = sum;
  }
}

MEGATRON_7B_INLINE Vector sigmoid(Vector x) { return 1.0F / (1.0F + exponential(-x)); }

template <class T>
void swiglu(const T* x, T* y, std::int64_t rows, std::int64_t width, int threads) {
  const auto gated = [](Vector gate, Vector up) { return gate * sigmoid(gate) * up; };
  for_each_row(rows, width, threads, [=](std::int64_t row) {
    const T* gate = x + row * 2 * width;
    const T* up = gate + width;
    T* out = y + row * width;
    for_each_vector(
        width, [&](std::int64_t i) { store(out + i, gated(load(gate + i), load(up + i))); },
        [&](std::int64_t i, std::int64_t n) {
          store_part(out + i, gated(load_part(gate + i, n), load_part(up + i, n)), n);
        });
  });
}

template <class T>
void swiglu_backward(const T* grad_y, const T* x, T* grad_x, std::int64_t rows, std::int64_t width, int threads) {
  for_each_row(rows, width, threads, [=](std::int64_t row) {
    const T* gate = x + row * 2 * width;
    const T* up = gate + width;
    const T* grad = grad_y + row * width;
    T* grad_gate = grad_x + row * 2 * width;
    T* grad_up = grad_gate + width;
    const auto gradients = [](Vector g, Vector a, Vector b, Vector& of_gate, Vector& of_up) {
      const Vector s = sigmoid(a);
      of_up = g * a * s;
      of_gate = g * b * s * (1.0F + a * (1.0F - s));
    };
    Vector of_gate;
    Vector of_up;
    for_each_vector(
        width,
        [&](std::int64_t i) {
          gradients(load(grad + i), load(gate + i), load(up + i), of_gate, of_up);
          store(grad_gate + i, of_gate);
          store(grad_up + i, of_up);
        },
        [&](std::int64_t i, std::int64_t n) {
          gradients(load_part(grad + i, n), load_part(gate + i, n), load_part(up + i, n), of_gate, of_up);
          store_part(grad_gate + i, of_gate, n);
          store_part(grad_up + i, of_up, n);
        });
  });
}

template <class T>
MEGATRON_7B_INLINE void rotate_head(const T* x, T* y, const float* cosine, const float* sine, std::int64_t half,
                                    float sign) {
  for_each_vector(
      half,
      [&](std::int64_t i) {
        const Vector a = load(x + i);
        const Vector b = load(x + half + i);
        const Vector c = load(cosine + i);
        const Vector s = load(sine + i) * sign;
        store(y + i, a * c - b * s);
        store(y + half + i, b * c + a * s);
      },
      [&](std::int64_t i, std::int64_t n) {
        const Vector a = load_part(x + i, n);
        const Vector b = load_part(x + half + i, n);
        const Vector c = load_part(cosine + i, n);
        const Vector s = load_part(sine + i, n) * sign;
        store_part(y + i, a * c - b * s, n);
        store_part(y + half + i, b * c + a * s, n);
      });
}

template <class T>
void rotate(const T* x, HeadStrides x_strides, T* y, HeadStrides y_strides, HeadShape shape, const float* cosine,
            const float* sine, std::int64_t turned, float sign, int threads) {
  const std::int64_t half = turned / 2;
  const auto copied = static_cast<std::size_t>(shape.width - turned) * sizeof(T);
  for_each_row(shape.positions * shape.batch, shape.heads * shape.width, threads, [=](std::int64_t row) {
    const std::int64_t position = row / shape.batch;
    const std::int64_t batch = row % shape.batch;
    const T* in = x + position * x_strides.position + batch * x_strides.batch;
    T* out = y + position * y_strides.position + batch * y_strides.batch;
    for (std::int64_t head = 0; head < shape.heads; ++head) {
      rotate_head(in, out, cosine + position * half, sine + position * half, half, sign);
      if (copied > 0) {
        std::memcpy(out + turned, in + turned, copied);
      }
      in += x_strides.head;
      out += y_strides.head;
    }
  });
}

// Exponentials of a row until they are scaled: in place of its floats, beside numbers that would round them. The memory
// is a thread's own and stays.
template <class T>
MEGATRON_7B_INLINE float* room_for_exponentials(T* x, std::int64_t width) {
  if constexpr (sizeof(T) == sizeof(float)) {
    (void)width;
    return x;
  } else {
    thread_local std::vector<float> room;
    if (room.size() < static_cast<std::size_t>(width)) {
      room.resize(static_cast<std::size_t>(width));
    }
    return room.data();
  }
}

template <class T>
MEGATRON_7B_INLINE float softmax_row(T* x, float factor, std::int64_t width, std::int64_t num_true) {
  Vector largest = broadcast(-std::numeric_limits<float>::infinity());
  float last = -std::numeric_limits<float>::infinity();
  for_each_vector(
      num_true, [&](std::int64_t i) { largest = maximum(load(x + i), largest); },
      [&](std::int64_t i, std::int64_t n) {
        float rest[kLanes];
        store(rest, load_part(x + i, n));
        for (std::int64_t k = 0; k < n; ++k) {
          last = rest[k] > last ? rest[k] : last;
        }
      });
  const float shift = maximum_of(maximum(largest, broadcast(last)));
  float* const exponentials = room_for_exponentials(x, width);
  double sum = 0.0;
  constexpr std::int64_t kBlock = 64 * kLanes;  // partial sums, so that small terms count in long rows
  for (std::int64_t start = 0; start < num_true; start += kBlock) {
    const T* const block = x + start;
    float* const out = exponentials + start;
    Vector sums{};
    float rest = 0.0F;
    for_each_vector(
        std::min(kBlock, num_true - start),
        [&](std::int64_t i) {
          const Vector e = exponential(load(block + i) - shift);
          sums += e;
          store(out + i, e);
        },
        [&](std::int64_t i, std::int64_t n) {
          float lanes[kLanes];
          const Vector e = exponential(load_part(block + i, n) - shift);
          store(lanes, e);
          for (std::int64_t k = 0; k < n; ++k) {
            rest += lanes[k];
          }
          store_part(out + i, e, n);
        });
    sum += static_cast<double>(sum_of(sums)) + static_cast<double>(rest);
  }
  const auto scale = static_cast<float>(static_cast<double>(factor) / sum);
  for_each_vector(
      num_true, [&](std::int64_t i) { store(x + i, load(exponentials + i) * scale); },
      [&](std::int64_t i, std::int64_t n) { store_part(x + i, load_part(exponentials + i, n) * scale, n); });
  std::memset(x + num_true, 0, static_cast<std::size_t>(width - num_true) * sizeof(T));
  return static_cast<float>(static_cast<double>(shift) + std::log(sum));
}

template <class T>
void softmax(T* x, const float* factor, float* log_sum_exp, std::int64_t rows, std::int64_t width,
             std::int64_t num_true, int threads) {
  for_each_row(rows, width, threads, [=](std::int64_t row) {
    log_sum_exp[row] = softmax_row(x + row * width, factor[row], width, num_true);
  });
}

template <class T>
void accumulate(const T* x, float* total, std::int64_t count, int threads) {
  constexpr std::int64_t kBlock = 8192;
  for_each_row((count + kBlock - 1) / kBlock, kBlock, threads, [=](std::int64_t block) {
    const T* in = x + block * kBlock;
    float* out = total + block * kBlock;
    for_each_vector(
        std::min(kBlock, count - block * kBlock), [&](std::int64_t i) { store(out + i, load(out + i) + load(in + i)); },
        [&](std::int64_t i, std::int64_t n) { store_part(out + i, load_part(out + i, n) + load_part(in + i, n), n); });
  });
}
