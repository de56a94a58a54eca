#include "megatron_7b/token_stream.h"

#include <algorithm>
#include <limits>
#include <stdexcept>
#include <string>
#include <type_traits>
#include <utility>

#include "megatron_7b/error.h"
#include "megatron_7b/permutation.h"

namespace megatron_7b {

namespace {

// Keeps what is drawn for the order apart from what is drawn for the ring's beginning.
constexpr std::uint64_t kOrderPurpose = 1;
constexpr std::uint64_t kRingPurpose = 2;

// Widens ids; false where one is not below `limit` (given in the ids' own unsigned type, so that this vectorises; a
// negative id becomes a huge one).
template <typename T>
bool widen(const std::uint8_t* source, std::int64_t count, std::uint64_t limit, std::int64_t* ids) {
  using Unsigned = std::make_unsigned_t<T>;
  const T* in = reinterpret_cast<const T*>(source);
  const auto highest = static_cast<Unsigned>(limit - 1);
  bool bad = false;
  for (std::int64_t i = 0; i < count; ++i) {
    bad |= static_cast<Unsigned>(in[i]) > highest;
    ids[i] = static_cast<std::int64_t>(in[i]);
  }
  return !bad;
}

template <typename T>
bool copy_checked(const std::uint8_t* source, std::int64_t count, std::int64_t vocab_size, std::int64_t* ids) {
  constexpr auto highest = static_cast<std::uint64_t>(std::numeric_limits<T>::max());
  const auto limit = vocab_size == 0 ? highest + 1 : std::min(highest + 1, static_cast<std::uint64_t>(vocab_size));
  return widen<T>(source, count, limit, ids);
}

}  // namespace

TokenStream::TokenStream(std::shared_ptr<const Corpus> corpus, std::int64_t first_document, std::int64_t end_document,
                         std::int64_t seq_length, std::uint64_t key, bool shuffle)
    : corpus_(std::move(corpus)), seq_length_(seq_length), key_(key), shuffle_(shuffle) {
  if (seq_length < 1 || first_document < 0 || end_document < first_document ||
      end_document > corpus_->num_documents()) {
    throw std::invalid_argument("documents " + std::to_string(first_document) + " to " + std::to_string(end_document) +
                                " of " + std::to_string(corpus_->num_documents()) + " in samples of " +
                                std::to_string(seq_length));
  }
  if (!corpus_->is_contiguous()) {
    throw FormatError(idx_path(corpus_->prefix()) + ": its sequences do not follow one another in the .bin file",
                      "samples are cut from the stream of tokens; write the corpus again, in the order of its index");
  }
  token_begin_ = corpus_->document_begin(first_document);
  num_tokens_ = corpus_->document_begin(end_document) - token_begin_;
  const std::int64_t needed = shuffle ? seq_length + 1 : 2;
  if (num_tokens_ < needed) {
    throw FormatError(corpus_->prefix() + ": documents " + std::to_string(first_document) + " to " +
                          std::to_string(end_document) + " (of " + std::to_string(corpus_->num_documents()) +
                          ") hold " + std::to_string(num_tokens_) + " tokens, fewer than the " +
                          std::to_string(needed) + " of one sample",
                      "give it a larger share of data.split, add text, or shorten data.seq_length");
  }
}

std::int64_t TokenStream::first_sample_of(std::int64_t epoch) const {
  return (epoch * num_tokens_ + seq_length_ - 1) / seq_length_;
}

std::int64_t TokenStream::num_samples() const {
  // A single pass has labels for all tokens but the first.
  return shuffle_ ? first_sample_of(1) : (num_tokens_ - 1 + seq_length_ - 1) / seq_length_;
}

std::int64_t TokenStream::epoch_of(std::int64_t sample) const {
  return shuffle_ ? sample * seq_length_ / num_tokens_ : 0;
}

std::int64_t TokenStream::ring_start(std::int64_t epoch) const {
  const std::uint64_t drawn = mix(mix(key_, kRingPurpose), static_cast<std::uint64_t>(epoch));
  const auto position = static_cast<std::int64_t>(drawn % static_cast<std::uint64_t>(num_tokens_));
  const std::int64_t begin = corpus_->document_begin(corpus_->document_at(token_begin_ + position)) - token_begin_;
  if (begin < 0 || begin >= num_tokens_) {  // Only an index that is damaged where opening did not look.
    throw FormatError(idx_path(corpus_->prefix()) + ": its documents are not in ascending order");
  }
  return begin;
}

TokenStream::Place TokenStream::locate(std::int64_t sample) const {
  const std::int64_t epoch = epoch_of(sample);
  const std::int64_t first = first_sample_of(epoch);
  const Permutation order(first_sample_of(epoch + 1) - first,
                          mix(mix(key_, kOrderPurpose), static_cast<std::uint64_t>(epoch)));
  return {epoch, (first + order(sample - first)) * seq_length_ - epoch * num_tokens_};
}

std::int64_t TokenStream::read(std::int64_t sample, std::int64_t vocab_size, std::int64_t* ids,
                               std::vector<std::int64_t>* starts) const {
  const std::int64_t wanted = seq_length_ + 1;
  if (starts != nullptr) {
    starts->clear();
  }
  if (!shuffle_) {
    const std::int64_t begin = std::min(sample, num_samples()) * seq_length_;
    const std::int64_t real = std::clamp<std::int64_t>(num_tokens_ - begin, 0, wanted);
    const std::int64_t count = sample < num_samples() ? real : 0;
    copy(token_begin_ + begin, count, vocab_size, ids);
    std::fill(ids + count, ids + wanted, std::int64_t{0});
    if (starts != nullptr) {
      find_starts(token_begin_ + begin, count, 0, *starts);
      if (0 < count && count < wanted) {
        starts->push_back(count);
      }
    }
    return count;
  }
  Place place = locate(sample);
  for (std::int64_t done = 0; done < wanted;) {
    const std::int64_t left_in_epoch = num_tokens_ - place.offset;
    const std::int64_t position = (ring_start(place.epoch) + place.offset) % num_tokens_;
    const std::int64_t count = std::min({wanted - done, left_in_epoch, num_tokens_ - position});
    copy(token_begin_ + position, count, vocab_size, ids + done);
    if (starts != nullptr) {
      if (done > 0) {
        starts->push_back(done);  // The ring and the range begin with a document.
      }
      find_starts(token_begin_ + position, count, done, *starts);
    }
    done += count;
    place = count == left_in_epoch ? Place{place.epoch + 1, 0} : Place{place.epoch, place.offset + count};
  }
  return wanted;
}

// Documents that begin inside of [position, position + count), which is in the sample from `place` on.
void TokenStream::find_starts(std::int64_t position, std::int64_t count, std::int64_t place,
                              std::vector<std::int64_t>& starts) const {
  if (count == 0) {
    return;
  }
  std::int64_t last = position;
  for (std::int64_t document = corpus_->document_at(position) + 1; document < corpus_->num_documents(); ++document) {
    const std::int64_t begin = corpus_->document_begin(document);
    if (begin >= position + count) {
      break;
    }
    if (begin < last) {  // Only an index that is damaged where opening did not look.
      throw FormatError(idx_path(corpus_->prefix()) + ": its documents are not in ascending order");
    }
    if (begin > last) {  // Empty documents begin where the next one does.
      starts.push_back(place + begin - position);
      last = begin;
    }
  }
}

void TokenStream::copy(std::int64_t position, std::int64_t count, std::int64_t vocab_size, std::int64_t* ids) const {
  const std::uint8_t* source = corpus_->bin() + position * corpus_->token_bytes();
  bool good = true;
  switch (corpus_->token_type()) {
    case TokenType::kUint8:
      good = copy_checked<std::uint8_t>(source, count, vocab_size, ids);
      break;
    case TokenType::kInt8:
      good = copy_checked<std::int8_t>(source, count, vocab_size, ids);
      break;
    case TokenType::kInt16:
      good = copy_checked<std::int16_t>(source, count, vocab_size, ids);
      break;
    case TokenType::kInt32:
      good = copy_checked<std::int32_t>(source, count, vocab_size, ids);
      break;
    case TokenType::kInt64:
      good = copy_checked<std::int64_t>(source, count, vocab_size, ids);
      break;
    case TokenType::kUint16:
      good = copy_checked<std::uint16_t>(source, count, vocab_size, ids);
      break;
  }
  if (!good) {
    // `ids` holds what was read: the first bad one is found there.
    std::int64_t i = 0;
    while (ids[i] >= 0 && (vocab_size == 0 || ids[i] < vocab_size)) {
      ++i;
    }
    refuse_id(position + i, ids[i], vocab_size);
  }
}

void TokenStream::refuse_id(std::int64_t position, std::int64_t id, std::int64_t vocab_size) const {
  const std::int64_t document = corpus_->document_at(position);
  const std::string expected =
      vocab_size == 0 ? "below zero" : "outside the vocabulary of " + std::to_string(vocab_size);
  throw FormatError(bin_path(corpus_->prefix()) + ": token id " + std::to_string(id) + " in document " +
                        std::to_string(document) + " (its token " +
                        std::to_string(position - corpus_->document_begin(document)) + ") is " + expected,
                    "the corpus was written with another tokenizer, or is damaged");
}

}  // namespace megatron_7b
