#include <algorithm>
#include <atomic>
#include <memory>
#include <numeric>
#include <random>
#include <thread>

#include "check.h"
#include "corpora.h"
#include "megatron_7b/batcher.h"
#include "megatron_7b/error.h"
#include "megatron_7b/permutation.h"

using namespace megatron_7b;
using test::TemporaryFolder;

TEST(permutations_are_bijections) {
  for (std::int64_t size = 1; size < 300; ++size) {
    const Permutation permutation(size, static_cast<std::uint64_t>(size) * 12345);
    std::vector<bool> seen(static_cast<std::size_t>(size), false);
    for (std::int64_t i = 0; i < size; ++i) {
      const auto image = static_cast<std::size_t>(permutation(i));
      CHECK(image < seen.size() && !seen[image]);
      seen[image] = true;
    }
  }
  const Permutation huge(std::int64_t{1} << 62, 7);
  CHECK(huge(std::int64_t{1} << 61) >= 0);
}

TEST(every_token_once_per_epoch) {
  const TemporaryFolder folder;
  test::write_corpus(folder / "a", test::numbered_documents(200), 2);
  const auto corpus = std::make_shared<const Corpus>(folder / "a", true);
  for (const std::int64_t seq_length : {1, 5, 64, 1000}) {
    const TokenStream stream(corpus, 20, 180, seq_length, 99, true);
    const std::int64_t epochs = 3;
    const std::int64_t samples = (epochs * stream.num_tokens() + seq_length - 1) / seq_length;
    std::vector<std::int64_t> ids(static_cast<std::size_t>(seq_length) + 1);
    std::vector<std::int64_t> counts(static_cast<std::size_t>(corpus->num_tokens()), 0);
    for (std::int64_t sample = 0; sample < samples; ++sample) {
      CHECK(stream.read(sample, 0, ids.data()) == seq_length + 1);
      for (std::size_t i = 0; i + 1 < ids.size(); ++i) {
        ++counts[static_cast<std::size_t>(ids[i])];
      }
    }
    std::int64_t beyond = 0;
    const std::int64_t begin = corpus->document_begin(20);
    for (std::int64_t token = 0; token < corpus->num_tokens(); ++token) {
      const std::int64_t count = counts[static_cast<std::size_t>(token)];
      const bool inside = token >= begin && token < begin + stream.num_tokens();
      CHECK(inside ? count == epochs || count == epochs + 1 : count == 0);
      beyond += inside ? count - epochs : 0;
    }
    CHECK(beyond == samples * seq_length - epochs * stream.num_tokens());
  }
}

TEST(streams_far_down_the_epochs) {
  const TemporaryFolder folder;
  test::write_corpus(folder / "a", test::numbered_documents(50), 4);
  const TokenStream stream(std::make_shared<const Corpus>(folder / "a", true), 0, 50, 7, 1, true);
  std::vector<std::int64_t> ids(8);
  for (std::int64_t sample = std::int64_t{1} << 50; sample < (std::int64_t{1} << 50) + 500; ++sample) {
    CHECK(stream.read(sample, 2000, ids.data()) == 8);
  }
}

TEST(blends_are_exact_within_one_sample) {
  std::mt19937_64 random(3);
  for (int round = 0; round < 6; ++round) {
    std::vector<std::int64_t> weights(static_cast<std::size_t>(1 + (round * 13) % 40));
    std::int64_t total = 0;
    for (auto& weight : weights) {
      weight = static_cast<std::int64_t>(1 + random() % (round % 2 == 0 ? 5 : 5000));
      total += weight;
    }
    const Blend blend(weights);
    const std::int64_t begin = blend.block_size() * static_cast<std::int64_t>(random() % 100000) - 200;
    const std::int64_t start = std::max<std::int64_t>(begin, 0);
    auto counts = blend.counts(start);
    for (std::int64_t n = start; n < start + 400; ++n) {
      const auto pick = blend.pick(n);
      CHECK(counts[static_cast<std::size_t>(pick.set)]++ == pick.sample);
      for (std::size_t k = 0; k < weights.size(); ++k) {
        // Kept below 2^63 by the choice of weights.
        const std::int64_t lag = counts[k] * total - weights[k] * (n + 1);
        CHECK(-total < lag && lag < total);
      }
    }
  }
}

