// Runs every test, or those whose names contain the argument.
#include <cstdio>
#include <cstring>

#include "check.h"

int main(int argc, char** argv) {
  int count = 0;
  for (const auto& test : megatron_7b::test::all_tests()) {
    if (argc < 2 || std::strstr(test.name, argv[1]) != nullptr) {
      std::printf("%s\n", test.name);
      std::fflush(stdout);
      test.run();
      ++count;
    }
  }
  std::printf("%d native tests passed\n", count);
  return count > 0 ? 0 : 1;
}
