// The kernels on arrays without a spare element on either side, for every instruction set of this processor.
#include <cmath>
#include <cstdint>
#include <vector>

#include "check.h"
#include "megatron_7b/kernels.h"

using namespace megatron_7b;

namespace {

// Between -2 and 2, from a linear congruential generator.
std::vector<float> numbers(std::int64_t count, std::uint32_t seed) {
  std::vector<float> values(static_cast<std::size_t>(count));
  for (float& value : values) {
    seed = seed * 1664525u + 1013904223u;
    value = static_cast<float>(seed >> 8) / static_cast<float>(1 << 22) - 2.0F;
  }
  return values;
}

std::vector<float> zeros(std::int64_t count) { return std::vector<float>(static_cast<std::size_t>(count)); }

bool near(float a, float b) { return std::abs(a - b) < 1e-4F; }

template <class Body>
void for_each_version(Body body) {
  for (const char* const* name = instruction_sets(); *name != nullptr; ++name) {
    body(kernels<float>(*name));
  }
}

}  // namespace

TEST(rms_norm_makes_the_mean_square_one) {
  for_each_version([](const Kernels<float>& kernel) {
    for (std::int64_t width = 1; width < 70; width += 3) {
      const std::int64_t rows = 67;
      const auto x = numbers(rows * width, 1);
      const std::vector<float> weight(static_cast<std::size_t>(width), 1.0F);
      auto y = zeros(rows * width);
      auto scale = zeros(rows);
      kernel.rms_norm(x.data(), weight.data(), y.data(), scale.data(), rows, width, 0.0F, 1);
      float squares = 0.0F;
      for (std::int64_t i = 0; i < width; ++i) {
        squares += y[static_cast<std::size_t>(i)] * y[static_cast<std::size_t>(i)];
      }
      CHECK(near(squares / static_cast<float>(width), 1.0F));
      auto grad_x = zeros(rows * width);
      auto grad_weight = zeros(width);
      // Growing along x changes nothing, so that the gradient by x is at right angles to x.
      kernel.rms_norm_backward(numbers(rows * width, 2).data(), x.data(), weight.data(), scale.data(), grad_x.data(),
                               grad_weight.data(), rows, width, 1);
      float along = 0.0F;
      for (std::int64_t i = 0; i < width; ++i) {
        along += grad_x[static_cast<std::size_t>(i)] * x[static_cast<std::size_t>(i)];
      }
      CHECK(std::abs(along) < 1e-3F);
    }
  });
}

TEST(swiglu_is_its_formula) {
  for_each_version([](const Kernels<float>& kernel) {
    for (std::int64_t width = 1; width < 40; ++width) {
      const auto x = numbers(3 * 2 * width, 3);
      auto y = zeros(3 * width);
      kernel.swiglu(x.data(), y.data(), 3, width, 1);
      const float gate = x.front();
      CHECK(near(y.front(), gate / (1.0F + std::exp(-gate)) * x[static_cast<std::size_t>(width)]));
      auto grad = zeros(3 * 2 * width);
      kernel.swiglu_backward(y.data(), x.data(), grad.data(), 3, width, 1);
      CHECK(near(grad[static_cast<std::size_t>(width)], y.front() * gate / (1.0F + std::exp(-gate))));
    }
  });
}

TEST(rotating_back_gives_what_was) {
  for_each_version([](const Kernels<float>& kernel) {
    for (std::int64_t turned = 2; turned <= 40; turned += 2) {
      const HeadShape shape{3, 2, 2, 40};
      const HeadStrides strides{160, 80, 40};
      const auto x = numbers(480, 4);
      auto y = zeros(480);
      auto z = zeros(480);
      auto cosine = numbers(3 * turned / 2, 5);
      auto sine = cosine;
      for (std::size_t i = 0; i < cosine.size(); ++i) {
        sine[i] = std::sin(cosine[i]);
        cosine[i] = std::cos(cosine[i]);
      }
      kernel.rotate(x.data(), strides, y.data(), strides, shape, cosine.data(), sine.data(), turned, 1.0F, 1);
      kernel.rotate(y.data(), strides, z.data(), strides, shape, cosine.data(), sine.data(), turned, -1.0F, 1);
      CHECK(!near(x.front(), y.front()));
      for (std::size_t i = 0; i < x.size(); ++i) {
        CHECK(near(x[i], z[i]));
      }
    }
  });
}

