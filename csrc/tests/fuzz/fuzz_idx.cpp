// libFuzzer target: whatever bytes an .idx holds, opening and reading the corpus succeeds or throws FormatError.
//
// Input: one byte of flags, two bytes of .bin length (little endian), then the .idx itself. The .bin is a counting
// pattern of that length. Built by fuzz.sh with a low MEGATRON_7B_FULLY_CHECKED, so that small files go through what
// large ones do, whose entries are not all checked when they are opened.
#include <unistd.h>

#include <cstdio>
#include <cstdlib>
#include <memory>
#include <string>
#include <vector>

#include "megatron_7b/batcher.h"
#include "megatron_7b/corpus.h"
#include "megatron_7b/error.h"
#include "replay.h"

using namespace megatron_7b;

namespace {

constexpr std::size_t kHeaderOfInput = 3;

void write_file(const std::string& path, const std::uint8_t* data, std::size_t size) {
  std::FILE* file = std::fopen(path.c_str(), "wb");
  if (file == nullptr || (size > 0 && std::fwrite(data, 1, size, file) != size) || std::fclose(file) != 0) {
    std::perror(path.c_str());
    std::abort();
  }
}

const std::string& prefix() {
  static const std::string path = [] {
    const char* folder = std::getenv("TMPDIR");
    return std::string(folder != nullptr ? folder : "/tmp") + "/fuzz_idx_" + std::to_string(::getpid());
  }();
  return path;
}

void remove_files() {
  ::unlink(idx_path(prefix()).c_str());
  ::unlink(bin_path(prefix()).c_str());
}

// One microbatch with everything on, from the beginning and from far down the epochs.
void read_batches(const std::shared_ptr<const Corpus>& corpus, std::int64_t seq_length, bool shuffle) {
  std::vector<TokenStream> streams;
  streams.emplace_back(corpus, 0, corpus->num_documents(), seq_length, 1, shuffle);
  BatchOptions options;
  options.masked_eod = 0;
  options.document_boundaries = options.reset_position_ids = true;
  options.fill_in_the_middle = FillInTheMiddle{0.5, 0.5, 1, 2, 3, 0, 9};
  const Batcher batcher(streams, nullptr, seq_length, options);
  BufferPool pool(1);
  BufferPool::Buffer buffer = pool.take(Batcher::batch_bytes(2, seq_length));
  const std::int64_t indices[2] = {0, 123456};
  batcher.assemble(indices, 2, batcher.view(buffer.data.get(), 2));
}

void read_everything(const std::shared_ptr<const Corpus>& corpus, std::int64_t seq_length) {
  corpus->id_range();
  if (!corpus->is_contiguous()) {
    return;
  }
  for (std::int64_t document = 0; document <= corpus->num_documents(); ++document) {
    const std::int64_t begin = corpus->document_begin(document);
    if (begin < 0 || begin > corpus->num_tokens()) {
      std::abort();
    }
  }
  read_batches(corpus, seq_length, true);
  read_batches(corpus, seq_length, false);
}

}  // namespace

extern "C" int LLVMFuzzerTestOneInput(const std::uint8_t* data, std::size_t size) {
  if (size < kHeaderOfInput) {
    return 0;
  }
  prefix();  // Made before the handler is registered, so that it is still there when the handler runs.
  static const int registered = std::atexit(remove_files);
  static_cast<void>(registered);
  std::vector<std::uint8_t> bin(static_cast<std::size_t>(data[1] | data[2] << 8));
  for (std::size_t i = 0; i < bin.size(); ++i) {
    bin[i] = static_cast<std::uint8_t>(i % 2 == 0 ? i / 2 % 100 : 0);
  }
  write_file(idx_path(prefix()), data + kHeaderOfInput, size - kHeaderOfInput);
  write_file(bin_path(prefix()), bin.data(), bin.size());
  try {
    read_everything(std::make_shared<const Corpus>(prefix(), (data[0] & 1) != 0), 1 + (data[0] >> 1));
  } catch (const FormatError&) {
    // What a damaged file must end in. Anything else ends the process.
  }
  return 0;
}
