#include "bindings.h"
#include "megatron_7b/batcher.h"
#include "megatron_7b/permutation.h"

namespace py = pybind11;

namespace megatron_7b {

namespace {

using Indices = py::array_t<std::int64_t, py::array::c_style>;

// Microbatches that a loader keeps in the air at once; more than these are freed when they come back.
constexpr std::size_t kPooledBuffers = 64;

struct Lease {
  std::shared_ptr<BufferPool> pool;
  BufferPool::Buffer buffer;
  ~Lease() { pool->give_back(std::move(buffer)); }
};

class PooledBatcher {
 public:
  PooledBatcher(std::vector<TokenStream> streams, std::unique_ptr<const CappedBlend> blend, std::int64_t seq_length,
                BatchOptions options, Origin origin)
      : batcher_(std::move(streams), std::move(blend), seq_length, std::move(options), std::move(origin)) {}

  // (tokens, labels, loss_mask, position_ids), views of one buffer that returns to the pool with the last of them, and
  // cu_seqlens or None.
  py::tuple assemble(const Indices& indices) const {
    const std::int64_t rows = indices.size();
    const std::int64_t* numbers = indices.data();
    const std::int64_t columns = batcher_.seq_length();
    auto lease = std::make_unique<Lease>();
    BatchView batch{};
    std::vector<std::int32_t> cumulative;
    {
      const py::gil_scoped_release unlocked;
      lease->pool = pool_;
      lease->buffer = pool_->take(Batcher::batch_bytes(rows, columns));
      batch = batcher_.view(lease->buffer.data.get(), rows);
      cumulative = batcher_.assemble(numbers, rows, batch);
    }
    const py::capsule owner(lease.release(), [](void* pointer) { delete static_cast<Lease*>(pointer); });
    const auto ids = [&](std::int64_t* data) { return py::array_t<std::int64_t>({rows, columns}, data, owner); };
    py::object cu_seqlens = py::none();
    if (batcher_.options().document_boundaries) {
      cu_seqlens = py::array_t<std::int32_t>(static_cast<py::ssize_t>(cumulative.size()), cumulative.data());
    }
    return py::make_tuple(ids(batch.tokens), ids(batch.labels),
                          py::array_t<float>({rows, columns}, batch.loss_mask, owner), ids(batch.position_ids),
                          cu_seqlens);
  }

  py::tuple locate(const Indices& indices) const {
    Indices sets(indices.size());
    Indices samples(indices.size());
    for (py::ssize_t i = 0; i < indices.size(); ++i) {
      const Blend::Pick picked = batcher_.pick(indices.data()[i]);
      sets.mutable_data()[i] = picked.set;
      samples.mutable_data()[i] = picked.sample;
    }
    return py::make_tuple(sets, samples);
  }

