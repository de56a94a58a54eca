// Addresses in, nothing out: megatron_7b.runtime.cpu.kernels checks types, shapes and layout before it calls.

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <array>
#include <cstdint>
#include <string>
#include <vector>

#include "megatron_7b/kernels.h"

namespace py = pybind11;

namespace megatron_7b {

namespace {

using Address = std::uintptr_t;

template <class T>
T* at(Address address) {
  return reinterpret_cast<T*>(address);  // NOLINT(performance-no-int-to-ptr): that is what a data_ptr() is
}

// The kernels of one element type and instruction set, with addresses for pointers and without the interpreter's lock.
template <class T>
class Bound {
 public:
  explicit Bound(const std::string& instruction_set) : kernels_(kernels<T>(instruction_set.c_str())) {}

  void rms_norm(Address x, Address weight, Address y, Address inverse_rms, std::int64_t rows, std::int64_t width,
                float epsilon, int threads) const {
    const py::gil_scoped_release unlocked;
    kernels_.rms_norm(at<T>(x), at<T>(weight), at<T>(y), at<float>(inverse_rms), rows, width, epsilon, threads);
  }

  void rms_norm_backward(Address grad_y, Address x, Address weight, Address inverse_rms, Address grad_x,
                         Address grad_weight, std::int64_t rows, std::int64_t width, int threads) const {
    const py::gil_scoped_release unlocked;
    kernels_.rms_norm_backward(at<T>(grad_y), at<T>(x), at<T>(weight), at<float>(inverse_rms), at<T>(grad_x),
                               at<float>(grad_weight), rows, width, threads);
  }

  void swiglu(Address x, Address y, std::int64_t rows, std::int64_t width, int threads) const {
    const py::gil_scoped_release unlocked;
    kernels_.swiglu(at<T>(x), at<T>(y), rows, width, threads);
  }

  void swiglu_backward(Address grad_y, Address x, Address grad_x, std::int64_t rows, std::int64_t width,
                       int threads) const {
    const py::gil_scoped_release unlocked;
    kernels_.swiglu_backward(at<T>(grad_y), at<T>(x), at<T>(grad_x), rows, width, threads);
  }

  using Strides = std::array<std::int64_t, 3>;

  void rotate(Address x, const Strides& x_strides, Address y, const Strides& y_strides,
              const std::array<std::int64_t, 4>& shape, Address cosine, Address sine, std::int64_t turned, float sign,
              int threads) const {
    const py::gil_scoped_release unlocked;
    kernels_.rotate(at<T>(x), {x_strides[0], x_strides[1], x_strides[2]}, at<T>(y),
                    {y_strides[0], y_strides[1], y_strides[2]}, {shape[0], shape[1], shape[2], shape[3]},
                    at<float>(cosine), at<float>(sine), turned, sign, threads);
  }

  void softmax(Address x, Address factor, Address log_sum_exp, std::int64_t rows, std::int64_t width,
               std::int64_t num_true, int threads) const {
    const py::gil_scoped_release unlocked;
    kernels_.softmax(at<T>(x), at<float>(factor), at<float>(log_sum_exp), rows, width, num_true, threads);
  }

  void accumulate(Address x, Address total, std::int64_t count, int threads) const {
    const py::gil_scoped_release unlocked;
    kernels_.accumulate(at<T>(x), at<float>(total), count, threads);
  }

  void product(Address x, Address weight, Address bias, Address y, std::int64_t rows, std::int64_t inputs,
               std::int64_t outputs, int threads) const {
    const py::gil_scoped_release unlocked;
    kernels_.product(at<T>(x), at<T>(weight), at<T>(bias), at<T>(y), rows, inputs, outputs, threads);
  }

  // Address, and strides from row to row and from group to group.
  using Heads = std::array<std::int64_t, 3>;

  void decode_attention(const std::array<Heads, 3>& inputs, const std::array<Heads, 2>& cache, Address y,
                        Address cosine, Address sine, Address positions, const std::array<std::int64_t, 5>& shape,
                        float scale, int threads) const {
    const py::gil_scoped_release unlocked;
    const auto input = [](const Heads& h) { return HeadsOf<const T>{at<T>(static_cast<Address>(h[0])), h[1], h[2]}; };
    const auto held = [](const Heads& h) { return HeadsOf<T>{at<T>(static_cast<Address>(h[0])), h[1], h[2]}; };
    kernels_.decode_attention(input(inputs[0]), input(inputs[1]), input(inputs[2]), held(cache[0]), held(cache[1]),
                              at<T>(y), at<float>(cosine), at<float>(sine), at<std::int64_t>(positions),
                              {shape[0], shape[1], shape[2], shape[3], shape[4]}, scale, threads);
  }

