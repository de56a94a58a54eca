// Files by their descriptor: a read-only map, and a buffered writer. Every failure is a FormatError or
// std::system_error that names the path.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>
#include <vector>

namespace megatron_7b {

[[noreturn]] void throw_errno(const std::string& action, const std::string& path);

// A whole file mapped for reading. An empty file maps to nothing.
class MappedFile {
 public:
  explicit MappedFile(const std::string& path);
  ~MappedFile();
  MappedFile(const MappedFile&) = delete;
  MappedFile& operator=(const MappedFile&) = delete;

  const std::uint8_t* data() const { return data_; }
  std::int64_t size() const { return size_; }
  const std::string& path() const { return path_; }

  // Tells the kernel to read single pages instead of their neighbourhood too, or to go back to that.
  void expect_scattered_reads(bool scattered) const;
  // Begins to read the page of an address of the map.
  void prefetch(const std::uint8_t* address) const;

 private:
  std::string path_;
  const std::uint8_t* data_ = nullptr;
  std::int64_t size_ = 0;
};

// A file written through a large buffer: a new one, or one that is continued.
class BufferedFile {
 public:
  explicit BufferedFile(const std::string& path);
  // Keeps the first `kept_bytes` of a file that is there, and continues after them.
  BufferedFile(const std::string& path, std::int64_t kept_bytes);
  ~BufferedFile();
  BufferedFile(const BufferedFile&) = delete;
  BufferedFile& operator=(const BufferedFile&) = delete;

  void write(const void* data, std::size_t bytes);
  // Writes over bytes that were written before.
  void write_at(std::int64_t offset, const void* data, std::size_t bytes);
  // Reads back bytes that were written before.
  void read_at(std::int64_t offset, void* data, std::size_t bytes);
  // Everything in the page cache: what is there survives this process, though not the machine.
  void flush();
  // Everything on the disk.
  void sync();
  void close();
  void remove();
  const std::string& path() const { return path_; }

 private:
  void write_through(const std::uint8_t* data, std::size_t bytes);

  std::string path_;
  int descriptor_ = -1;
  std::vector<std::uint8_t> buffer_;
  std::size_t filled_ = 0;
  std::int64_t handed_over_ = 0;  // Bytes that the kernel has,
  std::int64_t begun_ = 0;        // and those that it is writing to the disk.
};

// Renames and makes the new name durable.
void publish(const std::string& from, const std::string& to);

}  // namespace megatron_7b
