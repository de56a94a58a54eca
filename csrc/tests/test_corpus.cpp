#include <fstream>
#include <iterator>
#include <random>
#include <system_error>

#include "check.h"
#include "corpora.h"
#include "megatron_7b/corpus.h"
#include "megatron_7b/error.h"

using namespace megatron_7b;
using test::TemporaryFolder;

namespace {

std::string read_file(const std::string& path) {
  std::ifstream stream(path, std::ios::binary);
  return {std::istreambuf_iterator<char>(stream), {}};
}

void write_file(const std::string& path, const std::string& content) {
  std::ofstream(path, std::ios::binary).write(content.data(), static_cast<std::streamsize>(content.size()));
}

// Uses everything that a reader of an accepted corpus may use.
std::int64_t touch(const Corpus& corpus) {
  std::int64_t sum = corpus.id_range().second;
  for (std::int64_t i = 0; i < corpus.num_sequences(); ++i) {
    const std::uint8_t* data = corpus.bin() + corpus.pointer(i);
    for (std::int64_t byte = 0; byte < corpus.length(i) * corpus.token_bytes(); ++byte) {
      sum += data[byte];
    }
  }
  for (std::int64_t i = 0; i < corpus.num_documents(); ++i) {
    sum += corpus.document_begin(i) + corpus.document_at(i);
  }
  return sum;
}

}  // namespace

TEST(what_is_written_is_read) {
  const TemporaryFolder folder;
  const auto documents = test::numbered_documents(3000);
  for (const int token_bytes : {2, 4}) {
    test::write_corpus(folder / "a", documents, token_bytes);
    const Corpus corpus(folder / "a", true);
    CHECK(corpus.is_contiguous());
    CHECK(corpus.num_documents() == 3000);
    std::int64_t begin = 0;
    for (std::size_t i = 0; i < documents.size(); ++i) {
      const auto document = static_cast<std::int64_t>(i);
      CHECK(corpus.length(document) == static_cast<std::int64_t>(documents[i].size()));
      CHECK(corpus.document_begin(document) == begin);
      if (!documents[i].empty()) {
        CHECK(corpus.document_at(begin) == document);
      }
      begin += corpus.length(document);
      if (!documents[i].empty()) {
        CHECK(corpus.document_at(begin - 1) == document);
      }
    }
    CHECK(corpus.id_range() == std::make_pair(std::int64_t{0}, begin - 1));
  }
}

TEST(a_writer_that_died_is_continued) {
  const TemporaryFolder folder;
  const auto documents = test::numbered_documents(40);
  const std::vector<std::int32_t> halves{1, 2};
  const std::vector<std::int32_t> ids{7, 8, 9};
  // Two sequences per document from number `several` on: before, at or behind the place where the first writer stops.
  for (const std::size_t several : {10U, 20U, 30U, 100U}) {
    const auto write = [&](IndexWriter& writer, std::size_t begin, std::size_t end) {
      for (std::size_t i = begin; i < end; ++i) {
        if (i >= several) {
          writer.add_document(ids.data(), 3, halves.data(), 2);
        } else {
          writer.add_document(documents[i].data(), static_cast<std::int64_t>(documents[i].size()), nullptr, 0);
        }
      }
    };
    {
      IndexWriter writer(folder / "whole", 2);
      write(writer, 0, 40);
      writer.finish();
    }
    IndexWriter::Checkpoint at;
    {
      IndexWriter writer(folder / "cut", 2);
      write(writer, 0, 20);
      at = writer.checkpoint();
      write(writer, 5, 17);  // What came behind the checkpoint is cut off.
      writer.suspend();
    }
    {
      IndexWriter writer(folder / "cut", 2, at);
      write(writer, 20, 40);
      writer.finish();
    }
    for (const char* suffix : {".bin", ".idx"}) {
      CHECK(read_file((folder / "cut") + suffix) == read_file((folder / "whole") + suffix));
    }
    CHECK(!std::filesystem::exists((folder / "cut") + ".bounds.tmp"));
  }
  IndexWriter::Checkpoint missing;
  CHECK_THROWS(std::system_error, IndexWriter(folder / "absent", 2, missing));
  write_file((folder / "short") + ".bin.tmp", "abc");
  missing.num_tokens = 2;
  CHECK_THROWS(FormatError, IndexWriter(folder / "short", 2, missing));
}

TEST(documents_of_several_sequences) {
  const TemporaryFolder folder;
  const std::vector<std::int64_t> ids{1, 2, 3, 4, 5};
  const std::vector<std::int32_t> lengths{2, 0, 3};
  {
    IndexWriter writer(folder / "a", 4);
    writer.add_document(ids.data(), 5, nullptr, 0);
    writer.add_document(ids.data(), 5, lengths.data(), 3);
    writer.add_document(ids.data(), 0, lengths.data(), 0);
    writer.finish();
  }
  const Corpus corpus(folder / "a", true);
  CHECK(corpus.num_sequences() == 4);
  CHECK(corpus.num_documents() == 3);
  CHECK(corpus.bound(2) == 4 && corpus.bound(3) == 4);
  CHECK(corpus.document_begin(1) == 5 && corpus.document_begin(2) == 10);
}

TEST(every_truncation_is_noticed) {
  const TemporaryFolder folder;
  for (const char* suffix : {".idx", ".bin"}) {
    test::write_corpus(folder / "a", {{1, 2, 3}, {}, {4}, {5, 6}}, 2);
    const std::string path = (folder / "a") + suffix;
    const std::string content = read_file(path);
    for (std::size_t length = 0; length < content.size(); ++length) {
      write_file(path, content.substr(0, length));
      CHECK_THROWS(FormatError, Corpus(folder / "a", false));
    }
  }
}

TEST(damaged_indices_never_crash) {
  const TemporaryFolder folder;
  test::write_corpus(folder / "a", {{1, 2, 3}, {}, {4}, {5, 6}, {7, 8, 9}}, 2);
  const std::string path = (folder / "a") + ".idx";
  const std::string content = read_file(path);
  std::mt19937 random(1);
  std::int64_t accepted = 0;
  for (int round = 0; round < 4000; ++round) {
    std::string damaged = content;
    for (int change = 0; change < 1 + round % 3; ++change) {
      damaged[random() % damaged.size()] = static_cast<char>(random() % (round % 2 == 0 ? 256 : 12));
    }
    write_file(path, damaged);
    try {
      const Corpus corpus(folder / "a", true);
      CHECK(touch(corpus) >= 0);
      ++accepted;
    } catch (const FormatError&) {
    }
  }
  CHECK(accepted < 2000);
}

TEST(writer_refuses_what_it_cannot_store) {
  const TemporaryFolder folder;
  IndexWriter writer(folder / "a", 2);
  const std::int64_t large = 65536;
  CHECK_THROWS(FormatError, writer.add_document(&large, 1, nullptr, 0));
  const std::vector<std::int64_t> lengths{1, -1, 1};
  CHECK_THROWS(std::invalid_argument, writer.add_documents(&large, 1, lengths.data(), 3));
  CHECK_THROWS(std::invalid_argument, IndexWriter(folder / "b", 3));
  writer.abort();
  CHECK_THROWS(std::logic_error, writer.finish());
}
