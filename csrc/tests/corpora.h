// Small corpora in a temporary folder that is removed at the end.
#pragma once

#include <stdlib.h>

#include <cstdint>
#include <filesystem>
#include <string>
#include <vector>

#include "megatron_7b/index_writer.h"

namespace megatron_7b::test {

class TemporaryFolder {
 public:
  TemporaryFolder() {
    std::string pattern = (std::filesystem::temp_directory_path() / "megatron_7b.XXXXXX").string();
    path_ = ::mkdtemp(pattern.data());
  }
  ~TemporaryFolder() { std::filesystem::remove_all(path_); }
  TemporaryFolder(const TemporaryFolder&) = delete;
  TemporaryFolder& operator=(const TemporaryFolder&) = delete;
  std::string operator/(const std::string& name) const { return (path_ / name).string(); }

 private:
  std::filesystem::path path_;
};

using Documents = std::vector<std::vector<std::int32_t>>;

inline void write_corpus(const std::string& prefix, const Documents& documents, int token_bytes) {
  IndexWriter writer(prefix, token_bytes);
  for (const auto& document : documents) {
    writer.add_document(document.data(), static_cast<std::int64_t>(document.size()), nullptr, 0);
  }
  writer.finish();
}

// Documents of 0 to 40 tokens; the ids count up, so that each occurs once.
inline Documents numbered_documents(std::size_t count) {
  Documents documents(count);
  std::int32_t id = 0;
  for (std::size_t i = 0; i < count; ++i) {
    for (std::size_t length = (i * 7919) % 41; length > 0; --length) {
      documents[i].push_back(id++);
    }
  }
  return documents;
}

}  // namespace megatron_7b::test
