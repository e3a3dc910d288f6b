// C = A^T B on sm_90a: one producer warp, one consumer warpgroup, two stages. A and B are rows of
// channels, as in channels-last data, of any number of rows and columns (TMA reads zeros outside).
#pragma once

#include "sm90.cuh"

namespace toy {

using namespace dbp;

struct Sm90Params {
  TensorMap a, b;     // (rows, columns); boxes of 64 columns or fewer and 32 rows
  Global<float> out;  // (64, Columns)
  int tiles;
};

enum Sm90Defect {
  whole,
  reads_before_copy,        // consumers do not wait for the stage
  overwrites_too_early,     // the producer does not wait for the consumers
  frees_before_wgmma_ends,  // consumers release the stage before they wait for their wgmma
  expects_too_much,         // a phase that never ends
  no_barrier_after_init,
  uses_results_too_early,
};

constexpr int kRows = 32, kStages = 2;

// Width: bytes of a swizzled row; operands wider than that are several boxes side by side.
template <class T, int Columns, int Width, int Broken>
__global__ void __launch_bounds__(160, 1) sm90_kernel(const __grid_constant__ Sm90Params p) {
  constexpr int kBox = Width / 2;  // columns of one box
  constexpr uint32_t kBoxBytes = kRows * Width, kA = 64 / kBox * kBoxBytes,
                     kB = Columns / kBox * kBoxBytes, kStage = kA + kB;
  constexpr auto kSwizzle = static_cast<Swizzle>(Width);
  const uint32_t base = shared_address(shared_array<unsigned char>(0, 1));
  const uint32_t full = base + kStages * kStage, empty = full + 8 * kStages;
  if (threadIdx.x == 0)
    for (int s = 0; s < kStages; ++s) {
      mbarrier_init(full + 8 * s, 1);
      mbarrier_init(empty + 8 * s, 4);
    }
  if (Broken != no_barrier_after_init) __syncthreads();

  if (threadIdx.x >= 128) {
    if (threadIdx.x > 128) return;
    for (int t = 0; t < p.tiles; ++t) {
      const int s = t % kStages;
      if (Broken != overwrites_too_early) mbarrier_wait(empty + 8 * s, (t / kStages + 1) & 1);
      mbarrier_expect(full + 8 * s, kStage + (Broken == expects_too_much ? 16 : 0));
      for (int c = 0; c < 64; c += kBox) {
        const int32_t at[2] = {c, t * kRows};
        tma_load(base + s * kStage + c / kBox * kBoxBytes, p.a, full + 8 * s, at);
      }
      for (int c = 0; c < Columns; c += kBox) {
        const int32_t at[2] = {c, t * kRows};
        tma_load(base + s * kStage + kA + c / kBox * kBoxBytes, p.b, full + 8 * s, at);
      }
    }
    return;
  }

  float d[Columns / 2] = {};
  const int lane = threadIdx.x % 32;
  for (int t = 0; t < p.tiles; ++t) {
    const int s = t % kStages;
    if (Broken != reads_before_copy) mbarrier_wait(full + 8 * s, t / kStages & 1);
    wgmma_fence();
    for (int k = 0; k < kRows; k += 16) {
      const uint32_t at = base + s * kStage + k * Width;
      wgmma<T, Columns>(d, wgmma_descriptor(at, kBoxBytes, 8 * Width, kSwizzle),
                        wgmma_descriptor(at + kA, kBoxBytes, 8 * Width, kSwizzle));
    }
    wgmma_commit();
    if (Broken == frees_before_wgmma_ends && lane == 0) mbarrier_arrive(empty + 8 * s);
    if (Broken != uses_results_too_early) wgmma_wait<0>();
    wgmma_pin(d);
    if (Broken != frees_before_wgmma_ends && lane == 0) mbarrier_arrive(empty + 8 * s);
  }
  const int row = threadIdx.x / 32 * 16 + lane / 4, column = lane % 4 * 2;
  for (int i = 0; i < Columns / 2; ++i)
    p.out[(row + i % 4 / 2 * 8) * Columns + i / 4 * 8 + column + i % 2] = d[i];
  if (Broken == uses_results_too_early) wgmma_wait<0>();
}

struct Sm90Arguments {
  Global<const void> a, b;
  Global<float> out;
  int rows, columns_a, columns_b, broken, width;
  DType dtype;
};

template <class T, int Columns, int Width>
cudaError_t launch_sm90_as(const Sm90Arguments& a, const Sm90Params& p) {
  void (*kernels[])(Sm90Params) = {
      sm90_kernel<T, Columns, Width, whole>,
      sm90_kernel<T, Columns, Width, reads_before_copy>,
      sm90_kernel<T, Columns, Width, overwrites_too_early>,
      sm90_kernel<T, Columns, Width, frees_before_wgmma_ends>,
      sm90_kernel<T, Columns, Width, expects_too_much>,
      sm90_kernel<T, Columns, Width, no_barrier_after_init>,
      sm90_kernel<T, Columns, Width, uses_results_too_early>,
  };
  const size_t shared = kStages * kRows * 2 * (64 + Columns) + 16 * kStages;
  return launch(kernels[a.broken], dim3(1), dim3(160), shared, nullptr, p);
}

// The tensors have the pitch of their columns, which must be a multiple of 8.
inline cudaError_t launch_sm90(const Sm90Arguments& a) {
  Sm90Params p{};
  p.out = a.out;
  p.tiles = ceil_div(a.rows, kRows);
  const int columns = ceil_div(a.columns_b, 32) * 32;
  const int32_t box[2] = {a.width / 2, kRows};
  const int64_t size_a[2] = {a.columns_a, a.rows}, size_b[2] = {a.columns_b, a.rows};
  const int64_t pitch_a[1] = {2 * a.columns_a}, pitch_b[1] = {2 * a.columns_b};
  const auto swizzle = static_cast<Swizzle>(a.width);
  cudaError_t error = make_tensor_map(p.a, a.dtype, a.a, 2, size_a, pitch_a, box, swizzle);
  if (error != cudaSuccess) return error;
  error = make_tensor_map(p.b, a.dtype, a.b, 2, size_b, pitch_b, box, swizzle);
  if (error != cudaSuccess) return error;
  if (a.dtype == DType::fp16 && columns == 64 && a.width == 128)
    return launch_sm90_as<fp16, 64, 128>(a, p);
  if (a.dtype == DType::bf16 && columns == 64 && a.width == 128)
    return launch_sm90_as<bf16, 64, 128>(a, p);
  if (a.dtype == DType::bf16 && columns == 128 && a.width == 128)
    return launch_sm90_as<bf16, 128, 128>(a, p);
  if (a.dtype == DType::bf16 && columns == 32 && a.width == 64)
    return launch_sm90_as<bf16, 32, 64>(a, p);
  return cudaErrorNotSupported;
}

// --- Operands written by the threads themselves ----------------------------------------------

struct ByHandParams {
  Global<const bf16> a, b;  // (16, 64) and (16, 32)
  Global<float> out;        // (64, 32)
};

// Two warpgroups: one writes the operands, the other multiplies; a named barrier between them.
template <int Threads>
__global__ void __launch_bounds__(Threads) by_hand_kernel(ByHandParams p) {
  auto a = shared_array<bf16>(0, 16 * 64), b = shared_array<bf16>(2048, 16 * 32);
  const int thread = threadIdx.x % 128, lane = thread % 32;
  auto swizzled = [](int row, int column, int width) {  // in elements of 2 bytes
    const int at = row * width + 2 * column;
    return (at ^ (at >> 7 & (width / 16 - 1)) << 4) / 2;
  };
  if (threadIdx.x < 128) {
    for (int e = thread; e < 16 * 64; e += 128) a[swizzled(e / 64, e % 64, 128)] = p.a[e];
    for (int e = thread; e < 16 * 32; e += 128) b[swizzled(e / 32, e % 32, 64)] = p.b[e];
    fence_async_proxy();
    named_barrier(1, Threads);
    return;
  }
  named_barrier(1, Threads);
  float d[16] = {};
  wgmma_fence();
  wgmma<bf16, 32>(d, wgmma_descriptor(shared_address(a), 2048, 1024, Swizzle::bytes128),
                  wgmma_descriptor(shared_address(b), 1024, 512, Swizzle::bytes64));
  wgmma_commit();
  wgmma_wait<0>();
  wgmma_pin(d);
  const int row = thread / 32 * 16 + lane / 4, column = lane % 4 * 2;
  for (int i = 0; i < 16; ++i)
    p.out[(row + i % 4 / 2 * 8) * 32 + i / 4 * 8 + column + i % 2] = d[i];
}

inline cudaError_t launch_by_hand(const ByHandParams& p) {
  return launch(by_hand_kernel<256>, dim3(1), dim3(256), 4096, nullptr, p);
}

}  // namespace toy
