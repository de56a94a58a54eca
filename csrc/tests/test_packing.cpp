#include <algorithm>
#include <random>

#include "check.h"
#include "megatron_7b/packing.h"

using namespace megatron_7b;

TEST(packing_holds_every_token_once) {
  std::mt19937_64 random(1);
  for (const std::int64_t capacity : {1, 2, 63, 64, 65, 4096, 5000}) {
    std::vector<std::int64_t> lengths(500);
    for (auto& length : lengths) {
      length = static_cast<std::int64_t>(random() % static_cast<std::uint64_t>(2 * capacity + 2));
    }
    const Packing packed = pack_best_fit(lengths.data(), 500, capacity);
    std::vector<std::int64_t> seen(lengths.size(), 0);
    for (std::size_t row = 0; row + 1 < packed.row_begin.size(); ++row) {
      std::int64_t filled = 0;
      for (std::int64_t i = packed.row_begin[row]; i < packed.row_begin[row + 1]; ++i) {
        const auto piece = static_cast<std::size_t>(i);
        seen[static_cast<std::size_t>(packed.document[piece])] += packed.length[piece];
        filled += packed.length[piece];
      }
      CHECK(0 < filled && filled <= capacity);
    }
    CHECK(seen == lengths);
  }
}