TEST(softmax_sums_to_its_factor) {
  for_each_version([](const Kernels<float>& kernel) {
    for (std::int64_t num_true = 1; num_true < 70; ++num_true) {
      const std::int64_t width = num_true + num_true % 3;
      auto x = numbers(2 * width, 6);
      const std::vector<float> factor{0.0F, 2.0F};
      auto log_sum = zeros(2);
      kernel.softmax(x.data(), factor.data(), log_sum.data(), 2, width, num_true, 1);
      float sum = 0.0F;
      for (std::int64_t i = width; i < 2 * width; ++i) {
        sum += x[static_cast<std::size_t>(i)];
      }
      CHECK(near(sum, 2.0F));
      CHECK(x.front() == 0.0F);
    }
  });
}

TEST(attention_to_equal_values_is_that_value) {
  for_each_version([](const Kernels<float>& kernel) {
    for (std::int64_t s = 1; s < 140; s += 23) {
      const std::int64_t d = 3 + s % 20;
      const std::int64_t keys = s + s % 3;
      const AttentionShape shape{2, 2, 1, s, keys, d, 1 + keys - s + s % 37, true};  // windows of up to 35 keys
      const HeadStrides wide{4 * d, 2 * d, d};
      const HeadStrides narrow{2 * d, d, d};
      const auto query = numbers(s * 4 * d, 9);
      const auto key = numbers(keys * 2 * d, 10);
      const std::vector<float> value(static_cast<std::size_t>(keys * 2 * d), 1.5F);
      auto y = zeros(s * 4 * d);
      auto log_sum = zeros(4 * s);
      kernel.attention({query.data(), wide}, {key.data(), narrow}, {value.data(), narrow}, y.data(), log_sum.data(),
                       shape, 0.5F, 1);
      for (const float x : y) {
        CHECK(near(x, 1.5F));
      }
      auto of_query = zeros(s * 4 * d);
      auto of_key = zeros(keys * 2 * d);
      auto of_value = of_key;
      const std::vector<float> grad(y.size(), 1.0F);
      kernel.attention_backward({query.data(), wide}, {key.data(), narrow}, {value.data(), narrow}, y.data(),
                                {grad.data(), wide}, log_sum.data(), of_query.data(), of_key.data(), of_value.data(),
                                shape, 0.5F, 1);
      float sum = 0.0F;  // of the weights: one for each query of each head
      for (std::int64_t k = 0; k < keys; ++k) {
        sum += of_value[static_cast<std::size_t>(k * 2 * d)];
      }
      CHECK(std::abs(sum / static_cast<float>(2 * s) - 1.0F) < 1e-4F);
      for (const float x : of_query) {
        CHECK(near(x, 0.0F));
      }
    }
  });
}

TEST(accumulate_adds_every_element_once) {
  for_each_version([](const Kernels<float>& kernel) {
    for (const std::int64_t count : {1, 17, 8192, 20001}) {
      const auto x = numbers(count, 7);
      auto sum = numbers(count, 8);
      auto expected = sum;
      for (std::size_t i = 0; i < x.size(); ++i) {
        expected[i] += x[i];
      }
      kernel.accumulate(x.data(), sum.data(), count, 2);
      CHECK(sum == expected);
    }
  });
}

TEST(bfloat16_rounds_to_nearest) {
  for (const char* const* name = instruction_sets(); *name != nullptr; ++name) {
    // gate 200 makes silu the identity: the product is up × 200, rounded once.
    const BFloat16 x[] = {{0x4348}, {0x3f81}};  // 200, 1.0078125: 201.5625 lies between 201 and 202
    BFloat16 y{};
    kernels<BFloat16>(*name).swiglu(x, &y, 1, 1, 1);
    CHECK(y.bits == 0x434a);
  }
}