  // Address, and strides from position to position, text to text and head to head.
  using StridedHeads = std::array<std::int64_t, 4>;
  using Shape = std::array<std::int64_t, 7>;

  void attention(const std::array<StridedHeads, 3>& inputs, Address y, Address log_sum, const Shape& shape, bool causal,
                 float scale, int threads) const {
    const py::gil_scoped_release unlocked;
    kernels_.attention(heads_at(inputs[0]), heads_at(inputs[1]), heads_at(inputs[2]), at<T>(y), at<float>(log_sum),
                       attention_shape(shape, causal), scale, threads);
  }

  void attention_backward(const std::array<StridedHeads, 3>& inputs, Address y, const StridedHeads& grad_y,
                          Address log_sum, const std::array<Address, 3>& gradients, const Shape& shape, bool causal,
                          float scale, int threads) const {
    const py::gil_scoped_release unlocked;
    kernels_.attention_backward(heads_at(inputs[0]), heads_at(inputs[1]), heads_at(inputs[2]), at<T>(y),
                                heads_at(grad_y), at<float>(log_sum), at<T>(gradients[0]), at<T>(gradients[1]),
                                at<T>(gradients[2]), attention_shape(shape, causal), scale, threads);
  }

 private:
  static HeadsAt<const T> heads_at(const StridedHeads& h) {
    return {at<T>(static_cast<Address>(h[0])), {h[1], h[2], h[3]}};
  }

  static AttentionShape attention_shape(const Shape& shape, bool causal) {
    return {shape[0], shape[1], shape[2], shape[3], shape[4], shape[5], shape[6], causal};
  }

  const Kernels<T>& kernels_;
};

template <class T>
void register_kernels(py::module_& module, const char* name) {
  using py::arg;
  py::class_<Bound<T>>(module, name)
      .def(py::init<const std::string&>(), arg("instruction_set"))
      .def("rms_norm", &Bound<T>::rms_norm, arg("x"), arg("weight"), arg("y"), arg("inverse_rms"), arg("rows"),
           arg("width"), arg("epsilon"), arg("threads"))
      .def("rms_norm_backward", &Bound<T>::rms_norm_backward, arg("grad_y"), arg("x"), arg("weight"),
           arg("inverse_rms"), arg("grad_x"), arg("grad_weight"), arg("rows"), arg("width"), arg("threads"))
      .def("swiglu", &Bound<T>::swiglu, arg("x"), arg("y"), arg("rows"), arg("width"), arg("threads"))
      .def("swiglu_backward", &Bound<T>::swiglu_backward, arg("grad_y"), arg("x"), arg("grad_x"), arg("rows"),
           arg("width"), arg("threads"))
      .def("rotate", &Bound<T>::rotate, arg("x"), arg("x_strides"), arg("y"), arg("y_strides"), arg("shape"),
           arg("cosine"), arg("sine"), arg("turned"), arg("sign"), arg("threads"))
      .def("softmax", &Bound<T>::softmax, arg("x"), arg("factor"), arg("log_sum_exp"), arg("rows"), arg("width"),
           arg("num_true"), arg("threads"))
      .def("accumulate", &Bound<T>::accumulate, arg("x"), arg("total"), arg("count"), arg("threads"))
      .def("product", &Bound<T>::product, arg("x"), arg("weight"), arg("bias"), arg("y"), arg("rows"), arg("inputs"),
           arg("outputs"), arg("threads"))
      .def("decode_attention", &Bound<T>::decode_attention, arg("inputs"), arg("cache"), arg("y"), arg("cosine"),
           arg("sine"), arg("positions"), arg("shape"), arg("scale"), arg("threads"))
      .def("attention", &Bound<T>::attention, arg("inputs"), arg("y"), arg("log_sum"), arg("shape"), arg("causal"),
           arg("scale"), arg("threads"))
      .def("attention_backward", &Bound<T>::attention_backward, arg("inputs"), arg("y"), arg("grad_y"), arg("log_sum"),
           arg("gradients"), arg("shape"), arg("causal"), arg("scale"), arg("threads"));
}

}  // namespace

}  // namespace megatron_7b

PYBIND11_MODULE(_kernels, module) {
  module.doc() = "Native part of megatron_7b.runtime: work of a transformer layer on a CPU.";
  megatron_7b::register_kernels<float>(module, "FloatKernels");
  megatron_7b::register_kernels<megatron_7b::BFloat16>(module, "BFloat16Kernels");
  module.def(
      "instruction_sets",
      [] {
        std::vector<std::string> names;
        for (const char* const* name = megatron_7b::instruction_sets(); *name != nullptr; ++name) {
          names.emplace_back(*name);
        }
        return names;
      },
      "Names of the versions that this processor can run, best first.");
}
