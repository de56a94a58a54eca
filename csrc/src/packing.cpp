#include "megatron_7b/packing.h"

#include <limits>
#include <numeric>
#include <stdexcept>
#include <string>

namespace megatron_7b {

namespace {

constexpr std::int64_t kNone = -1;

// A set of small numbers that finds the smallest member at or above a number: a tree of 64-bit words.
class NumberSet {
 public:
  explicit NumberSet(std::int64_t limit) {
    for (std::size_t size = static_cast<std::size_t>(limit); levels_.empty() || size > 1;) {
      size = (size + 63) / 64;
      levels_.emplace_back(size, 0);
    }
  }

  void insert(std::int64_t number) {
    auto index = static_cast<std::size_t>(number);
    for (auto& level : levels_) {
      level[index / 64] |= std::uint64_t{1} << (index % 64);
      index /= 64;
    }
  }

  void erase(std::int64_t number) {
    auto index = static_cast<std::size_t>(number);
    for (auto& level : levels_) {
      level[index / 64] &= ~(std::uint64_t{1} << (index % 64));
      if (level[index / 64] != 0) {
        return;
      }
      index /= 64;
    }
  }

  // kNone where there is none.
  std::int64_t at_or_above(std::int64_t number) const {
    auto index = static_cast<std::size_t>(number);
    for (std::size_t level = 0; level < levels_.size(); ++level) {
      if (index / 64 >= levels_[level].size()) {
        return kNone;
      }
      const std::uint64_t word = levels_[level][index / 64] & (~std::uint64_t{0} << (index % 64));
      if (word != 0) {
        index = index / 64 * 64 + lowest(word);
        while (level-- > 0) {
          index = index * 64 + lowest(levels_[level][index]);
        }
        return static_cast<std::int64_t>(index);
      }
      index = index / 64 + 1;
    }
    return kNone;
  }

 private:
  static std::size_t lowest(std::uint64_t word) { return static_cast<std::size_t>(__builtin_ctzll(word)); }

  std::vector<std::vector<std::uint64_t>> levels_;
};

// Rows by the room that is left in them: a linked list per room.
class OpenRows {
 public:
  explicit OpenRows(std::int64_t capacity)
      : head_(static_cast<std::size_t>(capacity) + 1, kNone), rooms_(capacity + 1) {}

  std::int64_t add_full() {
    next_.push_back(kNone);
    return static_cast<std::int64_t>(next_.size()) - 1;
  }

  // The row that takes a piece: the fullest with room for it, else a new one.
  std::int64_t place(std::int64_t length) {
    std::int64_t room = rooms_.at_or_above(length);
    std::int64_t row = 0;
    if (room == kNone) {
      room = static_cast<std::int64_t>(head_.size()) - 1;
      row = add_full();
    } else {
      std::int64_t& head = head_[static_cast<std::size_t>(room)];
      row = head;
      head = next_[static_cast<std::size_t>(row)];
      if (head == kNone) {
        rooms_.erase(room);
      }
    }
    if (room > length) {
      std::int64_t& head = head_[static_cast<std::size_t>(room - length)];
      next_[static_cast<std::size_t>(row)] = head;
      head = row;
      rooms_.insert(room - length);
    }
    return row;
  }

  std::int64_t count() const { return static_cast<std::int64_t>(next_.size()); }

 private:
  std::vector<std::int64_t> head_;
  std::vector<std::int64_t> next_;
  NumberSet rooms_;
};

// Piece numbers by descending length, equal ones in order.
std::vector<std::int64_t> longest_first(const std::vector<std::int64_t>& lengths, std::int64_t capacity) {
  std::vector<std::int64_t> begin(static_cast<std::size_t>(capacity) + 2, 0);
  for (const std::int64_t length : lengths) {
    ++begin[static_cast<std::size_t>(capacity - length) + 1];
  }
  std::partial_sum(begin.begin(), begin.end(), begin.begin());
  std::vector<std::int64_t> order(lengths.size());
  for (std::size_t piece = 0; piece < lengths.size(); ++piece) {
    order[static_cast<std::size_t>(begin[static_cast<std::size_t>(capacity - lengths[piece])]++)] =
        static_cast<std::int64_t>(piece);
  }
  return order;
}

Packing cut(const std::int64_t* lengths, std::int64_t num_documents, std::int64_t capacity) {
  Packing pieces;
  for (std::int64_t document = 0; document < num_documents; ++document) {
    if (lengths[document] < 0) {
      throw std::invalid_argument("document " + std::to_string(document) + " has a length of " +
                                  std::to_string(lengths[document]));
    }
    for (std::int64_t offset = 0; offset < lengths[document]; offset += capacity) {
      pieces.document.push_back(document);
      pieces.offset.push_back(offset);
      pieces.length.push_back(lengths[document] - offset < capacity ? lengths[document] - offset : capacity);
    }
  }
  return pieces;
}

}  // namespace

Packing pack_best_fit(const std::int64_t* lengths, std::int64_t num_documents, std::int64_t capacity) {
  // The tables below have an entry per token of a row.
  if (capacity < 1 || capacity > std::numeric_limits<std::int32_t>::max()) {
    throw std::invalid_argument("rows of " + std::to_string(capacity) + " tokens");
  }
  const Packing pieces = cut(lengths, num_documents, capacity);
  OpenRows rows(capacity);
  std::vector<std::int64_t> row_of(pieces.length.size());
  for (const std::int64_t piece : longest_first(pieces.length, capacity)) {
    const auto index = static_cast<std::size_t>(piece);
    row_of[index] = rows.place(pieces.length[index]);
  }
  Packing packed;
  packed.row_begin.assign(static_cast<std::size_t>(rows.count()) + 1, 0);
  for (const std::int64_t row : row_of) {
    ++packed.row_begin[static_cast<std::size_t>(row) + 1];
  }
  std::partial_sum(packed.row_begin.begin(), packed.row_begin.end(), packed.row_begin.begin());
  std::vector<std::int64_t> next(packed.row_begin.begin(), packed.row_begin.end() - 1);
  for (auto* column : {&packed.document, &packed.offset, &packed.length}) {
    column->resize(row_of.size());
  }
  for (std::size_t piece = 0; piece < row_of.size(); ++piece) {
    const auto place = static_cast<std::size_t>(next[static_cast<std::size_t>(row_of[piece])]++);
    packed.document[place] = pieces.document[piece];
    packed.offset[place] = pieces.offset[piece];
    packed.length[place] = pieces.length[piece];
  }
  return packed;
}

}  // namespace megatron_7b
