// X^T X of a matrix (1x1 convolutions, Linear) for sm_90a, bf16 and fp16, by TMA and wgmma.
//
// A tile of 128 x 128 columns: one warp copies 64 rows at a time (rows and columns that do not
// exist arrive as zeros), two groups of four warps multiply 64 x 128 each, both operands read in
// place: rows of channels are what wgmma calls MN-major. Only tiles on and above the diagonal are
// items; on the diagonal one operand serves as both.
#pragma once

#include "sm90.cuh"

namespace dbp {

struct GramMatrixParams {
  Global<const void> x;         // (rows, row_stride); base and row_stride are multiples of 16 bytes
  Global<void> workspace;       // float32 (slots, 128, 128)
  Global<const int32_t> items;  // (item_count, 6): ignored, tiles i and j, first and last row,
                                // slot; last - first is a multiple of 64 unless last is `rows`
  int64_t rows, row_stride;     // elements
  int32_t channels;             // that may be read: all, padded to a multiple of 16 bytes
  int32_t item_count;
  DType dtype;
};

struct GramMatrixSm90Params {
  GramMatrixParams matrix;
  TensorMap map;  // of x: (channels, rows) in boxes of 64 x 64
};

struct GramMatrixSm90Shape {
  static constexpr int kBlock = 128, kRows = 64, kStages = 4;
  static constexpr int kProducer = 8, kThreads = (kProducer + 1) * kWarp;
  static constexpr uint32_t kHalf = kRows * 128, kOperand = 2 * kHalf;  // 64 and 128 columns
  static constexpr uint32_t kFull = kStages * 2 * kOperand, kEmpty = kFull + kStages * 8;
  static constexpr uint32_t kShared = kEmpty + kStages * 8;
};

template <class T>
__global__ void __launch_bounds__(DBP_SM90_THREADS(GramMatrixSm90Shape::kThreads), 1)
    gram_matrix_sm90_kernel(const __grid_constant__ GramMatrixSm90Params params) {
  using Shape = GramMatrixSm90Shape;
  const GramMatrixParams& p = params.matrix;
  const int thread = threadIdx.x, lane = thread % kWarp, warp = thread / kWarp;
  const auto item = p.items + int64_t{blockIdx.x} * 6;
  const int i = item[1], j = item[2], first = item[3], last = item[4];
  const int64_t slot = item[5];
  const bool same = i == j;
  const int chunks = ceil_div(last - first, Shape::kRows);

  if (thread == 0)
    for (int stage = 0; stage < Shape::kStages; ++stage) {
      mbarrier_init(Shape::kFull + stage * 8, 1);
      mbarrier_init(Shape::kEmpty + stage * 8, Shape::kProducer);
    }
  __syncthreads();

  if (warp == Shape::kProducer) {
    if (lane > 0) return;
    for (int chunk = 0; chunk < chunks; ++chunk) {
      const int stage = chunk % Shape::kStages, row = first + chunk * Shape::kRows;
      const uint32_t full = Shape::kFull + stage * 8, to = stage * 2 * Shape::kOperand;
      mbarrier_wait(Shape::kEmpty + stage * 8, (chunk / Shape::kStages & 1) ^ 1);
      mbarrier_expect(full, (same ? 1 : 2) * Shape::kOperand);
      for (int h = 0; h < 2; ++h) {
        tma_load(to + h * Shape::kHalf, params.map, full, {i * Shape::kBlock + h * 64, row});
        if (!same)
          tma_load(to + Shape::kOperand + h * Shape::kHalf, params.map, full,
                   {j * Shape::kBlock + h * 64, row});
      }
    }
    return;
  }

  const int group = warp / 4;
  float acc[64] = {};
  for (int chunk = 0; chunk < chunks; ++chunk) {
    const int stage = chunk % Shape::kStages;
    const uint32_t left = stage * 2 * Shape::kOperand, right = same ? left : left + Shape::kOperand;
    mbarrier_wait(Shape::kFull + stage * 8, chunk / Shape::kStages & 1);
    wgmma_fence();
#pragma unroll
    for (int k = 0; k < Shape::kRows; k += 16)
      wgmma<T, 128>(acc,
                    wgmma_descriptor(left + group * Shape::kHalf + k * 128, Shape::kHalf, 1024,
                                     Swizzle::bytes128),
                    wgmma_descriptor(right + k * 128, Shape::kHalf, 1024, Swizzle::bytes128));
    wgmma_commit();
    wgmma_wait<1>();  // the chunk before is done
    if (chunk > 0 && lane == 0) mbarrier_arrive(Shape::kEmpty + (chunk - 1) % Shape::kStages * 8);
  }
  wgmma_wait<0>();
  wgmma_pin(acc);

  const auto out = cast<float2>(p.workspace);
#pragma unroll
  for (int r = 0; r < 64; r += 2) {
    const int row = group * 64 + warp % 4 * 16 + lane / 4 + r % 4 / 2 * 8;
    const int64_t at = (slot * Shape::kBlock + row) * Shape::kBlock + r / 4 * 8 + lane % 4 * 2;
    out[at / 2] = make_float2(acc[r], acc[r + 1]);
  }
}

inline Problem gram_matrix_sm90_problem(const GramMatrixParams& p) {
  return first_problem({
      sm90_dtype_problem(p.dtype),
      {p.item_count < 0, "item_count", p.item_count, "0 or more"},
      {p.rows < 0 || p.rows > kMaxPixels, "rows", p.rows, "0 to 2147418112"},
      {p.row_stride < 1 || p.row_stride % 8 != 0, "row_stride", p.row_stride,
       "a multiple of 16 bytes"},
      {p.channels < 1 || p.channels % 8 != 0 || p.channels > p.row_stride, "channels", p.channels,
       "a multiple of 16 bytes, at most row_stride"},
  });
}

// For `slots` tiles in the workspace.
inline std::array<ArraySize, 2> gram_matrix_sm90_sizes(const GramMatrixParams& p, int64_t slots) {
  constexpr int kBlock = GramMatrixSm90Shape::kBlock;
  return {{{"workspace", elements({slots, kBlock, kBlock}), false},
           {"items", elements({p.item_count, 6}), true}}};
}

inline cudaError_t launch_gram_matrix_sm90(const GramMatrixParams& p, cudaStream_t stream) {
  using Shape = GramMatrixSm90Shape;
  if (gram_matrix_sm90_problem(p).found || !aligned16(p.x)) return cudaErrorInvalidValue;
  if (p.item_count == 0) return cudaSuccess;
  const auto kernel =
      p.dtype == DType::bf16 ? gram_matrix_sm90_kernel<bf16> : gram_matrix_sm90_kernel<fp16>;
  cudaError_t error = check_sm90_code(kernel, Shape::kThreads);
  if (error != cudaSuccess) return error;
  GramMatrixSm90Params params{};
  params.matrix = p;
  const int64_t size[] = {p.channels, p.rows}, stride[] = {p.row_stride * 2};
  const int32_t box[] = {64, Shape::kRows};
  error = make_tensor_map(params.map, p.dtype, p.x, 2, size, stride, box, Swizzle::bytes128);
  if (error != cudaSuccess) return error;
  return launch(kernel, dim3(p.item_count), dim3(Shape::kThreads), Shape::kShared, stream, params);
}

}  // namespace dbp
