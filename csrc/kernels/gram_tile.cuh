// The product every second moment is made of, on one warp: accumulators += left^T right over 32
// pixels, operands staged in shared memory as rows of channels, one row per pixel.
//
// "Transposed" costs nothing: ldmatrix.trans (16-bit) or plain loads (fp32, tf32) hand the tensor
// cores both operands with pixels as the inner dimension. A right row may lie anywhere: each lane
// gives the address of one pixel's row, which is how shifts and excluded pixels are expressed.
#pragma once

#include <type_traits>

#include "simt.cuh"

namespace dbp {

template <DType K>
using Element =
    std::conditional_t<K == DType::bf16, bf16, std::conditional_t<K == DType::fp16, fp16, float>>;

__host__ __device__ constexpr uint32_t element_bytes(DType k) {
  return k == DType::fp16 || k == DType::bf16 ? 2 : 4;
}

// Bytes from one staged row to the next. The padding lets 8 consecutive rows (ldmatrix) or 4
// (32-bit loads of 8 channels) fall into different banks, whatever row they start at.
__host__ __device__ constexpr uint32_t row_pitch(DType k, uint32_t columns) {
  return columns * element_bytes(k) + (element_bytes(k) == 2 ? 16 : 32);
}

constexpr int kStep = 32;  // pixels of one `multiply`

// acc[s][m][r] belongs to left channel 16 m + tile_row(r) and channel tile_column(r) of right s.
__device__ __forceinline__ int tile_row(int r) {
  return static_cast<int>(threadIdx.x % 32 / 4) + r / 2 * 8;
}
__device__ __forceinline__ int tile_column(int r) {
  return 2 * static_cast<int>(threadIdx.x % 4) + r % 2;
}

// acc[s] += left^T right[s] for every s whose bit in `active` is set (the same in all lanes).
// `left` is the shared address of the first of 32 rows `pitch` apart, at the first of 16 M
// channels. right[s] is that of this lane's pixel, at the first of 8 channels, and readable even if
// not active.
template <DType K, int M, int S>
__device__ __forceinline__ void multiply(float (&acc)[S][M][4], uint32_t left, uint32_t pitch,
                                         const uint32_t (&right)[S], uint32_t active) {
  const uint32_t lane = threadIdx.x % 32, g = lane / 4, q = lane % 4;
  if constexpr (element_bytes(K) == 2) {
    // 8x8 matrices of a 16 x 16 operand, in the order (channel half, pixel half) = 00 10 01 11
    const uint32_t at = left + (lane / 16 * 8 + lane % 8) * pitch + lane / 8 % 2 * 16;
    uint32_t a[2][M][4];
#pragma unroll
    for (int h = 0; h < 2; ++h)
#pragma unroll
      for (int m = 0; m < M; ++m) ldmatrix_x4_trans(a[h][m], at + h * 16 * pitch + m * 32);
    uint32_t b[2][4];  // loaded one s ahead
    ldmatrix_x4_trans(b[0], right[0]);
#pragma unroll
    for (int s = 0; s < S; ++s) {
      if (s + 1 < S) ldmatrix_x4_trans(b[(s + 1) % 2], right[s + 1]);
      if (!(active >> s & 1)) continue;
      const auto& now = b[s % 2];
      const uint32_t low[2] = {now[0], now[1]}, high[2] = {now[2], now[3]};
#pragma unroll
      for (int m = 0; m < M; ++m) mma<Element<K>>(acc[s][m], a[0][m], low);
#pragma unroll
      for (int m = 0; m < M; ++m) mma<Element<K>>(acc[s][m], a[1][m], high);
    }
  } else if constexpr (K == DType::tf32) {
#pragma unroll
    for (int k = 0; k < kStep; k += 8) {
      uint32_t a[M][4];
#pragma unroll
      for (int m = 0; m < M; ++m)
#pragma unroll
        for (int r = 0; r < 4; ++r)
          a[m][r] = to_tf32(shared_load<float>(left + (k + q + r / 2 * 4) * pitch +
                                               (16 * m + g + r % 2 * 8) * 4));
#pragma unroll
      for (int s = 0; s < S; ++s) {
        if (!(active >> s & 1)) continue;
        uint32_t b[2];
#pragma unroll
        for (int r = 0; r < 2; ++r) {
          const uint32_t row = __shfl_sync(0xffffffffu, right[s], k + q + 4 * r);
          b[r] = to_tf32(shared_load<float>(row + 4 * g));
        }
#pragma unroll
        for (int m = 0; m < M; ++m) mma<float>(acc[s][m], a[m], b);
      }
    }
  } else {
#pragma unroll 2
    for (int k = 0; k < kStep; ++k) {
      float a[2 * M];
#pragma unroll
      for (int m = 0; m < 2 * M; ++m) a[m] = shared_load<float>(left + k * pitch + (8 * m + g) * 4);
#pragma unroll
      for (int s = 0; s < S; ++s) {
        if (!(active >> s & 1)) continue;
        const uint32_t row = __shfl_sync(0xffffffffu, right[s], k);
        const float2 b = shared_load<float2>(row + 8 * q);
#pragma unroll
        for (int m = 0; m < M; ++m)
#pragma unroll
          for (int r = 0; r < 4; ++r) acc[s][m][r] += a[2 * m + r / 2] * (r % 2 ? b.y : b.x);
      }
    }
  }
}

// Writes one warp's accumulators to a (block, block) tile of the workspace, at (row, column).
template <int M>
__device__ __forceinline__ void store_partial(Global<void> workspace, int64_t slot, int block,
                                              int row, int column, const float (&acc)[M][4]) {
  auto out = cast<float2>(workspace);
#pragma unroll
  for (int m = 0; m < M; ++m)
#pragma unroll
    for (int r = 0; r < 4; r += 2) {
      const int64_t at =
          (slot * block + row + 16 * m + tile_row(r)) * block + column + tile_column(0);
      out[at / 2] = make_float2(acc[m][r], acc[m][r + 1]);
    }
}

}  // namespace dbp
