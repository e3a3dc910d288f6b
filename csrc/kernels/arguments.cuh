// Host: what launchers check about their arguments. A kernel's `<name>_problem` finds the first
// field that it cannot take, its `<name>_sizes` tells how large its arrays are; the torch ops turn
// both into messages.
#pragma once

#include <array>
#include <cstdint>
#include <initializer_list>
#include <limits>

namespace dbp {

struct Problem {
  bool found;
  const char* argument;
  int64_t value;
  const char* expected;
};

inline Problem first_problem(std::initializer_list<Problem> problems) {
  for (const Problem& problem : problems)
    if (problem.found) return problem;
  return {};
}

struct ArraySize {
  const char* name;
  int64_t elements;
  bool exact;  // else at least so many
};

// The product; the largest number if that is exceeded or a factor is negative.
inline int64_t elements(std::initializer_list<int64_t> factors) {
  int64_t product = 1;
  for (int64_t factor : factors)
    if (factor < 0 || __builtin_mul_overflow(product, factor, &product))
      return std::numeric_limits<int64_t>::max();
  return product;
}

// Pixels, patches or rows, over all images: kernels number them, and what they read ahead, in
// int32.
constexpr int64_t kMaxPixels = 0x7fff0000;

}  // namespace dbp
