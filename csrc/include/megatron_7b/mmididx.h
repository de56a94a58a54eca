// Megatron's MMIDIDX format: PREFIX.bin holds token ids and nothing else, PREFIX.idx says where each sequence is.
//
//   offset  type                 content
//        0  char[9]              "MMIDIDX\0\0"
//        9  u64                  version, 1
//       17  u8                   dtype code of the ids
//       18  u64                  number of sequences, n
//       26  u64                  number of document bounds, m = documents + 1
//       34  i32[n]               tokens per sequence
//           i64[n]               byte offset of each sequence in PREFIX.bin
//           i64[m]               first sequence of each document, then n
//           i8[n]                mode of each sequence (multimodal files only)
//
// Little endian; nothing after the header is aligned, hence load_unaligned.
#pragma once

#include <cstdint>
#include <cstring>
#include <string>

namespace megatron_7b {

inline constexpr char kMagic[9] = {'M', 'M', 'I', 'D', 'I', 'D', 'X', '\0', '\0'};
inline constexpr std::uint64_t kVersion = 1;
inline constexpr std::int64_t kHeaderBytes = 34;

enum class TokenType : std::uint8_t { kUint8 = 1, kInt8 = 2, kInt16 = 3, kInt32 = 4, kInt64 = 5, kUint16 = 8 };

// Bytes of one id, or 0 where the code is not one of an integer type.
inline std::int64_t token_bytes(std::uint8_t code) {
  switch (static_cast<TokenType>(code)) {
    case TokenType::kUint8:
    case TokenType::kInt8:
      return 1;
    case TokenType::kInt16:
    case TokenType::kUint16:
      return 2;
    case TokenType::kInt32:
      return 4;
    case TokenType::kInt64:
      return 8;
  }
  return 0;
}

template <typename T>
T load_unaligned(const std::uint8_t* address) {
  T value;
  std::memcpy(&value, address, sizeof(T));
  return value;
}

inline std::string bin_path(const std::string& prefix) { return prefix + ".bin"; }
inline std::string idx_path(const std::string& prefix) { return prefix + ".idx"; }

}  // namespace megatron_7b