TEST(batches_from_several_threads) {
  const TemporaryFolder folder;
  std::vector<TokenStream> streams;
  for (const char* name : {"a", "b"}) {
    test::write_corpus(folder / name, test::numbered_documents(100), 2);
    const auto corpus = std::make_shared<const Corpus>(folder / name, true);
    streams.emplace_back(corpus, 0, 100, 16, streams.size(), true);
  }
  BatchOptions options;
  options.vocab_size = 5000;
  options.masked_eod = 0;
  const std::vector<std::int64_t> unlimited(2, CappedBlend::kUnlimited);
  const Batcher batcher(streams, std::make_unique<CappedBlend>(std::vector<std::int64_t>{2, 1}, unlimited), 16,
                        options);
  BufferPool pool(4);
  std::atomic<std::int64_t> sum{0};
  std::vector<std::thread> threads;
  for (int t = 0; t < 4; ++t) {
    threads.emplace_back([&] {
      for (std::int64_t step = 0; step < 100; ++step) {
        auto buffer = pool.take(Batcher::batch_bytes(2, 16));
        const BatchView view = batcher.view(buffer.data.get(), 2);
        const std::int64_t indices[2] = {2 * step, 70000 + 2 * step};
        batcher.assemble(indices, 2, view);
        CHECK(view.position_ids[31] == 15 && view.labels[0] == view.tokens[1]);
        sum += view.tokens[0] + view.labels[31];
        pool.give_back(std::move(buffer));
      }
    });
  }
  for (auto& thread : threads) {
    thread.join();
  }
  CHECK(sum > 0 && sum % 4 == 0);
}

TEST(document_boundaries_of_batches) {
  const TemporaryFolder folder;
  // Every id tells its document: 100 * document + place; some documents are empty.
  test::Documents documents(60);
  for (std::size_t i = 0; i < documents.size(); ++i) {
    for (std::size_t place = 0; place < (i * 7919) % 13; ++place) {
      documents[i].push_back(static_cast<std::int32_t>(100 * i + place));
    }
  }
  test::write_corpus(folder / "a", documents, 2);
  const auto corpus = std::make_shared<const Corpus>(folder / "a", true);
  for (const bool shuffle : {true, false}) {
    for (const std::int64_t s : {1, 7, 64}) {
      const std::vector<TokenStream> streams{TokenStream(corpus, 0, 60, s, 5, shuffle)};
      BatchOptions options;
      options.document_boundaries = options.reset_position_ids = true;
      const Batcher batcher(streams, nullptr, s, options);
      const std::int64_t rows = 2 * corpus->num_tokens() / s + 2;
      std::vector<std::int64_t> indices(static_cast<std::size_t>(rows));
      std::iota(indices.begin(), indices.end(), std::int64_t{0});
      BufferPool::Buffer buffer = BufferPool(1).take(Batcher::batch_bytes(rows, s));
      const BatchView view = batcher.view(buffer.data.get(), rows);
      const std::vector<std::int32_t> cumulative = batcher.assemble(indices.data(), rows, view);
      CHECK(cumulative.front() == 0 && cumulative.back() == rows * s);
      std::size_t segment = 0;
      for (std::int64_t i = 0; i < rows * s; ++i) {
        if (cumulative[segment + 1] == i) {
          ++segment;
        }
        CHECK(view.position_ids[i] == i - cumulative[segment]);
        if (i % s == 0) {
          CHECK(cumulative[segment] == i);
        } else if (shuffle || view.loss_mask[i] == 1.0F) {
          const bool same = view.tokens[i] / 100 == view.tokens[i - 1] / 100 && view.tokens[i] > view.tokens[i - 1];
          CHECK(same == (cumulative[segment] != i));
        }
      }
    }
  }
}

