// Second moment, shift form, main boxes: all shifts of a pair of channel tiles from one staged
// tile.
//
// A block takes a range of pixels, numbered over all images, 64 (32 in fp32) at a time. Their rows
// are staged once, in a ring of shared memory that also still holds the pixels before them, as far
// back as the largest shift reaches (the halo): every shift of the right operand is then just
// another row of the ring, and each pixel is read from global memory once. Shifts point backwards
// (the other half are transposes). A pixel that a shift's box excludes gets a row of zeros as its
// right operand, so boxes are exact, except that an Inf or NaN in the left pixel meets that zero:
// like the zero columns of a padded buffer it can then reach entries of its own channel that im2col
// keeps finite.
//
// The partial tiles, one per shift and range of pixels, are summed by the reduce kernel.
#pragma once

#include "gram_shift_work.cuh"
#include "gram_tile.cuh"

namespace dbp {

template <DType K, int Block>
struct GramShiftShape {
  static constexpr int kWarps = 8;
  static constexpr int kThreads = kWarps * kWarp;
  static constexpr int kColumns = Block < 32 ? Block : 32;  // of the tile, per block of threads
  static constexpr int kAcross = kColumns / 8;              // warps side by side
  static constexpr int kGroups = kWarps / kAcross;          // warps with different shifts
  static constexpr int kShifts = 7;  // per warp: Block / 16 * 4 registers each
  static constexpr int kPixels = element_bytes(K) == 2 ? 64 : 32;  // staged at a time
  static constexpr int kStages = 3;
  static constexpr uint32_t kLeftPitch = row_pitch(K, Block);
  static constexpr uint32_t kRightPitch = row_pitch(K, kColumns);
  // Shared memory: a row of zeros, masks of the staged pixels, left rows, right rows with halo.
  static constexpr uint32_t kMasks = kColumns * element_bytes(K);
  static constexpr uint32_t kLeft = kMasks + kStages * kPixels * 4;
  static constexpr uint32_t kRight = kLeft + kStages * kPixels * kLeftPitch;
  static_assert(kMasks % 16 == 0 && kLeft % 16 == 0 && kRight % 16 == 0);