 private:
  Batcher batcher_;
  std::shared_ptr<BufferPool> pool_ = std::make_shared<BufferPool>(kPooledBuffers);
};

Indices as_array(const std::vector<std::int64_t>& values) {
  return Indices(static_cast<py::ssize_t>(values.size()), values.data());
}

template <typename AnyBlend>
py::tuple picks(const AnyBlend& blend, std::int64_t begin, std::int64_t count) {
  Indices sets(count);
  Indices samples(count);
  std::int64_t* set = sets.mutable_data();
  std::int64_t* sample = samples.mutable_data();
  {
    const py::gil_scoped_release unlocked;
    for (std::int64_t i = 0; i < count; ++i) {
      const Blend::Pick picked = blend.pick(begin + i);
      set[i] = picked.set;
      sample[i] = picked.sample;
    }
  }
  return py::make_tuple(sets, samples);
}

using Weights = std::vector<std::int64_t>;
using Limits = std::vector<std::optional<std::int64_t>>;

std::unique_ptr<CappedBlend> make_capped(Weights weights, const Limits& limits) {
  Weights numbers;
  for (const auto& limit : limits) {
    numbers.push_back(limit.value_or(CappedBlend::kUnlimited));
  }
  return std::make_unique<CappedBlend>(std::move(weights), std::move(numbers));
}

std::unique_ptr<PooledBatcher> make_batcher(std::vector<TokenStream> streams, const std::optional<Weights>& weights,
                                            const std::optional<Limits>& limits, std::int64_t seq_length,
                                            std::int64_t vocab_size, std::optional<std::int64_t> masked_eod,
                                            bool document_boundaries, bool reset_position_ids,
                                            const std::optional<FillInTheMiddle>& fill_in_the_middle,
                                            std::int64_t first_sample, const Weights& consumed,
                                            std::int64_t reads_per_window) {
  std::unique_ptr<const CappedBlend> blend;
  if (weights || limits) {
    blend = make_capped(weights.value_or(Weights(streams.size(), 1)), limits.value_or(Limits(streams.size())));
  }
  BatchOptions options;
  options.vocab_size = vocab_size;
  options.reads_per_window = reads_per_window;
  options.masked_eod = masked_eod;
  options.document_boundaries = document_boundaries;
  options.reset_position_ids = reset_position_ids;
  options.fill_in_the_middle = fill_in_the_middle;
  return std::make_unique<PooledBatcher>(std::move(streams), std::move(blend), seq_length, options,
                                         Origin{first_sample, consumed});
}

}  // namespace

void register_sampling(py::module_& module) {
  using py::arg;
  py::class_<Permutation>(module, "Permutation", "A keyed bijection of [0, size).")
      .def(py::init<std::int64_t, std::uint64_t>(), arg("size"), arg("key"))
      .def("__call__", &Permutation::operator(), arg("index"));

  py::class_<TokenStream>(module, "TokenStream", "The order in which a range of documents is read.")
      .def(py::init([](std::shared_ptr<Corpus> corpus, std::int64_t first, std::int64_t end, std::int64_t seq_length,
                       std::uint64_t key,
                       bool shuffle) { return TokenStream(std::move(corpus), first, end, seq_length, key, shuffle); }),
           arg("corpus"), arg("first_document"), arg("end_document"), arg("seq_length"), arg("key"), arg("shuffle"))
      .def_property_readonly("num_tokens", &TokenStream::num_tokens)
      .def_property_readonly("num_samples", &TokenStream::num_samples)
      .def("epoch_of", &TokenStream::epoch_of, arg("sample"));

  py::class_<Blend>(module, "Blend", "Global sample number -> (set, sample of the set).")
      .def(py::init<std::vector<std::int64_t>>(), arg("weights"))
      .def_property_readonly("block_size", &Blend::block_size)
      .def("picks", &picks<Blend>, arg("begin"), arg("count"),
           "Sets and samples of the numbers [begin, begin + count).")
      .def(
          "counts", [](const Blend& self, std::int64_t n) { return as_array(self.counts(n)); }, arg("n"),
          "Samples taken from each set before number n.");

  py::class_<CappedBlend>(module, "CappedBlend", "A blend whose sets may run out.")
      .def(py::init(&make_capped), arg("weights"), arg("limits"))
      .def_property_readonly("num_samples",
                             [](const CappedBlend& self) -> std::optional<std::int64_t> {
                               const std::int64_t count = self.num_samples();
                               return count == CappedBlend::kUnlimited ? std::nullopt : std::optional(count);
                             })
      .def("picks", &picks<CappedBlend>, arg("begin"), arg("count"),
           "Sets and samples of the numbers [begin, begin + count).")
      .def(
          "counts", [](const CappedBlend& self, std::int64_t n) { return as_array(self.counts(n)); }, arg("n"),
          "Samples taken from each set before number n.")
      .def("number_of", &CappedBlend::number_of, arg("set_index"), arg("sample"), "The number of a set's sample.");

  py::class_<FillInTheMiddle>(module, "FillInTheMiddle", "How documents are permuted.")
      .def(py::init([](double rate, double spm_rate, std::int64_t prefix_id, std::int64_t middle_id,
                       std::int64_t suffix_id, std::optional<std::int64_t> eod_id, std::uint64_t key) {
             return FillInTheMiddle{rate, spm_rate, prefix_id, middle_id, suffix_id, eod_id, key};
           }),
           py::kw_only(), arg("rate"), arg("spm_rate"), arg("prefix_id"), arg("middle_id"), arg("suffix_id"),
           arg("eod_id") = py::none(), arg("key") = 0);

  py::class_<PooledBatcher>(module, "Batcher", "Assembles microbatches.")
      .def(py::init(&make_batcher), arg("streams"), arg("weights") = py::none(), arg("limits") = py::none(),
           py::kw_only(), arg("seq_length"), arg("vocab_size") = 0, arg("masked_eod") = py::none(),
           arg("document_boundaries") = false, arg("reset_position_ids") = false,
           arg("fill_in_the_middle") = py::none(), arg("first_sample") = 0, arg("consumed") = Weights{},
           arg("reads_per_window") = 1)
      .def("assemble", &PooledBatcher::assemble, arg("indices"),
           "(tokens, labels, loss_mask, position_ids, cu_seqlens or None) of these samples.")
      .def("locate", &PooledBatcher::locate, arg("indices"), "(sets, samples) of these global samples.");
}

}  // namespace megatron_7b
