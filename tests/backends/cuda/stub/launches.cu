// Launches for the tests with runtime.cpp: each returns what the launcher does.
#include "kernels/gram_matrix_sm90.cuh"
#include "kernels/gram_shift_work.cuh"
#include "kernels/pack.cuh"
#include "lib/kernels.h"

#define EXPORT extern "C" __attribute__((visibility("default")))

alignas(16) static float memory[1024];

EXPORT int launch_gram_shift_sm90() {
  dbp::GramShiftParams p{};
  p.x = memory;
  p.pixels = p.row_stride = p.channels = 64;
  p.size[0] = p.size[1] = 1;
  p.size[2] = 64;
  p.item_count = 1;
  p.block = 64;
  p.dtype = dbp::DType::bf16;
  return dbp::compiled::gram_shift_sm90(p, nullptr);
}

EXPORT int launch_gram_matrix_sm90() {
  dbp::GramMatrixParams p{};
  p.x = memory;
  p.rows = p.row_stride = p.channels = 64;
  p.item_count = 1;
  p.dtype = dbp::DType::fp16;
  return dbp::compiled::gram_matrix_sm90(p, nullptr);
}

// More than 48 KB of shared memory, and less.
EXPORT int launch_gram_shift() {
  dbp::GramShiftParams p{};
  p.x = memory;
  p.pixels = p.row_stride = p.channels = 64;
  p.size[0] = p.size[1] = 1;
  p.size[2] = 64;
  p.item_count = 1;
  p.block = 64;
  p.halo = 640;
  return dbp::compiled::gram_shift(p, nullptr);
}

EXPORT int launch_pack() {
  dbp::PackParams p{};
  p.x = p.out = memory;
  for (int d = 0; d < 4; ++d) p.size[d] = 1;
  p.channels = p.row = 4;
  return dbp::compiled::pack(p, nullptr);
}
