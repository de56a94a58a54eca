#include <mutex>
#include <optional>
#include <tuple>

#include "bindings.h"
#include "megatron_7b/index_writer.h"

namespace py = pybind11;

namespace megatron_7b {

namespace {

// num_documents, num_sequences, num_tokens, bounds_implied
using State = std::tuple<std::int64_t, std::int64_t, std::int64_t, bool>;

// The writer with a lock: its calls run without the GIL, so two threads could otherwise be in it at once.
class LockedWriter {
 public:
  LockedWriter(const std::string& prefix, int token_bytes) : writer_(prefix, token_bytes) {}
  LockedWriter(const std::string& prefix, int token_bytes, const State& state)
      : writer_(prefix, token_bytes, {std::get<0>(state), std::get<1>(state), std::get<2>(state), std::get<3>(state)}) {
  }

  void add_document(const py::array& ids, const std::optional<py::array>& sequence_lengths) {
    if (!sequence_lengths) {
      with_ids(ids, [&](const auto* data, std::int64_t count) { writer_.add_document(data, count, nullptr, 0); });
      return;
    }
    const auto lengths = flat<std::int32_t>(*sequence_lengths, "sequence_lengths");
    with_ids(ids, [&](const auto* data, std::int64_t count) {
      writer_.add_document(data, count, lengths.data(), static_cast<std::int64_t>(lengths.size()));
    });
  }

  void add_documents(const py::array& ids, const py::array& lengths) {
    const auto converted = flat<std::int64_t>(lengths, "lengths");
    with_ids(ids, [&](const auto* data, std::int64_t count) {
      writer_.add_documents(data, count, converted.data(), static_cast<std::int64_t>(converted.size()));
    });
  }

  State checkpoint() {
    const std::scoped_lock lock(mutex_);
    const IndexWriter::Checkpoint at = writer_.checkpoint();
    return {at.num_documents, at.num_sequences, at.num_tokens, at.bounds_implied};
  }

  void complete() {
    const std::scoped_lock lock(mutex_);
    writer_.complete();
  }

  void finish() {
    const std::scoped_lock lock(mutex_);
    writer_.finish();
  }

  void suspend() {
    const std::scoped_lock lock(mutex_);
    writer_.suspend();
  }

  void abort() {
    const std::scoped_lock lock(mutex_);
    writer_.abort();
  }

  const IndexWriter& get() const { return writer_; }

 private:
  template <typename T>
  static py::array_t<T, py::array::c_style> flat(const py::array& array, const char* name) {
    if (array.ndim() != 1 || (array.dtype().kind() != 'i' && array.dtype().kind() != 'u' && array.size() > 0)) {
      throw py::type_error(std::string(name) + " must be a one-dimensional array of integers");
    }
    return py::array_t<T, py::array::c_style | py::array::forcecast>(array);
  }

  template <typename Id, typename Add>
  void run(const py::array& ids, const Add& add) {
    const auto contiguous = py::array_t<Id, py::array::c_style>(ids);
    const Id* data = contiguous.data();
    const auto count = static_cast<std::int64_t>(contiguous.size());
    const py::gil_scoped_release unlocked;
    const std::scoped_lock lock(mutex_);
    add(data, count);
  }

  template <typename Add>
  void with_ids(const py::array& ids, const Add& add) {
    if (ids.ndim() != 1) {
      throw py::type_error("ids must be one-dimensional");
    }
    if (py::isinstance<py::array_t<std::uint16_t>>(ids)) {
      run<std::uint16_t>(ids, add);
    } else if (py::isinstance<py::array_t<std::int32_t>>(ids)) {
      run<std::int32_t>(ids, add);
    } else if (py::isinstance<py::array_t<std::int64_t>>(ids)) {
      run<std::int64_t>(ids, add);
    } else {
      throw py::type_error("ids must be uint16, int32 or int64, not " + std::string(py::str(ids.dtype())));
    }
  }

  std::mutex mutex_;
  IndexWriter writer_;
};

}  // namespace

void register_writer(py::module_& module) {
  using py::arg;
  py::class_<LockedWriter>(module, "IndexWriter", "Writes PREFIX.bin and PREFIX.idx; they appear on finish().")
      .def(py::init<const std::string&, int>(), arg("prefix"), arg("token_bytes"))
      .def(py::init<const std::string&, int, const State&>(), arg("prefix"), arg("token_bytes"), arg("checkpoint"))
      .def("add_document", &LockedWriter::add_document, arg("ids"), arg("sequence_lengths") = py::none(),
           "Append one document.")
      .def("add_documents", &LockedWriter::add_documents, arg("ids"), arg("lengths"),
           "Append many documents whose ids follow one another.")
      .def("checkpoint", &LockedWriter::checkpoint, py::call_guard<py::gil_scoped_release>(), "Hand all to the kernel.")
      .def("complete", &LockedWriter::complete, py::call_guard<py::gil_scoped_release>(), "Complete the .tmp files.")
      .def("suspend", &LockedWriter::suspend, py::call_guard<py::gil_scoped_release>(), "Close the .tmp files.")
      .def("finish", &LockedWriter::finish, py::call_guard<py::gil_scoped_release>(), "Publish both files.")
      .def("abort", &LockedWriter::abort, py::call_guard<py::gil_scoped_release>(), "Remove the temporary files.")
      .def_property_readonly("num_documents", [](const LockedWriter& self) { return self.get().num_documents(); })
      .def_property_readonly("num_sequences", [](const LockedWriter& self) { return self.get().num_sequences(); })
      .def_property_readonly("num_tokens", [](const LockedWriter& self) { return self.get().num_tokens(); });
}

}  // namespace megatron_7b
