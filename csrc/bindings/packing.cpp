#include "megatron_7b/packing.h"

#include "bindings.h"

namespace py = pybind11;

namespace megatron_7b {

namespace {

using Numbers = py::array_t<std::int64_t, py::array::c_style>;

Numbers as_array(std::vector<std::int64_t>&& values) {
  auto* kept = new std::vector<std::int64_t>(std::move(values));
  const py::capsule owner(kept, [](void* pointer) { delete static_cast<std::vector<std::int64_t>*>(pointer); });
  return Numbers(static_cast<py::ssize_t>(kept->size()), kept->data(), owner);
}

py::tuple pack(const Numbers& lengths, std::int64_t capacity) {
  const std::int64_t* data = lengths.data();
  const std::int64_t count = lengths.size();
  Packing packed;
  {
    const py::gil_scoped_release unlocked;
    packed = pack_best_fit(data, count, capacity);
  }
  return py::make_tuple(as_array(std::move(packed.row_begin)), as_array(std::move(packed.document)),
                        as_array(std::move(packed.offset)), as_array(std::move(packed.length)));
}

}  // namespace

void register_packing(py::module_& module) {
  using py::arg;
  module.def("pack_best_fit", &pack, arg("lengths"), arg("capacity"),
             "(row_begin, document, offset, length) of documents packed into rows of `capacity` tokens.");
}

}  // namespace megatron_7b
