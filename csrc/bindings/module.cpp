#include <exception>
#include <system_error>

#include "bindings.h"
#include "megatron_7b/error.h"

namespace py = pybind11;

namespace megatron_7b {

void register_errors(py::module_&) {
  py::register_exception_translator([](std::exception_ptr pointer) {
    try {
      if (pointer) {
        std::rethrow_exception(pointer);
      }
    } catch (const FormatError& error) {
      const py::object type = py::module_::import("megatron_7b.errors").attr("DataFormatError");
      const py::object hint = error.hint().empty() ? py::object(py::none()) : py::object(py::str(error.hint()));
      const py::object instance = type(py::str(error.what()), py::arg("hint") = hint);
      PyErr_SetObject(type.ptr(), instance.ptr());
    } catch (const std::system_error& error) {
      PyErr_SetObject(PyExc_OSError, py::make_tuple(error.code().value(), error.what()).ptr());
    }
  });
}

}  // namespace megatron_7b

PYBIND11_MODULE(_index, module) {
  module.doc() = "Native part of megatron_7b.data: the MMIDIDX files, sample order, blends, batches and packing.";
  megatron_7b::register_errors(module);
  megatron_7b::register_writer(module);
  megatron_7b::register_corpus(module);
  megatron_7b::register_sampling(module);
  megatron_7b::register_packing(module);
  megatron_7b::register_text(module);
}