  __host__ __device__ static constexpr int shifts() { return kGroups * kShifts; }
  static constexpr int64_t shared_bytes(int64_t halo) {
    return kRight + (ceil_div(halo, int64_t{kPixels}) + kStages) * kPixels * kRightPitch;
  }
};

template <DType K, int Block>
__global__ void __launch_bounds__(GramShiftShape<K, Block>::kThreads, 1)
    gram_shift_kernel(GramShiftParams p) {
  using Shape = GramShiftShape<K, Block>;
  constexpr int S = Shape::kShifts, M = Block / 16, kPixels = Shape::kPixels;
  constexpr int kStages = Shape::kStages, kVector = 16 / element_bytes(K);
  const int thread = threadIdx.x, lane = thread % kWarp, warp = thread / kWarp;

  const auto item = p.items + int64_t{blockIdx.x} * 8;
  const int left_channel = item[0] * Block;
  const int part = item[2] * Shape::kColumns;  // first column within the tile
  const int right_channel = item[1] * Block + part;
  const int set = item[3], first = item[4], last = item[5];
  const int64_t straight = item[6], symmetric = item[7];
  const auto x = cast<const Element<K>>(p.x);

  // --- What this thread masks and copies
  GramShiftMasks masks(p, set, first + thread, last, kPixels);
  auto write_mask = [&](int stage) {
    if (thread < kPixels)
      shared_store<uint32_t>(Shape::kMasks + (stage * kPixels + thread) * 4, masks.next());
  };
  // Rows [from, from + kPixels) of `columns` channels; those outside [low, high) are zero.
  auto copy_rows = [&](uint32_t to, uint32_t pitch, int columns, int channel, int64_t from,
                       int64_t low, int64_t high) {
    const int vectors = columns / kVector;
    for (int v = thread; v < kPixels * vectors; v += Shape::kThreads) {
      const int64_t row = from + v / vectors;
      const int c = channel + v % vectors * kVector;
      const bool valid = row >= low && row < high && c < p.channels;
      cp_async<16>(to + v / vectors * pitch + v % vectors * 16,
                   valid ? x + (row * p.row_stride + c) : x, valid);
    }
  };
  // Chunk c holds the pixels first + c * kPixels...; those before the first one are only halo.
  const int chunks = ceil_div(last - first, kPixels), halo_chunks = ceil_div(p.halo, kPixels);
  const int ring = halo_chunks + kStages;
  auto right_rows = [&](int chunk) {
    return Shape::kRight + (chunk + halo_chunks) % ring * kPixels * Shape::kRightPitch;
  };
  auto copy_right = [&](int chunk) {
    copy_rows(right_rows(chunk), Shape::kRightPitch, Shape::kColumns, right_channel,
              first + int64_t{chunk} * kPixels, 0, p.pixels);
  };
  auto stage_chunk = [&](int chunk) {
    if (chunk < chunks) {
      const int stage = chunk % kStages;
      write_mask(stage);
      copy_rows(Shape::kLeft + stage * kPixels * Shape::kLeftPitch, Shape::kLeftPitch, Block,
                left_channel, first + int64_t{chunk} * kPixels, first, last);
      copy_right(chunk);
    }
    cp_async_commit();
  };

  // --- What this warp multiplies
  const int column = warp % Shape::kAcross * 8, group = warp / Shape::kAcross;
  const auto shifts = p.shifts + (int64_t{set} * Shape::shifts() + group * S) * 4;
  const uint32_t ring_bytes = ring * kPixels * Shape::kRightPitch;
  int32_t offset[S];
  uint32_t active = 0;
#pragma unroll
  for (int s = 0; s < S; ++s) {
    offset[s] = shifts[4 * s] * static_cast<int32_t>(Shape::kRightPitch);
    const bool computed = shifts[4 * s + 3] && !(shifts[4 * s + 2] && symmetric < 0);
    active |= static_cast<uint32_t>(computed) << s;
  }
  float acc[S][M][4] = {};

  for (int v = thread; v < static_cast<int>(Shape::kMasks / 4); v += Shape::kThreads)
    shared_store<uint32_t>(4 * v, 0);
  if (chunks > 0)
    for (int chunk = -halo_chunks; chunk < 0; ++chunk) copy_right(chunk);
  for (int chunk = 0; chunk < kStages - 1; ++chunk) stage_chunk(chunk);

  for (int chunk = 0; chunk < chunks; ++chunk) {
    cp_async_wait<kStages - 2>();
    __syncthreads();  // chunk has arrived, and nobody reads what the next copies overwrite
    stage_chunk(chunk + kStages - 1);
    const int stage = chunk % kStages;
    const uint32_t rows = right_rows(chunk) + column * element_bytes(K);
#pragma unroll 1
    for (int k = 0; k < kPixels; k += kStep) {
      const uint32_t mask =
          shared_load<uint32_t>(Shape::kMasks + (stage * kPixels + k + lane) * 4) >> group * S;
      uint32_t right[S];
#pragma unroll
      for (int s = 0; s < S; ++s) {
        uint32_t at = rows + (k + lane) * Shape::kRightPitch + offset[s];
        if (static_cast<int32_t>(at - Shape::kRight) < 0) at += ring_bytes;
        right[s] = mask >> s & 1 ? at : column * element_bytes(K);
      }
      multiply<K, M, S>(acc, Shape::kLeft + (stage * kPixels + k) * Shape::kLeftPitch,
                        Shape::kLeftPitch, right, active);
    }
  }

#pragma unroll
  for (int s = 0; s < S; ++s)
    if (active >> s & 1)
      store_partial(p.workspace, (shifts[4 * s + 2] ? symmetric : straight) + shifts[4 * s + 1],
                    Block, 0, part + column, acc[s]);
}

// Shifts of a set: a row of masks has a bit for each.
inline int gram_shift_set(int block) {
  return block == 16 ? GramShiftShape<DType::bf16, 16>::shifts()
                     : GramShiftShape<DType::bf16, 32>::shifts();
}

template <int Block>
int64_t gram_shift_shared_bytes(const GramShiftParams& p) {
  return size_of(p.dtype) == 2 ? GramShiftShape<DType::bf16, Block>::shared_bytes(p.halo)
                               : GramShiftShape<DType::fp32, Block>::shared_bytes(p.halo);
}

inline Problem gram_shift_problem(const GramShiftParams& p) {
  const int64_t shared = p.block == 16   ? gram_shift_shared_bytes<16>(p)
                         : p.block == 32 ? gram_shift_shared_bytes<32>(p)
                                         : gram_shift_shared_bytes<64>(p);
  const bool known = p.block == 16 || p.block == 32 || p.block == 64;
  return gram_shift_problem(p, known, "16, 32 or 64", shared);
}

template <DType K, int Block>
cudaError_t launch_gram_shift_as(const GramShiftParams& p, cudaStream_t stream) {
  using Shape = GramShiftShape<K, Block>;
  return launch(gram_shift_kernel<K, Block>, dim3(p.item_count), dim3(Shape::kThreads),
                static_cast<size_t>(Shape::shared_bytes(p.halo)), stream, p);
}

template <DType K>
cudaError_t launch_gram_shift_as(const GramShiftParams& p, cudaStream_t stream) {
  switch (p.block) {
    case 16:
      return launch_gram_shift_as<K, 16>(p, stream);
    case 32:
      return launch_gram_shift_as<K, 32>(p, stream);
    case 64:
      return launch_gram_shift_as<K, 64>(p, stream);
    default:
      return cudaErrorInvalidValue;
  }
}

inline cudaError_t launch_gram_shift(const GramShiftParams& p, cudaStream_t stream) {
  if (gram_shift_problem(p).found || !aligned16(p.x)) return cudaErrorInvalidValue;
  switch (p.dtype) {
    case DType::fp32:
      return launch_gram_shift_as<DType::fp32>(p, stream);
    case DType::tf32:
      return launch_gram_shift_as<DType::tf32>(p, stream);
    case DType::fp16:
      return launch_gram_shift_as<DType::fp16>(p, stream);
    case DType::bf16:
      return launch_gram_shift_as<DType::bf16>(p, stream);
  }
  return cudaErrorInvalidValue;
}

}  // namespace dbp
