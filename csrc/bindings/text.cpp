#include <algorithm>
#include <cstring>
#include <optional>
#include <tuple>

#include "bindings.h"
#include "megatron_7b/framing.h"
#include "megatron_7b/jsonl.h"

namespace py = pybind11;

namespace megatron_7b {

namespace {

std::int64_t count_lines(const py::buffer& data) {
  const py::buffer_info bytes = data.request();
  const auto* begin = static_cast<const char*>(bytes.ptr);
  const py::gil_scoped_release unlocked;
  return std::count(begin, begin + bytes.size * bytes.itemsize, '\n');
}

PyObject* to_str(const char* data, const JsonlBlock::Text& text) {
  const auto size = static_cast<Py_ssize_t>(text.size);
  if (!text.is_ascii) {
    return PyUnicode_DecodeUTF8(data + text.begin, size, "strict");
  }
  PyObject* made = PyUnicode_New(size, 0x7F);
  if (made != nullptr && size > 0) {
    std::memcpy(PyUnicode_1BYTE_DATA(made), data + text.begin, text.size);
  }
  return made;
}

py::tuple parse_jsonl(const py::buffer& data, const std::vector<std::string>& keys) {
  const py::buffer_info bytes = data.request();
  const std::string_view view(static_cast<const char*>(bytes.ptr),
                              static_cast<std::size_t>(bytes.size * bytes.itemsize));
  JsonlBlock block;
  {
    const py::gil_scoped_release unlocked;
    block = scan_jsonl(view, keys);
  }
  py::list texts;
  for (std::size_t key = 0; key < keys.size(); ++key) {
    py::list of_key(block.lines.size());
    for (std::size_t record = 0; record < block.lines.size(); ++record) {
      PyObject* text = to_str(block.decoded.data(), block.texts[record * keys.size() + key]);
      if (text == nullptr) {
        throw py::error_already_set();
      }
      PyList_SET_ITEM(of_key.ptr(), static_cast<Py_ssize_t>(record), text);
    }
    texts.append(of_key);
  }
  py::list doubts;
  for (const auto& doubt : block.doubts) {
    doubts.append(py::make_tuple(doubt.before, doubt.line, doubt.begin, doubt.begin + doubt.size));
  }
  return py::make_tuple(texts, block.lines, doubts);
}

template <typename Id>
py::tuple frame(const py::array_t<std::uint32_t, py::array::c_style>& ids,
                const py::array_t<std::int64_t, py::array::c_style>& lengths, const Frame& around) {
  const auto num_documents = static_cast<std::size_t>(lengths.size());
  py::array_t<std::int64_t> framed_lengths(lengths.size());
  const std::int64_t total =
      frame_lengths(lengths.data(), num_documents, ids.size(), around, framed_lengths.mutable_data());
  py::array_t<Id> framed(total);
  Id* target = framed.mutable_data();
  {
    const py::gil_scoped_release unlocked;
    frame_documents(ids.data(), lengths.data(), num_documents, around, target);
  }
  return py::make_tuple(framed, framed_lengths);
}

py::tuple frame_any(const py::array_t<std::uint32_t, py::array::c_style>& ids,
                    const py::array_t<std::int64_t, py::array::c_style>& lengths, int token_bytes,
                    std::optional<std::uint32_t> bos, std::optional<std::uint32_t> eod) {
  const Frame around{bos, eod};
  return token_bytes == 2 ? frame<std::uint16_t>(ids, lengths, around) : frame<std::int32_t>(ids, lengths, around);
}

// Positions of characters that are not in the table, the first of each.
std::vector<std::int64_t> find_unknown(const py::str& text, const py::array_t<bool, py::array::c_style>& known) {
  PyObject* object = text.ptr();
  const Py_ssize_t length = PyUnicode_GET_LENGTH(object);
  const int kind = PyUnicode_KIND(object);
  const void* data = PyUnicode_DATA(object);
  const bool* table = known.data();
  if (known.size() < 0x110000) {
    throw py::value_error("the table must have an entry for every code point");
  }
  std::vector<std::int64_t> found;
  const py::gil_scoped_release unlocked;
  const auto scan = [&](const auto* characters) {
    std::vector<bool> seen;
    for (Py_ssize_t i = 0; i < length; ++i) {
      const std::uint32_t point = characters[i];
      if (point < 0x80 || table[point]) {
        continue;
      }
      seen.resize(0x110000);
      if (!seen[point]) {
        seen[point] = true;
        found.push_back(i);
      }
    }
  };
  switch (kind) {
    case PyUnicode_1BYTE_KIND:
      scan(static_cast<const Py_UCS1*>(data));
      break;
    case PyUnicode_2BYTE_KIND:
      scan(static_cast<const Py_UCS2*>(data));
      break;
    default:
      scan(static_cast<const Py_UCS4*>(data));
  }
  return found;
}

}  // namespace

void register_text(py::module_& module) {
  using py::arg;
  module.def("count_lines", &count_lines, arg("data"), "Ends of lines in bytes.");
  module.def("parse_jsonl", &parse_jsonl, arg("data"), arg("keys"),
             "Texts of the records that are plainly well formed.");
  module.def("frame_documents", &frame_any, arg("ids"), arg("lengths"), arg("token_bytes"), arg("bos"), arg("eod"),
             "Narrow ids, with bos before and eod after every document that has any.");
  module.def("find_unknown", &find_unknown, arg("text"), arg("known"), "Characters that a table does not have.");
}

}  // namespace megatron_7b
