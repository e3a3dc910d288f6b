// gram_shift for sm_90a, bf16 and fp16: the same work by TMA and wgmma.
//
// One warp is the producer: it copies tiles of 64 pixels x 64 channels by TMA (pixels and channels
// that do not exist arrive as zeros) and works out which shifts each pixel takes part in. Two
// groups of four warps multiply, each for its own shifts. wgmma wants its second operand in shared
// memory: the left pixels, as they are. Its first operand it takes from registers: the right
// pixels, loaded by ldmatrix.trans from any rows of the ring, or from a row of zeros. So a shift is
// again just another row address and boxes are exact (see gram_shift.cuh, also for what an Inf
// does). wgmma computes 64 right channels x 64 left channels; the tile is transposed as it is
// stored.
#pragma once

#include "gram_shift_work.cuh"
#include "sm90.cuh"

namespace dbp {

struct GramShiftSm90Params {
  GramShiftParams shift;  // block 64; an item's part of the columns is 0
  TensorMap map;          // of shift.x: (channels, pixels) in boxes of 64 x 64
};

struct GramShiftSm90Shape {
  static constexpr int kBlock = 64, kPixels = 64, kStages = 4;
  static constexpr int kGroups = 2;  // of four warps, with different shifts
  static constexpr int kShifts = 4;  // per group: 32 registers each
  // The producer's group has idle warps, because registers are handed over by groups of four warps:
  // from 168 for all to 24 for the producer and 240 for those that multiply.
  static constexpr int kProducer = kGroups * 4, kThreads = (kProducer + 4) * kWarp;
  static constexpr uint32_t kRow = kBlock * 2, kTile = kPixels * kRow;  // bytes

