// Small kernels for the tests of the emulation itself: correct ones, and broken ones it must catch.
#pragma once

#include "sm90.cuh"

namespace toy {

using namespace dbp;

// --- A reversal through shared memory --------------------------------------------------------

struct ReverseParams {
  Global<const float> x;
  Global<float> out;
  int n;
};

template <bool Barrier>
__global__ void reverse_kernel(ReverseParams p) {
  auto tile = shared_array<float>(0, p.n);
  const int i = threadIdx.x;
  tile[i] = p.x[i];
  if (Barrier) __syncthreads();
  p.out[i] = tile[p.n - 1 - i];
}

// --- Neighbour sums from a tile with halo ----------------------------------------------------

struct StencilParams {
  Global<const float> x;  // n + 2
  Global<float> out;      // n
  int n;
};

template <int Halo>  // 2 is right
__global__ void stencil_kernel(StencilParams p) {
  const int tile = blockDim.x, start = blockIdx.x * tile;
  auto staged = shared_array<float>(0, tile + 2);
  for (int i = threadIdx.x; i < tile + Halo && start + i < p.n + 2; i += tile)
    staged[i] = p.x[start + i];
  __syncthreads();
  const int i = threadIdx.x;
  if (start + i < p.n) p.out[start + i] = staged[i] + staged[i + 1] + staged[i + 2];
}

// --- A pipelined copy by cp.async ------------------------------------------------------------

struct PipelineParams {
  Global<const float> x;
  Global<float> out;
  int tiles;
};

enum Defect { none, no_wait, late_wait, no_barrier_before, no_barrier_after };

template <int Broken>
__global__ void pipeline_kernel(PipelineParams p) {
  constexpr int kStages = 2;
  const int width = blockDim.x * 4;
  const uint32_t base = shared_address(shared_array<float>(0, kStages * width));
  auto issue = [&](int tile) {
    if (tile < p.tiles)
      cp_async<16>(base + (tile % kStages * width + 4 * threadIdx.x) * 4u,
                   p.x + (int64_t{tile} * width + 4 * threadIdx.x), true);
    cp_async_commit();
  };
  issue(0);
  for (int tile = 0; tile < p.tiles; ++tile) {
    issue(tile + 1);
    if constexpr (Broken == late_wait)
      cp_async_wait<2>();
    else if constexpr (Broken != no_wait)
      cp_async_wait<1>();
    if constexpr (Broken != no_barrier_before) __syncthreads();
    // a value that another thread staged
    const int mine = (threadIdx.x + 1) % blockDim.x;
    const float4 v = shared_load<float4>(base + (tile % kStages * width + 4 * mine) * 4u);
    p.out[int64_t{tile} * blockDim.x + threadIdx.x] = v.x + v.y + v.z + v.w;
    if constexpr (Broken != no_barrier_after) __syncthreads();
  }
  cp_async_wait<0>();
}

// --- C = A^T B by tensor cores: A (16 x 16), B (16 x 8), one warp, k-major as channels-last data
// is ---

struct ProductParams {
  Global<const void> a, b;
  Global<float> out;
  int transposed;  // 0: reads A (row, k) directly, 1: A (k, row) through ldmatrix.trans
};

template <class T>
__global__ void product_kernel(ProductParams p) {
  auto a = cast<const T>(p.a), b = cast<const T>(p.b);
  auto tile_a = shared_array<T>(0, 256), tile_b = shared_array<T>(512, 128);
  const int lane = threadIdx.x;
  for (int i = lane; i < 256; i += 32) tile_a[i] = a[i];
  for (int i = lane; i < 128; i += 32) tile_b[i] = b[i];
  __syncwarp();
  uint32_t fa[4], fb[2];
  const uint32_t at_a = shared_address(tile_a), at_b = shared_address(tile_b);
  const int row = lane % 8, matrix = lane / 8;
  if (p.transposed)  // matrices in the order (row half, k half) = 00 10 01 11; stored (k, row)
    ldmatrix_x4_trans(fa, at_a + ((row + matrix / 2 * 8) * 16 + matrix % 2 * 8) * 2);
  else
    ldmatrix_x4(fa, at_a + ((row + matrix % 2 * 8) * 16 + matrix / 2 * 8) * 2);
  ldmatrix_x2_trans(fb, at_b + (lane % 16) * 8 * 2);
  float c[4] = {0, 0, 0, 0};
  mma<T>(c, fa, fb);
  const int g = lane / 4, q = lane % 4;
  p.out[g * 8 + 2 * q] = c[0];
  p.out[g * 8 + 2 * q + 1] = c[1];
  p.out[(g + 8) * 8 + 2 * q] = c[2];
  p.out[(g + 8) * 8 + 2 * q + 1] = c[3];
}

template <>
__global__ void product_kernel<float>(ProductParams p) {  // tf32: A (16 x 8), B (8 x 8)
  auto a = cast<const float>(p.a), b = cast<const float>(p.b);
  const int g = threadIdx.x / 4, q = threadIdx.x % 4;
  const uint32_t fa[4] = {to_tf32(a[g * 8 + q]), to_tf32(a[(g + 8) * 8 + q]),
                          to_tf32(a[g * 8 + q + 4]), to_tf32(a[(g + 8) * 8 + q + 4])};
  const uint32_t fb[2] = {to_tf32(b[q * 8 + g]), to_tf32(b[(q + 4) * 8 + g])};
  float c[4] = {0, 0, 0, 0};
  mma<float>(c, fa, fb);
  for (int i = 0; i < 4; ++i) p.out[(g + i / 2 * 8) * 8 + 2 * q + i % 2] = c[i];
}

// --- Shuffles, conversions, and plain mistakes -----------------------------------------------

struct MapParams {
  Global<const float> x;
  Global<void> out;
  int n, what;
};

template <class T>
__global__ void convert_kernel(MapParams p) {
  const int64_t i = int64_t{blockIdx.x} * blockDim.x + threadIdx.x;
  if (i < p.n) cast<T>(p.out)[i] = from_float<T>(p.x[i]);
}

template <int Threads>
__global__ void shuffle_kernel(MapParams p) {
  float v = p.x[threadIdx.x];
  for (int step = 16; step; step /= 2) v += __shfl_xor_sync(0xffffffffu, v, step);
  v += __shfl_sync(0xffffffffu, static_cast<float>(threadIdx.x), 3);
  v += __shfl_down_sync(0xffffffffu, static_cast<float>(threadIdx.x), 1);
  cast<float>(p.out)[threadIdx.x] = v;
}

enum Mistake {
  read_past_end,
  write_before_start,
  shared_past_array,
  misaligned_vector,
  blocks_overlap,
  divergent_barrier,
  partial_warp,
  shared_past_block,
};

template <int Threads>
__global__ void mistake_kernel(MapParams p) {
  auto out = cast<float>(p.out);
  auto first = shared_array<float>(0, 32);
  const int lane = threadIdx.x;
  first[lane] = 1.0f;
  shared_array<float>(128, 32)[lane] = 2.0f;
  __syncthreads();
  if (p.what == read_past_end) out[lane] = p.x[p.n - 31 + lane];
  if (p.what == write_before_start) out[lane - 1] = 0.0f;
  if (p.what == shared_past_array) out[lane] = first[lane + 1];
  if (p.what == misaligned_vector) out[lane] = bits_float(load16(p.x + lane).x);
  if (p.what == blocks_overlap) out[lane] = static_cast<float>(blockIdx.x);
  if (p.what == divergent_barrier && lane < 16) __shfl_sync(0xffffffffu, 1.0f, 0);
  if (p.what == divergent_barrier && lane >= 16) __syncthreads();
  if (p.what == partial_warp && lane < 16) __syncwarp();
  if (p.what == shared_past_block) out[lane] = shared_load<float>(4 * (lane + 33));
}

// --- Launchers -------------------------------------------------------------------------------

inline cudaError_t launch_reverse(const ReverseParams& p, bool barrier) {
  return launch(barrier ? reverse_kernel<true> : reverse_kernel<false>, dim3(1), dim3(p.n), 4 * p.n,
                nullptr, p);
}

inline cudaError_t launch_stencil(const StencilParams& p, int halo) {
  const int tile = 64;
  return launch(halo == 2 ? stencil_kernel<2> : stencil_kernel<1>, dim3(ceil_div(p.n, tile)),
                dim3(tile), (tile + 2) * 4, nullptr, p);
}

inline cudaError_t launch_pipeline(const PipelineParams& p, int broken) {
  void (*kernels[])(PipelineParams) = {
      pipeline_kernel<none>, pipeline_kernel<no_wait>, pipeline_kernel<late_wait>,
      pipeline_kernel<no_barrier_before>, pipeline_kernel<no_barrier_after>};
  return launch(kernels[broken], dim3(1), dim3(64), 2 * 64 * 16, nullptr, p);
}

inline cudaError_t launch_product(const ProductParams& p, DType dtype) {
  auto kernel = dtype == DType::bf16   ? product_kernel<bf16>
                : dtype == DType::fp16 ? product_kernel<fp16>
                                       : product_kernel<float>;
  return launch(kernel, dim3(1), dim3(32), 768, nullptr, p);
}

inline cudaError_t launch_convert(const MapParams& p, DType dtype) {
  return launch(dtype == DType::bf16 ? convert_kernel<bf16> : convert_kernel<fp16>,
                dim3(ceil_div(p.n, 128)), dim3(128), 0, nullptr, p);
}

inline cudaError_t launch_shuffle(const MapParams& p) {
  return launch(shuffle_kernel<32>, dim3(1), dim3(32), 0, nullptr, p);
}

inline cudaError_t launch_mistake(const MapParams& p) {
  return launch(mistake_kernel<32>, dim3(p.what == blocks_overlap ? 2 : 1), dim3(32), 256, nullptr,
                p);
}

}  // namespace toy
