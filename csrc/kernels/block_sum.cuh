// The sum of one number per thread over a block, in a fixed order.
#pragma once

#include "simt.cuh"

namespace dbp {

constexpr size_t block_sum_bytes(int threads) { return sizeof(float) * (threads / kWarp); }

// Valid in thread 0. Uses the first block_sum_bytes(Threads) of the dynamic shared memory, which
// other threads must have finished with.
template <int Threads>
__device__ __forceinline__ float block_sum(float value) {
  for (int lanes = kWarp / 2; lanes > 0; lanes /= 2)
    value += __shfl_xor_sync(0xffffffffu, value, lanes);
  auto sums = shared_array<float>(0, Threads / kWarp);
  if (threadIdx.x % kWarp == 0) sums[threadIdx.x / kWarp] = value;
  __syncthreads();
  float total = 0.0f;
  if (threadIdx.x == 0)
    for (int w = 0; w < Threads / kWarp; ++w) total += sums[w];
  return total;
}

}  // namespace dbp
