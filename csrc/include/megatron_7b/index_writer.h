// Writes a corpus document by document. Memory does not grow with it: lengths are spooled to PREFIX.idx.tmp as they
// come, pointers are derived from them at the end. PREFIX.bin and PREFIX.idx appear only complete, the index last.
#pragma once

#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "megatron_7b/file.h"

namespace megatron_7b {

class IndexWriter {
 public:
  // token_bytes: 2 for uint16 ids, 4 for int32 ids.
  IndexWriter(const std::string& prefix, int token_bytes);
  // Removes the temporary files of a writer that was not finished.
  ~IndexWriter();

  // One document of `count` ids, cut into `num_sequences` sequences (nullptr: one sequence, all of it).
  template <typename Id>
  void add_document(const Id* ids, std::int64_t count, const std::int32_t* lengths, std::int64_t num_sequences);

  // Documents of one sequence each, their ids one after the other.
  template <typename Id>
  void add_documents(const Id* ids, std::int64_t count, const std::int64_t* lengths, std::int64_t num_documents);

  void finish();
  void abort() noexcept;

  std::int64_t num_documents() const { return num_documents_; }
  std::int64_t num_sequences() const { return num_sequences_; }
  std::int64_t num_tokens() const { return num_tokens_; }

 private:
  void check_open() const;
  template <typename Id>
  void write_ids(const Id* ids, std::int64_t count);
  void write_length(std::int64_t length);
  void end_document();
  void write_pointers();
  void write_document_bounds();

  std::string prefix_;
  int token_bytes_;
  std::unique_ptr<BufferedFile> bin_;
  std::unique_ptr<BufferedFile> idx_;
  std::int64_t num_documents_ = 0;
  std::int64_t num_sequences_ = 0;
  std::int64_t num_tokens_ = 0;
  // Bounds 0, 1, 2, … are implied until the first document that is not exactly one sequence.
  bool bounds_implied_ = true;
  std::vector<std::int64_t> bounds_;
};

}  // namespace megatron_7b
