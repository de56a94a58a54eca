// Writes a corpus document by document. Memory does not grow with it: lengths are spooled to PREFIX.idx.tmp as they
// come, pointers are derived from them at the end. PREFIX.bin and PREFIX.idx appear only complete, the index last.
//
// A writer that died can be continued from any of its checkpoints: the files are cut to what they held then.
#pragma once

#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "megatron_7b/file.h"

namespace megatron_7b {

class IndexWriter {
 public:
  // How much a writer's files hold.
  struct Checkpoint {
    std::int64_t num_documents = 0;
    std::int64_t num_sequences = 0;
    std::int64_t num_tokens = 0;
    // Whether every document so far is exactly one sequence.
    bool bounds_implied = true;
  };

  // token_bytes: 2 for uint16 ids, 4 for int32 ids.
  IndexWriter(const std::string& prefix, int token_bytes);
  // Continues after a checkpoint of an earlier writer.
  IndexWriter(const std::string& prefix, int token_bytes, const Checkpoint& checkpoint);
  // Removes the temporary files of a writer that was not finished.
  ~IndexWriter();

  // One document of `count` ids, cut into `num_sequences` sequences (nullptr: one sequence, all of it).
  template <typename Id>
  void add_document(const Id* ids, std::int64_t count, const std::int32_t* lengths, std::int64_t num_sequences);

  // Documents of one sequence each, their ids one after the other.
  template <typename Id>
  void add_documents(const Id* ids, std::int64_t count, const std::int64_t* lengths, std::int64_t num_documents);

  // Hands everything so far to the kernel. What it returns can be continued from, whatever becomes of this process.
  Checkpoint checkpoint();
  // Completes PREFIX.bin.tmp and PREFIX.idx.tmp, on the disk; to be renamed by the caller.
  void complete();
  // Completes both files and gives them their names.
  void finish();
  // Closes the temporary files for a later writer; what came after the last checkpoint may be lost.
  void suspend() noexcept;
  // Removes the temporary files.
  void abort() noexcept;

  std::int64_t num_documents() const { return at_.num_documents; }
  std::int64_t num_sequences() const { return at_.num_sequences; }
  std::int64_t num_tokens() const { return at_.num_tokens; }

 private:
  void check_open() const;
  template <typename Id>
  void write_ids(const Id* ids, std::int64_t count);
  void write_length(std::int64_t length);
  void end_document();
  void spool_implied_bounds();
  void write_pointers();
  void write_document_bounds();

  std::string prefix_;
  int token_bytes_;
  Checkpoint at_;
  std::unique_ptr<BufferedFile> bin_;
  std::unique_ptr<BufferedFile> idx_;
  // Bounds 0, 1, 2, … are implied until the first document that is not exactly one sequence; from then on they are
  // here.
  std::unique_ptr<BufferedFile> bounds_;
};

}  // namespace megatron_7b
