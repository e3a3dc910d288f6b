// update: the epilogue of the update rule. From M = <x x^T> it makes the matrix E of R - lr E R,
//     E_ij = c_weight M_ij,   E_ii = v_weight (M_ii - 1), with idle_weight where M_ii is 0,
// and two sums of each group, of M_ij^2 and of (M_ii - 1)^2, which make the loss and the norm of E.
// In one pass over M and a fixed order of summation: every block writes its part, a second kernel
// adds.
#pragma once

#include "arguments.cuh"
#include "block_sum.cuh"
#include "simt.cuh"

namespace dbp {

struct UpdateParams {
  Global<const float> m;   // (groups, dim, dim)
  Global<float> e;         // the same shape; may be m itself
  Global<float> partials;  // update_workspace_bytes
  Global<float> sums;      // (2, groups): off the diagonal, and on it
  int32_t groups, dim;
  float c_weight, v_weight, idle_weight;
};

namespace update {

constexpr int kThreads = 256, kChunk = 16 * kThreads;  // elements of one block

__host__ __device__ constexpr int64_t chunks(int64_t dim) { return ceil_div(dim * dim, kChunk); }

// One block: kChunk consecutive elements of one group's matrix, Width of them per access.
template <int Width>
__global__ void __launch_bounds__(kThreads) update_kernel(UpdateParams p) {
  const int64_t blocks = chunks(p.dim), elements = int64_t{p.dim} * p.dim;
  const int64_t group = blockIdx.x / blocks;
  const int64_t first = blockIdx.x % blocks * kChunk + int64_t{Width} * threadIdx.x;
  const auto m = p.m + group * elements;
  const auto e = p.e + group * elements;
  const unsigned next_diagonal = p.dim + 1u;  // elements from one diagonal entry to the next
  auto phase = static_cast<unsigned>(first % next_diagonal);
  float off_diagonal = 0.0f, on_diagonal = 0.0f;
  for (int step = 0; step < kChunk / (Width * kThreads); ++step) {
    const int64_t at = first + int64_t{step} * Width * kThreads;
    if (at < elements) {
      float value[Width];
      load_floats(value, m + at);
#pragma unroll
      for (int w = 0; w < Width; ++w) {
        const bool diagonal = (phase + w) % next_diagonal == 0;
        const float off = diagonal ? value[w] - 1.0f : value[w];
        off_diagonal += diagonal ? 0.0f : off * off;
        on_diagonal += diagonal ? off * off : 0.0f;
        const float v_weight = value[w] <= 0.0f ? p.idle_weight : p.v_weight;
        value[w] = (diagonal ? v_weight : p.c_weight) * off;
      }
      store_floats(e + at, value);
    }
    phase = (phase + Width * kThreads) % next_diagonal;
  }
  off_diagonal = block_sum<kThreads>(off_diagonal);
  __syncthreads();
  on_diagonal = block_sum<kThreads>(on_diagonal);
  if (threadIdx.x == 0) {
    p.partials[blockIdx.x] = off_diagonal;
    p.partials[p.groups * blocks + blockIdx.x] = on_diagonal;
  }
}

// One block: one sum of one group.
template <int Threads>
__global__ void __launch_bounds__(Threads) update_sums_kernel(UpdateParams p) {
  const int64_t blocks = chunks(p.dim);
  float sum = 0.0f;
  for (int64_t i = threadIdx.x; i < blocks; i += Threads)
    sum += p.partials[blockIdx.x * blocks + i];
  sum = block_sum<Threads>(sum);
  if (threadIdx.x == 0) p.sums[blockIdx.x] = sum;
}

}  // namespace update

inline size_t update_workspace_bytes(int64_t groups, int64_t dim) {
  return sizeof(float) * static_cast<size_t>(2 * groups * update::chunks(dim));
}

inline Problem update_problem(const UpdateParams& p) {
  return first_problem({
      {p.dim < 0, "dim", p.dim, "0 or more"},
      {p.groups < 0 || elements({p.groups, update::chunks(p.dim)}) > 0x7fffffff, "groups", p.groups,
       "0 or more, and a grid of at most 2147483647 blocks"},
  });
}

inline cudaError_t launch_update(const UpdateParams& p, cudaStream_t stream) {
  if (update_problem(p).found) return cudaErrorInvalidValue;
  const int64_t blocks = p.groups * update::chunks(p.dim);
  // with an even dim every group's matrix is a whole number of 16-byte vectors
  const bool vectors = p.dim % 2 == 0 && aligned16(p.m) && aligned16(p.e);
  const cudaError_t error = launch(vectors ? update::update_kernel<4> : update::update_kernel<1>,
                                   dim3(static_cast<unsigned>(blocks)), dim3(update::kThreads),
                                   block_sum_bytes(update::kThreads), stream, p);
  if (error != cudaSuccess) return error;
  return launch(update::update_sums_kernel<update::kThreads>, dim3(2 * p.groups),
                dim3(update::kThreads), block_sum_bytes(update::kThreads), stream, p);
}

}  // namespace dbp