  // Shared memory: left tiles, then the ring of right tiles, and after it at `rest` a row of zeros,
  // masks of the staged pixels, and two mbarriers per stage.
  static constexpr uint32_t kRing = kStages * kTile;
  static constexpr uint32_t kMasks = kRow, kFull = kMasks + kStages * kPixels * 4;
  static constexpr uint32_t kEmpty = kFull + kStages * 8, kRest = kEmpty + kStages * 8;
  __host__ __device__ static constexpr int64_t ring_tiles(int64_t halo) {
    return ceil_div(halo, int64_t{kPixels}) + kStages;
  }
  // of shifts that one item computes
  static constexpr int shifts() { return kGroups * kShifts; }
  static constexpr int64_t shared_bytes(int64_t halo) {
    return kRing + ring_tiles(halo) * kTile + kRest;
  }
};

// The part of four warps: `Count` shifts, of which the first `stored` are wanted.
template <class T, int Count>
__device__ __forceinline__ void gram_shift_consume(const GramShiftParams& p, int chunks, int group,
                                                   bool same, int stored) {
  using Shape = GramShiftSm90Shape;
  constexpr int kSteps = Shape::kPixels / 16;  // wgmmas along the pixels of a tile
  const int warp = static_cast<int>(threadIdx.x) / kWarp, lane = threadIdx.x % kWarp;
  const auto item = p.items + int64_t{blockIdx.x} * 8;
  const auto shifts = p.shifts + (int64_t{item[3]} * Shape::kGroups + group) * Shape::kShifts * 4;
  const int halo_tiles = ceil_div(p.halo, Shape::kPixels), ring = halo_tiles + Shape::kStages;
  const uint32_t ring_bytes = ring * Shape::kTile, rest = Shape::kRing + ring_bytes;
  int32_t offset[Count];
#pragma unroll
  for (int s = 0; s < Count; ++s) offset[s] = shifts[4 * s] * static_cast<int32_t>(Shape::kRow);

  // This lane's row among the 16 pixels of an ldmatrix, and its 16-byte unit of right channels.
  const int pixel = lane / 16 * 8 + lane % 8, unit = warp % 4 * 2 + lane / 8 % 2;
  float acc[Count][32] = {};
  uint32_t right[2][Count][4];
  for (int chunk = 0; chunk < chunks; ++chunk) {
    const int stage = chunk % Shape::kStages;
    const uint32_t tile = Shape::kRing + (chunk + halo_tiles) % ring * Shape::kTile;
    mbarrier_wait(rest + Shape::kFull + stage * 8, chunk / Shape::kStages & 1);
#pragma unroll
    for (int k = 0; k < kSteps; ++k) {
      const int row = 16 * k + pixel;
      const uint32_t mask =
          shared_load<uint32_t>(rest + Shape::kMasks + (stage * Shape::kPixels + row) * 4) >>
          group * Shape::kShifts;
#pragma unroll
      for (int s = 0; s < Count; ++s) {
        uint32_t at = tile + row * Shape::kRow + offset[s];
        if (static_cast<int32_t>(at - Shape::kRing) < 0) at += ring_bytes;
        at = mask >> s & 1 ? at : rest;
        ldmatrix_x4_trans(right[k % 2][s], at + ((unit ^ (at >> 7 & 7)) << 4));
      }
      const uint32_t left = (same ? tile : stage * Shape::kTile) + 16 * k * Shape::kRow;
      const uint64_t b = wgmma_descriptor(left, Shape::kTile, 8 * Shape::kRow, Swizzle::bytes128);
      wgmma_fence();
#pragma unroll
      for (int s = 0; s < Count; ++s) wgmma_registers<T, 64>(acc[s], right[k % 2][s], b);
      wgmma_commit();
      wgmma_wait<1>();  // the step before is done: its registers and, at k = 0, its stage are free
      if (k == 0 && chunk > 0 && lane == 0)
        mbarrier_arrive(rest + Shape::kEmpty + (chunk - 1) % Shape::kStages * 8);
    }
  }
  wgmma_wait<0>();

#pragma unroll
  for (int s = 0; s < Count; ++s) {
    wgmma_pin(acc[s]);
    if (s >= stored) continue;
    const int64_t base = shifts[4 * s + 2] ? item[7] : item[6];
    const auto out =
        cast<float>(p.workspace) + (base + shifts[4 * s + 1]) * Shape::kBlock * Shape::kBlock;
#pragma unroll
    for (int i = 0; i < 32; ++i) {
      const int j = warp % 4 * 16 + lane / 4 + i % 4 / 2 * 8;  // right channel
      const int left = i / 4 * 8 + lane % 4 * 2 + i % 2;
      out[left * Shape::kBlock + j] = acc[s][i];
    }
  }
}

template <class T>
__global__ void __launch_bounds__(DBP_SM90_THREADS(GramShiftSm90Shape::kThreads), 1)
    gram_shift_sm90_kernel(const __grid_constant__ GramShiftSm90Params params) {
  using Shape = GramShiftSm90Shape;
  const GramShiftParams& p = params.shift;
  const int thread = threadIdx.x, lane = thread % kWarp, warp = thread / kWarp;
  const auto item = p.items + int64_t{blockIdx.x} * 8;
  const int i = item[0], j = item[1], set = item[3], first = item[4], last = item[5];
  const bool same = i == j;  // the left tile is a tile of the ring
  const int chunks = ceil_div(last - first, Shape::kPixels);
  const int halo_tiles = ceil_div(p.halo, Shape::kPixels), ring = halo_tiles + Shape::kStages;
  const uint32_t rest = Shape::kRing + ring * Shape::kTile;

  if (thread == 0)
    for (int stage = 0; stage < Shape::kStages; ++stage) {
      mbarrier_init(rest + Shape::kFull + stage * 8, kWarp);
      mbarrier_init(rest + Shape::kEmpty + stage * 8, Shape::kProducer);
    }
  if (thread < static_cast<int>(Shape::kRow / 4)) shared_store<uint32_t>(rest + 4 * thread, 0);
  __syncthreads();

  if (warp >= Shape::kProducer) {
    registers_decrease<24>();
    if (warp > Shape::kProducer) return;
    GramShiftMasks masks(p, set, first + lane, last, kWarp);
    auto load = [&](uint32_t to, int channel_tile, int chunk, uint32_t mbarrier) {
      tma_load(to, params.map, mbarrier,
               {channel_tile * Shape::kBlock, first + chunk * Shape::kPixels});
    };
    for (int chunk = 0; chunk < chunks; ++chunk) {
      const int stage = chunk % Shape::kStages;
      const uint32_t full = rest + Shape::kFull + stage * 8;
      mbarrier_wait(rest + Shape::kEmpty + stage * 8, (chunk / Shape::kStages & 1) ^ 1);
#pragma unroll
      for (int h = 0; h < Shape::kPixels; h += kWarp)
        shared_store<uint32_t>(rest + Shape::kMasks + (stage * Shape::kPixels + h + lane) * 4,
                               masks.next());
      if (lane > 0) {
        mbarrier_arrive(full);
        continue;
      }
      const int halo = chunk == 0 ? halo_tiles : 0;  // comes with the first chunk
      mbarrier_expect(full, (halo + 1 + !same) * Shape::kTile);
      for (int c = chunk - halo; c <= chunk; ++c)
        load(Shape::kRing + (c + halo_tiles) % ring * Shape::kTile, j, c, full);
      if (!same) load(stage * Shape::kTile, i, chunk, full);
    }
    return;
  }

  registers_increase<240>();
  const int group = warp / 4;
  const auto shifts = p.shifts + (int64_t{set} * Shape::kGroups + group) * Shape::kShifts * 4;
  int count = 0;  // shifts that are not computed come last
  for (int s = 0; s < Shape::kShifts; ++s)
    count += shifts[4 * s + 3] && !(shifts[4 * s + 2] && item[7] < 0);
  switch (count) {
    case 4:
      return gram_shift_consume<T, 4>(p, chunks, group, same, count);
    case 3:
      return gram_shift_consume<T, 3>(p, chunks, group, same, count);
    case 2:
      return gram_shift_consume<T, 2>(p, chunks, group, same, count);
    default:
      return gram_shift_consume<T, 1>(p, chunks, group, same, count);
  }
}

inline Problem gram_shift_sm90_problem(const GramShiftParams& p) {
  using Shape = GramShiftSm90Shape;
  return first_problem(
      {sm90_dtype_problem(p.dtype),
       gram_shift_problem(p, p.block == Shape::kBlock, "64", Shape::shared_bytes(p.halo))});
}

inline cudaError_t launch_gram_shift_sm90(const GramShiftParams& p, cudaStream_t stream) {
  using Shape = GramShiftSm90Shape;
  if (gram_shift_sm90_problem(p).found || !aligned16(p.x)) return cudaErrorInvalidValue;
  if (p.item_count == 0) return cudaSuccess;
  const auto kernel =
      p.dtype == DType::bf16 ? gram_shift_sm90_kernel<bf16> : gram_shift_sm90_kernel<fp16>;
  cudaError_t error = check_sm90_code(kernel, Shape::kThreads);
  if (error != cudaSuccess) return error;
  GramShiftSm90Params params{};
  params.shift = p;
  const int64_t size[] = {p.channels, p.pixels}, stride[] = {p.row_stride * 2};
  const int32_t box[] = {Shape::kBlock, Shape::kPixels};
  error = make_tensor_map(params.map, p.dtype, p.x, 2, size, stride, box, Swizzle::bytes128);
  if (error != cudaSuccess) return error;
  return launch(kernel, dim3(p.item_count), dim3(Shape::kThreads),
                static_cast<size_t>(Shape::shared_bytes(p.halo)), stream, params);
}

}  // namespace dbp
