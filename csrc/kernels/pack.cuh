// pack: any strided input to rows of channels, padded with zero channels to a multiple of 16 bytes,
// as vector loads, cp.async and TMA need them. One pass; converts the dtype and, if asked to,
// subtracts a mean per channel on the way.
#pragma once

#include "arguments.cuh"
#include "simt.cuh"

namespace dbp {

struct PackParams {
  Global<const void> x;
  Global<void> out;
  Global<const float> mean;  // (channels), or null
  int64_t size[4];           // image and up to three spatial dimensions; absent ones are 1
  int64_t x_stride[4];       // in elements
  int64_t out_stride[4];     // in elements, multiples of 16 bytes
  int64_t x_channel_stride;  // of out it is 1
  int32_t channels;          // of x
  int32_t row;               // channels that a row of out has room for, a multiple of 16 bytes
  DType x_dtype, out_dtype;
};

namespace pack {

constexpr int kPixels = 64, kChannels = 64, kThreads = 256;
constexpr int kPitch = kChannels + 1;  // odd: columns of the tile lie in different banks

// One block: kPixels pixels along the last dimension, kChannels channels, turned in shared memory
// so that both the reads (along whatever is contiguous) and the 16-byte writes are coalesced.
template <class In, class Out>
__global__ void __launch_bounds__(kThreads) pack_kernel(PackParams p) {
  auto tile = shared_array<float>(0, kPixels * kPitch);
  const int64_t tiles = ceil_div(p.size[3], kPixels);
  int64_t line = blockIdx.x / tiles;
  const int64_t first = blockIdx.x % tiles * kPixels;
  const int channel0 = blockIdx.y * kChannels;

  int64_t x_line = 0, out_line = 0;
  for (int d = 2; d >= 0; --d) {
    const int64_t i = line % p.size[d];
    line /= p.size[d];
    x_line += i * p.x_stride[d];
    out_line += i * p.out_stride[d];
  }

  auto x = cast<const In>(p.x) + x_line;
  const bool along_channels = p.x_channel_stride == 1;
  for (int e = threadIdx.x; e < kPixels * kChannels; e += kThreads) {
    const int pixel = along_channels ? e / kChannels : e % kPixels;
    const int c = along_channels ? e % kChannels : e / kPixels;
    float value = 0.0f;
    if (first + pixel < p.size[3] && channel0 + c < p.channels) {
      value = to_float(x[(first + pixel) * p.x_stride[3] + (channel0 + c) * p.x_channel_stride]);
      if (p.mean) value -= p.mean[channel0 + c];
    }
    tile[pixel * kPitch + c] = value;
  }
  __syncthreads();

  constexpr int kVector = 16 / sizeof(Out), kVectors = kChannels / kVector;
  auto out = cast<Out>(p.out) + out_line;
  for (int e = threadIdx.x; e < kPixels * kVectors; e += kThreads) {
    const int pixel = e / kVectors, c = e % kVectors * kVector;
    if (first + pixel >= p.size[3] || channel0 + c >= p.row) continue;
    uint32_t words[4];
    for (int w = 0; w < 4; ++w) {
      auto at = tile + (pixel * kPitch + c + w * (kVector / 4));
      if constexpr (sizeof(Out) == 4) {
        words[w] = float_bits(at[0]);
      } else {
        words[w] = pack_pair(from_float<Out>(at[0]), from_float<Out>(at[1]));
      }
    }
    store16(out + ((first + pixel) * p.out_stride[3] + channel0 + c),
            make_uint4(words[0], words[1], words[2], words[3]));
  }
}

// Sorts the dimensions by stride in x and joins those that are one run in both x and out: fewer and
// longer lines. Most layouts become one or two dimensions.
inline void merge_dimensions(PackParams& p) {
  int64_t size[4], x[4], out[4];
  int count = 0;
  for (int d = 0; d < 4; ++d) {
    if (p.size[d] == 1) continue;
    int at = count++;
    for (; at > 0 && x[at - 1] < p.x_stride[d]; --at) {
      size[at] = size[at - 1], x[at] = x[at - 1], out[at] = out[at - 1];
    }
    size[at] = p.size[d], x[at] = p.x_stride[d], out[at] = p.out_stride[d];
  }
  int merged = 0;
  for (int d = 1; d < count; ++d) {
    if (x[merged] == x[d] * size[d] && out[merged] == out[d] * size[d]) {
      size[merged] *= size[d], x[merged] = x[d], out[merged] = out[d];
    } else {
      ++merged;
      size[merged] = size[d], x[merged] = x[d], out[merged] = out[d];
    }
  }
  if (count) count = merged + 1;
  for (int d = 0; d < 4; ++d) {
    const int from = d - (4 - count);
    p.size[d] = from >= 0 ? size[from] : 1;
    p.x_stride[d] = from >= 0 ? x[from] : 0;
    p.out_stride[d] = from >= 0 ? out[from] : 0;
  }
}

}  // namespace pack

inline Problem pack_problem(const PackParams& p) {
  const int vector = 16 / size_of(p.out_dtype);
  for (int d = 0; d < 4; ++d) {
    const bool whole = p.size[d] == 1 || p.out_stride[d] % vector == 0;
    if (p.size[d] < 0) return {true, "size", p.size[d], "0 or more"};
    if (!whole) return {true, "out_stride", p.out_stride[d], "a multiple of 16 bytes"};
  }
  return first_problem({
      {p.channels < 0, "channels", p.channels, "0 or more"},
      {p.row < p.channels || p.row % vector != 0, "row", p.row,
       "a multiple of 16 bytes, at least channels"},
  });
}

inline cudaError_t launch_pack(PackParams p, cudaStream_t stream) {
  if (pack_problem(p).found) return cudaErrorInvalidValue;
  for (int64_t size : p.size)
    if (size == 0) return cudaSuccess;
  if (!aligned16(p.out)) return cudaErrorInvalidValue;
  pack::merge_dimensions(p);
  const int64_t blocks =
      elements({p.size[0], p.size[1], p.size[2], ceil_div(p.size[3], pack::kPixels)});
  if (blocks > 0x7fffffff) return cudaErrorInvalidConfiguration;
  const dim3 grid(static_cast<unsigned>(blocks), ceil_div(p.row, pack::kChannels));
  const size_t shared = sizeof(float) * pack::kPixels * pack::kPitch;
  return with_dtype(p.x_dtype, [&](auto in) {
    return with_dtype(p.out_dtype, [&](auto out) {
      return launch(pack::pack_kernel<typename decltype(in)::type, typename decltype(out)::type>,
                    grid, dim3(pack::kThreads), shared, stream, p);
    });
  });
}

}  // namespace dbp
