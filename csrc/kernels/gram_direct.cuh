// Second moment, direct form: implicit im2col, any geometry and any strides of the input.
//
// The rows of the patch matrix are gathered element by element, two bytes or four at a time, and
// only ever exist in shared memory. That suits few channels (3 of an image: no tile is mostly
// padding, no layout is asked for) and odd geometries; where shifts repeat, gram_shift and gram_box
// do less work. Columns are ordered (channel, tap) like S, groups one after the other, so S needs
// no reordering. Only tiles on and above the diagonal are items.
#pragma once

#include "arguments.cuh"
#include "gram_block.cuh"

namespace dbp {

struct GramDirectParams {
  Global<const void> x;
  Global<void> workspace;       // float32 (slots, block, block)
  Global<const int32_t> items;  // (item_count, 6): ignored, column tiles i and j, first and last
                                // patch, numbered over (image, output position), slot
  int64_t stride_n, stride_c, stride[3];  // of x in elements; z, y, x
  int32_t size[3];                        // of x; axes that do not exist have size and kernel 1
  int32_t output[3];
  int32_t kernel[3];
  int32_t conv_stride[3], padding[3], dilation[3];
  int32_t columns;  // channels times taps, over all groups
  int32_t item_count;
  int32_t block;  // columns of a tile: 16, 32, 64 or 128
  DType dtype;
};

// Where the element of a column lies, relative to the pixel (0, 0, 0) of the patch's image, padded.
struct alignas(8) GramDirectColumn {
  int32_t z, y, x;
  int32_t exists;
  int64_t offset;
};

template <DType K, int Block>
struct GramDirectShape : GramBlock<K, Block> {
  using Base = GramBlock<K, Block>;
  // Shared memory: the columns of both operands, then both staged operands.
  static constexpr uint32_t kStaged = 2 * Block * sizeof(GramDirectColumn);
  static constexpr uint32_t kShared = kStaged + 2 * Base::kOperand;
};

template <DType K, int Block>
__global__ void __launch_bounds__(GramBlock<K, Block>::kThreads, 1)
    gram_direct_kernel(GramDirectParams p) {
  using Shape = GramDirectShape<K, Block>;
  using Bits = std::conditional_t<element_bytes(K) == 2, uint16_t, uint32_t>;
  constexpr int kVector = 16 / element_bytes(K), kVectors = 2 * Block / kVector;  // of a staged row
  constexpr int kEach = kVectors / Shape::kWarps;  // a warp gathers these vectors of all 32 rows
  static_assert(kVectors % Shape::kWarps == 0 && Shape::kPixels == kWarp);
  const int thread = threadIdx.x, lane = thread % kWarp, warp = thread / kWarp;

  const auto item = p.items + int64_t{blockIdx.x} * 6;
  const int i = item[1], j = item[2], first = item[3], last = item[4];
  const auto x = cast<const Bits>(p.x);

  auto columns = shared_array<GramDirectColumn>(0, 2 * Block);
  const int taps = p.kernel[0] * p.kernel[1] * p.kernel[2];
  for (int c = thread; c < 2 * Block; c += Shape::kThreads) {
    const int number = (c < Block ? i : j) * Block + c % Block;
    const int channel = number / taps, tap = number % taps;
    GramDirectColumn column;
    column.z = tap / p.kernel[2] / p.kernel[1] * p.dilation[0] - p.padding[0];
    column.y = tap / p.kernel[2] % p.kernel[1] * p.dilation[1] - p.padding[1];
    column.x = tap % p.kernel[2] * p.dilation[2] - p.padding[2];
    column.exists = number < p.columns;
    column.offset = channel * p.stride_c + column.z * p.stride[0] + column.y * p.stride[1] +
                    column.x * p.stride[2];
    columns[c] = column;
  }

  // This lane's patch of a chunk: the elements of the vectors warp, warp + kWarps, ... of its row.
  uint32_t gathered[kEach][4];
  auto gather = [&](int chunk) {
    const int patch = first + chunk * kWarp + lane;
    const bool inside = patch < last;
    const int line = patch / p.output[2], plane = line / p.output[1], n = plane / p.output[0];
    const int z = (plane - n * p.output[0]) * p.conv_stride[0];
    const int y = (line - plane * p.output[1]) * p.conv_stride[1];
    const int px = (patch - line * p.output[2]) * p.conv_stride[2];
    const int64_t origin = n * p.stride_n + z * p.stride[0] + y * p.stride[1] + px * p.stride[2];
#pragma unroll
    for (int e = 0; e < kEach; ++e)
#pragma unroll
      for (int w = 0; w < 4; ++w) {
        uint32_t word = 0;
#pragma unroll
        for (int half = 0; half < kVector / 4; ++half) {
          const GramDirectColumn column =
              columns[(warp + e * Shape::kWarps) * kVector + w * (kVector / 4) + half];
          const bool valid =
              inside && column.exists &&
              static_cast<uint32_t>(z + column.z) < static_cast<uint32_t>(p.size[0]) &&
              static_cast<uint32_t>(y + column.y) < static_cast<uint32_t>(p.size[1]) &&
              static_cast<uint32_t>(px + column.x) < static_cast<uint32_t>(p.size[2]);
          if (valid) {
            const Bits bits = x[origin + column.offset];
            word |= uint32_t{bits} << 16 * half;
          }
        }
        gathered[e][w] = word;
      }
  };
  auto stage = [&] {
#pragma unroll
    for (int e = 0; e < kEach; ++e) {
      const int vector = warp + e * Shape::kWarps;  // left ones first
      const uint32_t operand = vector / (kVectors / 2) * Shape::kOperand;
      shared_store<uint4>(
          Shape::kStaged + operand + lane * Shape::kPitch + vector % (kVectors / 2) * 16,
          make_uint4(gathered[e][0], gathered[e][1], gathered[e][2], gathered[e][3]));
    }
  };

  const int chunks = ceil_div(last - first, kWarp);
  Shape tile;
  __syncthreads();
  if (chunks > 0) gather(0);
  for (int chunk = 0; chunk < chunks; ++chunk) {
    stage();
    __syncthreads();
    if (chunk + 1 < chunks) gather(chunk + 1);  // arrives while this chunk is multiplied
    tile.multiply_staged(Shape::kStaged, Shape::kStaged + Shape::kOperand);
    __syncthreads();
  }
  tile.store(p.workspace, int64_t{item[5]});
}

inline Problem gram_direct_problem(const GramDirectParams& p) {
  const char* expected = "1 or more along every axis";
  for (int d = 0; d < 3; ++d) {
    const Problem problem = first_problem({
        {p.size[d] < 1, "size", p.size[d], expected},
        {p.output[d] < 1, "output", p.output[d], expected},
        {p.kernel[d] < 1, "kernel", p.kernel[d], expected},
        {p.conv_stride[d] < 1, "conv_stride", p.conv_stride[d], expected},
        {p.dilation[d] < 1, "dilation", p.dilation[d], expected},
    });
    if (problem.found) return problem;
  }
  const int64_t taps = elements({p.kernel[0], p.kernel[1], p.kernel[2]});
  return first_problem({
      {p.item_count < 0, "item_count", p.item_count, "0 or more"},
      {!gram_block_exists(p.block), "block", p.block, "16, 32, 64 or 128"},
      {p.columns < 1 || p.columns % taps != 0, "columns", p.columns,
       "a multiple of the kernel's taps"},
  });
}

// For `slots` tiles in the workspace.
inline std::array<ArraySize, 2> gram_direct_sizes(const GramDirectParams& p, int64_t slots) {
  return {{{"workspace", elements({slots, p.block, p.block}), false},
           {"items", elements({p.item_count, 6}), true}}};
}

template <DType K, int Block>
cudaError_t launch_gram_direct_as(const GramDirectParams& p, cudaStream_t stream) {
  using Shape = GramDirectShape<K, Block>;
  return launch(gram_direct_kernel<K, Block>, dim3(p.item_count), dim3(Shape::kThreads),
                Shape::kShared, stream, p);
}

template <DType K>
cudaError_t launch_gram_direct_as(const GramDirectParams& p, cudaStream_t stream) {
  switch (p.block) {
    case 16:
      return launch_gram_direct_as<K, 16>(p, stream);
    case 32:
      return launch_gram_direct_as<K, 32>(p, stream);
    case 64:
      return launch_gram_direct_as<K, 64>(p, stream);
    case 128:
      return launch_gram_direct_as<K, 128>(p, stream);
    default:
      return cudaErrorInvalidValue;
  }
}

inline cudaError_t launch_gram_direct(const GramDirectParams& p, cudaStream_t stream) {
  if (gram_direct_problem(p).found) return cudaErrorInvalidValue;
  switch (p.dtype) {
    case DType::fp32:
      return launch_gram_direct_as<DType::fp32>(p, stream);
    case DType::tf32:
      return launch_gram_direct_as<DType::tf32>(p, stream);
    case DType::fp16:
      return launch_gram_direct_as<DType::fp16>(p, stream);
    case DType::bf16:
      return launch_gram_direct_as<DType::bf16>(p, stream);
  }
  return cudaErrorInvalidValue;
}

}  // namespace dbp
