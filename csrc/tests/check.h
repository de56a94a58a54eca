// As much of a test framework as is needed here: checks that say where they failed, and tests that register themselves.
#pragma once

#include <cstdio>
#include <cstdlib>
#include <vector>

namespace megatron_7b::test {

struct Test {
  const char* name;
  void (*run)();
};

inline std::vector<Test>& all_tests() {
  static std::vector<Test> tests;
  return tests;
}

struct Register {
  Register(const char* name, void (*run)()) { all_tests().push_back({name, run}); }
};

}  // namespace megatron_7b::test

#define TEST(name)                                                       \
  static void name();                                                    \
  static const megatron_7b::test::Register register_##name(#name, name); \
  static void name()

#define CHECK(condition)                                                             \
  do {                                                                               \
    if (!(condition)) {                                                              \
      std::fprintf(stderr, "%s:%d: not true: %s\n", __FILE__, __LINE__, #condition); \
      std::exit(1);                                                                  \
    }                                                                                \
  } while (false)

#define CHECK_THROWS(exception, statement) \
  do {                                     \
    bool thrown = false;                   \
    try {                                  \
      statement;                           \
    } catch (const exception&) {           \
      thrown = true;                       \
    }                                      \
    CHECK(thrown);                         \
  } while (false)