TEST(capped_blends_run_out_exactly) {
  std::mt19937_64 random(5);
  for (int round = 0; round < 8; ++round) {
    std::vector<std::int64_t> weights(static_cast<std::size_t>(1 + round));
    std::vector<std::int64_t> limits(weights.size());
    for (std::size_t k = 0; k < weights.size(); ++k) {
      weights[k] = static_cast<std::int64_t>(1 + random() % 20);
      limits[k] = static_cast<std::int64_t>(1 + random() % 3000);
    }
    const CappedBlend blend(weights, limits);
    std::vector<std::int64_t> counts(weights.size(), 0);
    for (std::int64_t n = 0; n < blend.num_samples(); ++n) {
      const auto pick = blend.pick(n);
      const auto k = static_cast<std::size_t>(pick.set);
      CHECK(pick.sample == counts[k]++ && pick.sample < limits[k]);
      if (n % 97 == 0) {
        CHECK(blend.counts(n + 1) == counts && blend.number_of(pick.set, pick.sample) == n);
      }
    }
    CHECK(counts == limits);
    CHECK_THROWS(std::out_of_range, blend.pick(blend.num_samples()));
    // Asked for at once, the end is the same.
    const CappedBlend fresh(weights, limits);
    const auto last = fresh.pick(fresh.num_samples() - 1);
    CHECK(last.sample + 1 == limits[static_cast<std::size_t>(last.set)]);
  }
}

TEST(a_blend_that_takes_over) {
  const TemporaryFolder folder;
  std::vector<TokenStream> streams;
  for (const char* name : {"a", "b", "c"}) {
    test::write_corpus(folder / name, test::numbered_documents(100), 2);
    const auto corpus = std::make_shared<const Corpus>(folder / name, true);
    streams.emplace_back(corpus, 0, 100, 16, streams.size(), true);
  }
  // The second set has run out already, the others continue after the samples that were read from them.
  const auto blend = [] {
    return std::make_unique<CappedBlend>(std::vector<std::int64_t>{1, 5, 1}, std::vector<std::int64_t>{3, 0, 4});
  };
  const Batcher batcher(streams, blend(), 16, {}, {1000, {70, 50, 0}});
  std::vector<std::int64_t> next{70, 50, 0};
  for (std::int64_t index = 1000; index < 1007; ++index) {
    const auto picked = batcher.pick(index);
    CHECK(picked.sample == next[static_cast<std::size_t>(picked.set)]++);
  }
  CHECK((next == std::vector<std::int64_t>{73, 50, 4}));
  CHECK_THROWS(std::out_of_range, batcher.pick(1007));
  CHECK_THROWS(std::invalid_argument, batcher.pick(999));
  CHECK_THROWS(std::invalid_argument, Batcher(streams, blend(), 16, {}, {1000, {70, 50}}));
  const CappedBlend nothing({1, 1}, {0, 0});
  CHECK(nothing.num_samples() == 0 && nothing.counts(0) == std::vector<std::int64_t>(2, 0));
  CHECK_THROWS(std::out_of_range, nothing.pick(0));
}

TEST(fill_in_the_middle_keeps_lengths) {
  FillInTheMiddle fim;
  fim.rate = 1;
  fim.prefix_id = 1000;
  fim.middle_id = 1001;
  fim.suffix_id = 1002;
  fim.eod_id = 7;
  for (const double spm_rate : {0.0, 1.0}) {
    fim.spm_rate = spm_rate;
    for (std::int64_t sample = 0; sample < 200; ++sample) {
      std::vector<std::int64_t> ids{7, 10, 11, 12, 7, 20, 21, 22, 23, 24, 7, 30, 31, 32, 33, 34, 35};
      const std::vector<std::int64_t> before = ids;
      fim.permute(0, sample, {1, 5, 11}, 17, ids.data());
      CHECK(std::equal(ids.begin(), ids.begin() + 5, before.begin()));  // Too short.
      CHECK(ids[5] == 1000 && ids[10] == 7 && ids[11] == 1000);
      CHECK(std::count(ids.begin() + 11, ids.end(), 1001) == 1 && std::count(ids.begin() + 11, ids.end(), 1002) == 1);
      for (const std::int64_t token : {20, 21, 30, 31, 32}) {
        CHECK(std::count(ids.begin(), ids.end(), token) == 1);
      }
    }
  }
}
