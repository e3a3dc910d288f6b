// Second moment of boxes: blocks of products of pixels a constant offset apart.
//
// A box is a rectangle of pixels per image; each pixel of it is multiplied with the pixel `offset`
// away, which exists too, so nothing is masked. Border strips, small images, strides (a box steps
// by the stride) and the product X^T X of a matrix (one box, offset zero: 1x1 convolutions and
// Linear) are all lists of boxes. A work item is one tile of channels of one box, over a range of
// its pixels, and writes one partial tile. Of a symmetric box only tiles on and above the diagonal
// are items.
#pragma once

#include "arguments.cuh"
#include "gram_block.cuh"

namespace dbp {

struct GramBoxParams {
  Global<const void> x;         // channels contiguous; base and strides are multiples of 16 bytes
  Global<void> workspace;       // float32 (slots, block, block)
  Global<const int32_t> items;  // (item_count, 6): box, channel tiles i and j, first and last pixel
                                // of the box, numbered over (image, z, y, x), slot
  // (boxes, 15): start, size, offset, each as (z, y, x), and multiplier and shift that divide by
  // the sizes x, y, z: p / size == (2 p * multiplier >> 32) >> shift
  Global<const int32_t> boxes;
  int64_t stride_n, stride[3];  // elements; z, y, x
  int32_t step[3];              // of the convolution: pixels between neighbours in a box
  int32_t channels;             // that may be read: all, padded to a multiple of 16 bytes
  int32_t item_count;
  int32_t block;  // channels of a tile: 16, 32, 64 or 128
  DType dtype;
};

template <DType K, int Block>
struct GramBoxShape : GramBlock<K, Block> {
  using Base = GramBlock<K, Block>;
  static constexpr int kStages = element_bytes(K) == 4 && Block == 128 ? 2 : 4;
  // Shared memory: where the rows of two chunks lie, then the stages.
  static constexpr uint32_t kStaged = 2 * Base::kPixels * 8;
  static constexpr uint32_t kShared = kStaged + kStages * 2 * Base::kOperand;
};

template <DType K, int Block>
__global__ void __launch_bounds__(GramBlock<K, Block>::kThreads, 1)
    gram_box_kernel(GramBoxParams p) {
  using Shape = GramBoxShape<K, Block>;
  constexpr int kPixels = Shape::kPixels, kStages = Shape::kStages, kVector = 16 / element_bytes(K);
  const int thread = threadIdx.x;

  const auto item = p.items + int64_t{blockIdx.x} * 6;
  const auto box = p.boxes + int64_t{item[0]} * 15;
  const int i = item[1], j = item[2], first = item[3], last = item[4];
  const int64_t slot = item[5];
  int64_t start = 0, offset = 0;
#pragma unroll
  for (int d = 0; d < 3; ++d) {
    start += box[d] * p.stride[d];
    offset += box[6 + d] * p.stride[d];
  }
  const bool same = i == j && offset == 0;  // one operand serves as both
  const auto x = cast<const Element<K>>(p.x);

  // Elements from x to the left pixels of a chunk (-1: past the end), into one of two tables.
  auto divide = [&](int value, int axis) {
    const auto multiplier = static_cast<uint32_t>(int32_t{box[9 + 2 * axis]});
    const uint64_t product = uint64_t{2 * static_cast<uint32_t>(value)} * multiplier;
    return static_cast<int>(static_cast<uint32_t>(product >> 32) >> box[10 + 2 * axis]);
  };
  auto find_rows = [&](int chunk) {
    if (thread >= kPixels) return;
    const int pixel = first + chunk * kPixels + thread;
    int64_t row = -1;
    if (pixel < last) {
      const int line = divide(pixel, 0), plane = divide(line, 1), n = divide(plane, 2);
      row = start + n * p.stride_n + int64_t{pixel - line * box[5]} * p.step[2] * p.stride[2] +
            int64_t{line - plane * box[4]} * p.step[1] * p.stride[1] +
            int64_t{plane - n * box[3]} * p.step[0] * p.stride[0];
    }
    shared_store<int64_t>((chunk % 2 * kPixels + thread) * 8, row);
  };
  auto stage_chunk = [&](int chunk) {
    constexpr int kVectors = Block / kVector;
    const uint32_t to = Shape::kStaged + chunk % kStages * 2 * Shape::kOperand;
    for (int v = thread; v < kPixels * kVectors; v += Shape::kThreads) {
      const int64_t row = shared_load<int64_t>((chunk % 2 * kPixels + v / kVectors) * 8);
      const uint32_t at = to + v / kVectors * Shape::kPitch + v % kVectors * 16;
      const int c = i * Block + v % kVectors * kVector, d = j * Block + v % kVectors * kVector;
      const bool left = row >= 0 && c < p.channels, right = row >= 0 && d < p.channels;
      cp_async<16>(at, left ? x + (row + c) : x, left);
      if (!same) cp_async<16>(at + Shape::kOperand, right ? x + (row + offset + d) : x, right);
    }
  };

  const int chunks = ceil_div(last - first, kPixels);
  Shape tile;
  find_rows(0);
  for (int chunk = 0; chunk < kStages - 1; ++chunk) {
    __syncthreads();
    if (chunk < chunks) stage_chunk(chunk);
    cp_async_commit();
    find_rows(chunk + 1);
  }
  for (int chunk = 0; chunk < chunks; ++chunk) {
    cp_async_wait<kStages - 2>();
    __syncthreads();  // chunk has arrived, and nobody reads what is written next
    if (chunk + kStages - 1 < chunks) stage_chunk(chunk + kStages - 1);
    cp_async_commit();
    find_rows(chunk + kStages);
    const uint32_t left = Shape::kStaged + chunk % kStages * 2 * Shape::kOperand;
    tile.multiply_staged(left, same ? left : left + Shape::kOperand);
  }
  tile.store(p.workspace, slot);
}

inline Problem gram_box_problem(const GramBoxParams& p) {
  const int64_t vector = 16 / size_of(p.dtype);
  auto bad = [&](int64_t stride) { return stride < 0 || stride % vector != 0; };
  const char* expected = "a multiple of 16 bytes";
  return first_problem({
      {p.item_count < 0, "item_count", p.item_count, "0 or more"},
      {!gram_block_exists(p.block), "block", p.block, "16, 32, 64 or 128"},
      {p.channels < 1 || bad(p.channels), "channels", p.channels, expected},
      {bad(p.stride_n), "stride_n", p.stride_n, expected},
      {bad(p.stride[0]), "stride", p.stride[0], expected},
      {bad(p.stride[1]), "stride", p.stride[1], expected},
      {bad(p.stride[2]), "stride", p.stride[2], expected},
      {p.step[0] < 1, "step", p.step[0], "1 or more along z"},
      {p.step[1] < 1, "step", p.step[1], "1 or more along y"},
      {p.step[2] < 1, "step", p.step[2], "1 or more along x"},
  });
}

// For `boxes` boxes and `slots` tiles in the workspace.
inline std::array<ArraySize, 3> gram_box_sizes(const GramBoxParams& p, int64_t slots,
                                               int64_t boxes) {
  return {{{"workspace", elements({slots, p.block, p.block}), false},
           {"items", elements({p.item_count, 6}), true},
           {"boxes", elements({boxes, 15}), true}}};
}

template <DType K, int Block>
cudaError_t launch_gram_box_as(const GramBoxParams& p, cudaStream_t stream) {
  using Shape = GramBoxShape<K, Block>;
  static_assert(Shape::kShared <= 99 * 1024);
  return launch(gram_box_kernel<K, Block>, dim3(p.item_count), dim3(Shape::kThreads),
                Shape::kShared, stream, p);
}

template <DType K>
cudaError_t launch_gram_box_as(const GramBoxParams& p, cudaStream_t stream) {
  switch (p.block) {
    case 16:
      return launch_gram_box_as<K, 16>(p, stream);
    case 32:
      return launch_gram_box_as<K, 32>(p, stream);
    case 64:
      return launch_gram_box_as<K, 64>(p, stream);
    case 128:
      return launch_gram_box_as<K, 128>(p, stream);
    default:
      return cudaErrorInvalidValue;
  }
}

inline cudaError_t launch_gram_box(const GramBoxParams& p, cudaStream_t stream) {
  if (gram_box_problem(p).found || !aligned16(p.x)) return cudaErrorInvalidValue;
  switch (p.dtype) {
    case DType::fp32:
      return launch_gram_box_as<DType::fp32>(p, stream);
    case DType::tf32:
      return launch_gram_box_as<DType::tf32>(p, stream);
    case DType::fp16:
      return launch_gram_box_as<DType::fp16>(p, stream);
    case DType::bf16:
      return launch_gram_box_as<DType::bf16>(p, stream);
  }
  return cudaErrorInvalidValue;
}

}  // namespace dbp
