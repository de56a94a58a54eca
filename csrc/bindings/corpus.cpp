#include "megatron_7b/corpus.h"

#include "bindings.h"
#include "megatron_7b/error.h"

namespace py = pybind11;

namespace megatron_7b {

namespace {

py::dtype numpy_type(TokenType type) {
  switch (type) {
    case TokenType::kUint8:
      return py::dtype::of<std::uint8_t>();
    case TokenType::kInt8:
      return py::dtype::of<std::int8_t>();
    case TokenType::kInt16:
      return py::dtype::of<std::int16_t>();
    case TokenType::kInt32:
      return py::dtype::of<std::int32_t>();
    case TokenType::kInt64:
      return py::dtype::of<std::int64_t>();
    case TokenType::kUint16:
      return py::dtype::of<std::uint16_t>();
  }
  throw std::logic_error("unknown token type");
}

// A read-only NumPy view of mapped bytes, which keeps the map alive.
py::array view(const py::object& owner, const py::dtype& type, std::int64_t count, const std::uint8_t* data) {
  static const std::uint8_t nothing = 0;  // NumPy allocates when given no address.
  py::array array(type, {static_cast<py::ssize_t>(count)}, {}, data == nullptr ? &nothing : data, owner);
  array.attr("setflags")(py::arg("write") = false);
  return array;
}

py::array sequence(const py::object& self, std::int64_t index) {
  const auto& corpus = self.cast<const Corpus&>();
  if (index < 0 || index >= corpus.num_sequences()) {
    throw py::index_error("sequence " + std::to_string(index) + " of " + std::to_string(corpus.num_sequences()));
  }
  const std::int64_t begin = corpus.pointer(index);
  const std::int64_t length = corpus.length(index);
  // Opening a large corpus checks a part of its entries, so each is checked where it is used.
  if (begin < 0 || length < 0 || begin > corpus.bin_bytes() ||
      length > (corpus.bin_bytes() - begin) / corpus.token_bytes()) {
    throw FormatError(bin_path(corpus.prefix()) + ": sequence " + std::to_string(index) + " lies outside of the file");
  }
  return view(self, numpy_type(corpus.token_type()), length, corpus.bin() + begin);
}

}  // namespace

void register_corpus(py::module_& module) {
  using py::arg;
  py::class_<Corpus, std::shared_ptr<Corpus>>(module, "Corpus", "A .bin/.idx pair, mapped.")
      .def(py::init<const std::string&, bool>(), arg("prefix"), arg("verify") = false,
           py::call_guard<py::gil_scoped_release>())
      .def_property_readonly("prefix", &Corpus::prefix)
      .def_property_readonly("dtype", [](const Corpus& self) { return numpy_type(self.token_type()); })
      .def_property_readonly("num_sequences", &Corpus::num_sequences)
      .def_property_readonly("num_documents", &Corpus::num_documents)
      .def_property_readonly("num_tokens", &Corpus::num_tokens)
      .def_property_readonly("bin_bytes", &Corpus::bin_bytes)
      .def_property_readonly("idx_bytes", &Corpus::idx_bytes)
      .def_property_readonly("is_contiguous", &Corpus::is_contiguous)
      .def_property_readonly("sequence_lengths",
                             [](const py::object& self) {
                               const auto& corpus = self.cast<const Corpus&>();
                               return view(self, py::dtype::of<std::int32_t>(), corpus.num_sequences(),
                                           corpus.lengths());
                             })
      .def_property_readonly("sequence_pointers",
                             [](const py::object& self) {
                               const auto& corpus = self.cast<const Corpus&>();
                               return view(self, py::dtype::of<std::int64_t>(), corpus.num_sequences(),
                                           corpus.pointers());
                             })
      .def_property_readonly("document_indices",
                             [](const py::object& self) {
                               const auto& corpus = self.cast<const Corpus&>();
                               return view(self, py::dtype::of<std::int64_t>(), corpus.num_documents() + 1,
                                           corpus.bounds());
                             })
      .def("sequence", &sequence, arg("index"), "Ids of one sequence, a view of the map.")
      .def(
          "tokens_before",
          [](const Corpus& self, std::int64_t document) {
            if (document < 0 || document > self.num_documents()) {
              throw py::index_error("document " + std::to_string(document));
            }
            return self.document_begin(document);
          },
          arg("document"), "Tokens before a document; of all of them, for num_documents. Contiguous corpora only.")
      .def("id_range", &Corpus::id_range, py::call_guard<py::gil_scoped_release>(),
           "Smallest and largest id; (0, -1) for an empty corpus.");
}

}  // namespace megatron_7b
