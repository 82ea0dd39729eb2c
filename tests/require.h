// The one assertion of the C++ tests: it holds in release builds, too.

#pragma once

#include <cstdio>
#include <cstdlib>

#define REQUIRE(condition)                                                       \
  do {                                                                           \
    if (!(condition)) {                                                          \
      std::fprintf(stderr, "line %d: %s does not hold\n", __LINE__, #condition); \
      std::exit(1);                                                              \
    }                                                                            \
  } while (false)
