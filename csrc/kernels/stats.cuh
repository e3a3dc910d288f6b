// stats: decor_stats in one kernel for D up to 128. A block gathers a chunk of patches (im2col into
// shared memory), multiplies by R and adds x x^T to a D x D accumulator in registers; neither
// patches nor x reach global memory. Blocks share the samples (split-K); a second kernel adds their
// partial sums in a fixed order and separates the diagonal. All arithmetic is ieee fp32.
#pragma once

#include "arguments.cuh"
#include "simt.cuh"

namespace dbp {

struct StatsParams {
  Global<const void> x;
  Global<const float> r;    // (groups, D, D)
  Global<float> workspace;  // stats_workspace_bytes
  Global<float> c;          // (groups, D, D): <x x^T> with zero diagonal
  Global<float> v;          // (groups, D): <x^2> - 1
  DType dtype;              // of x
  int64_t image_stride, channel_stride, pixel_stride[3];  // of x, in elements
  int64_t images;
  // per axis (z, y, x); absent ones have size, output, kernel, stride and dilation 1
  int32_t size[3], output[3], kernel[3], stride[3], padding[3], dilation[3];
  int32_t groups, group_channels;
  int32_t splits;  // blocks that share a group's samples
};

namespace stats {

constexpr int kThreads = 256, kGrid = 16;  // threads as a 16 x 16 grid over x x^T
constexpr int kMaxDim = 128;

// Sizes by M, the elements of x per thread and sample: D <= 16 M.
template <int M>
struct Shape {
  static constexpr int dim = kGrid * M;
  static constexpr int samples = 128 / M;  // of one chunk
  // Rows are 4 floats longer: 8 threads reading 16 bytes of 8 rows then meet all 32 banks.
  static constexpr int r_pitch = dim + 4, z_pitch = dim + 4, x_pitch = samples + 4;
  static constexpr uint32_t r_at = 0;                             // R (dim, r_pitch)
  static constexpr uint32_t z_at = r_at + 4 * dim * r_pitch;      // Z (samples, z_pitch)
  static constexpr uint32_t x_at = z_at + 4 * samples * z_pitch;  // X (dim, x_pitch)
  static constexpr uint32_t table_at = x_at + 4 * dim * x_pitch;  // entries of a patch
  static constexpr uint32_t bytes = table_at + 16 * dim;
};

inline int64_t sample_count(const StatsParams& p) {
  return elements({p.images, p.output[0], p.output[1], p.output[2]});
}
inline int64_t patch_length(const StatsParams& p) {
  return elements({p.group_channels, p.kernel[0], p.kernel[1], p.kernel[2]});
}

__device__ __forceinline__ void add_products(float& sum, float4 a, float4 b) {
  sum = __fmaf_rn(a.x, b.x, sum);
  sum = __fmaf_rn(a.y, b.y, sum);
  sum = __fmaf_rn(a.z, b.z, sum);
  sum = __fmaf_rn(a.w, b.w, sum);
}

template <class T, int M>
__global__ void __launch_bounds__(kThreads) stats_kernel(StatsParams p) {
  using S = Shape<M>;
  auto r = shared_array<float>(S::r_at, S::dim * S::r_pitch);
  auto z = shared_array<float>(S::z_at, S::samples * S::z_pitch);
  auto x = shared_array<float>(S::x_at, S::dim * S::x_pitch);
  auto table = shared_array<uint4>(S::table_at, S::dim);  // channel and tap of a patch's entry

  const int taps = p.kernel[0] * p.kernel[1] * p.kernel[2], dim = p.group_channels * taps;
  const int64_t group = blockIdx.y;
  const auto source = cast<const T>(p.x) + group * p.group_channels * p.channel_stride;
  const auto weights = p.r + group * dim * dim;

  // R and the table, rows and columns beyond D zero.
  for (int e = threadIdx.x; e < S::dim * S::dim; e += kThreads) {
    const int i = e / S::dim, d = e % S::dim;
    r[i * S::r_pitch + d] = i < dim && d < dim ? static_cast<float>(weights[i * dim + d]) : 0.0f;
  }
  for (int d = threadIdx.x; d < S::dim; d += kThreads) {
    const int tap = d % taps, kx = tap % p.kernel[2], ky = tap / p.kernel[2] % p.kernel[1],
              kz = tap / p.kernel[2] / p.kernel[1];
    table[d] = make_uint4(d / taps, kz * p.dilation[0] - p.padding[0],
                          ky * p.dilation[1] - p.padding[1], kx * p.dilation[2] - p.padding[2]);
  }
  __syncthreads();

  const auto positions = static_cast<int>(p.output[0] * p.output[1] * p.output[2]);
  const auto samples = static_cast<int>(p.images * positions);  // below 2^31, see launch_stats
  const int chunks = ceil_div(samples, S::samples), share = ceil_div(chunks, p.splits);
  const int first = blockIdx.x * share, last = min(chunks, first + share);

  const int row = threadIdx.x / kGrid, column = threadIdx.x % kGrid;
  // x x^T is symmetric: of its M x M grid of 16 x 16 tiles only those with m <= n
  float sums[M * (M + 1) / 2] = {};
  for (int chunk = first; chunk < last; ++chunk) {
    // 1. Z: this thread gathers entries of one patch
    {
      const int t = threadIdx.x % S::samples;
      const int64_t sample = int64_t{chunk} * S::samples + t;
      const bool real = sample < samples;
      int position = static_cast<int>(sample) % positions;
      const int64_t image = static_cast<int>(sample) / positions;
      const int ox = position % p.output[2] * p.stride[2];
      position /= p.output[2];
      const int oy = position % p.output[1] * p.stride[1];
      const int oz = position / p.output[1] * p.stride[0];
      for (int d = threadIdx.x / S::samples; d < S::dim; d += kThreads / S::samples) {
        float value = 0.0f;
        if (real && d < dim) {
          const uint4 entry = table[d];
          const int iz = oz + static_cast<int>(entry.y), iy = oy + static_cast<int>(entry.z),
                    ix = ox + static_cast<int>(entry.w);
          if (iz >= 0 && iz < p.size[0] && iy >= 0 && iy < p.size[1] && ix >= 0 && ix < p.size[2])
            value = to_float(
                source[image * p.image_stride + entry.x * p.channel_stride +
                       iz * p.pixel_stride[0] + iy * p.pixel_stride[1] + ix * p.pixel_stride[2]]);
        }
        z[t * S::z_pitch + d] = value;
      }
    }
    __syncthreads();

    // 2. X = R Z: rows row + 16 m, samples column + 16 s
    {
      constexpr int kSamples = S::samples / kGrid;
      float product[M][kSamples] = {};
      const uint32_t r_row = shared_address(r) + 4 * row * S::r_pitch;
      const uint32_t z_row = shared_address(z) + 4 * column * S::z_pitch;
      for (int d = 0; d < S::dim; d += 4) {
        float4 b[kSamples];
#pragma unroll
        for (int s = 0; s < kSamples; ++s)
          b[s] = shared_load<float4>(z_row + 4 * (kGrid * s * S::z_pitch + d));
#pragma unroll
        for (int m = 0; m < M; ++m) {
          const float4 a = shared_load<float4>(r_row + 4 * (kGrid * m * S::r_pitch + d));
#pragma unroll
          for (int s = 0; s < kSamples; ++s) add_products(product[m][s], a, b[s]);
        }
      }
#pragma unroll
      for (int m = 0; m < M; ++m)
#pragma unroll
        for (int s = 0; s < kSamples; ++s)
          x[(row + kGrid * m) * S::x_pitch + column + kGrid * s] = product[m][s];
    }
    __syncthreads();

    // 3. x x^T: rows row + 16 m, columns column + 16 n. Patches beyond the last are zero.
    {
      const uint32_t left = shared_address(x) + 4 * row * S::x_pitch;
      const uint32_t right = shared_address(x) + 4 * column * S::x_pitch;
      for (int t = 0; t < S::samples; t += 4) {
        float4 b[M];
#pragma unroll
        for (int n = 0; n < M; ++n)
          b[n] = shared_load<float4>(right + 4 * (kGrid * n * S::x_pitch + t));
        int tile = 0;
#pragma unroll
        for (int m = 0; m < M; ++m) {
          const float4 a = shared_load<float4>(left + 4 * (kGrid * m * S::x_pitch + t));
#pragma unroll
          for (int n = m; n < M; ++n) add_products(sums[tile++], a, b[n]);
        }
      }
    }
    // Z is free since the second barrier, X is written again only after the next one.
  }

  const auto out = p.workspace + (group * p.splits + blockIdx.x) * dim * dim;
  int tile = 0;
#pragma unroll
  for (int m = 0; m < M; ++m)
#pragma unroll
    for (int n = m; n < M; ++n) {
      const int i = row + kGrid * m, j = column + kGrid * n;
      const float sum = sums[tile++];
      if (i >= dim || j >= dim) continue;
      out[i * dim + j] = sum;
      if (m != n) out[j * dim + i] = sum;
    }
}

// Adds the partial sums of one group, one element per thread.
template <int Threads>
__global__ void __launch_bounds__(Threads) stats_finish_kernel(StatsParams p) {
  const int dim = p.group_channels * p.kernel[0] * p.kernel[1] * p.kernel[2], size = dim * dim;
  const int64_t samples = p.images * p.output[0] * p.output[1] * p.output[2];
  const int64_t group = blockIdx.y;
  const int e = blockIdx.x * Threads + threadIdx.x;
  if (e >= size) return;
  float total = 0.0f;
  for (int64_t split = 0; samples > 0 && split < p.splits; ++split)
    total += p.workspace[(group * p.splits + split) * size + e];
  if (samples > 0) total /= static_cast<float>(samples);
  const bool diagonal = e / dim == e % dim;
  p.c[group * size + e] = diagonal ? 0.0f : total;
  if (diagonal) p.v[group * dim + e / dim] = total - 1.0f;
}

template <class T, int M>
cudaError_t launch_main(const StatsParams& p, cudaStream_t stream) {
  const dim3 grid(static_cast<unsigned>(p.splits), static_cast<unsigned>(p.groups));
  return launch(stats_kernel<T, M>, grid, dim3(kThreads), Shape<M>::bytes, stream, p);
}

}  // namespace stats

constexpr bool stats_supported(int64_t dim) { return dim >= 1 && dim <= stats::kMaxDim; }

inline size_t stats_workspace_bytes(int64_t groups, int64_t dim, int64_t splits) {
  return sizeof(float) * static_cast<size_t>(groups * dim * dim * splits);
}

// A number of splits that fills `multiprocessors` twice, none of them without samples.
inline int32_t stats_splits(int64_t samples, int64_t groups, int64_t dim, int multiprocessors) {
  const int64_t chunk = dim <= 32 ? 64 : dim <= 64 ? 32 : 16;
  const int64_t chunks = ceil_div(samples, chunk), wanted = ceil_div(2 * multiprocessors, groups);
  return static_cast<int32_t>(chunks < 1 ? 1 : wanted < chunks ? wanted : chunks);
}

inline Problem stats_problem(const StatsParams& p) {
  const char* expected = "1 or more along every axis";
  for (int d = 0; d < 3; ++d) {
    const Problem problem = first_problem({
        {p.output[d] < 1, "output", p.output[d], expected},
        {p.kernel[d] < 1, "kernel", p.kernel[d], expected},
        {p.stride[d] < 1, "stride", p.stride[d], expected},
        {p.dilation[d] < 1, "dilation", p.dilation[d], expected},
    });
    if (problem.found) return problem;
  }
  return first_problem({
      {p.groups < 0 || p.groups > 65535, "groups", p.groups, "0 to 65535"},
      {p.splits < 1, "splits", p.splits, "1 or more"},
      {!stats_supported(stats::patch_length(p)), "group_channels", p.group_channels,
       "patches of 1 to 128 elements"},
      {p.images < 0 || stats::sample_count(p) > 0x7fffffff - 128, "images", p.images,
       "at most 2147483519 samples"},
  });
}

inline cudaError_t launch_stats(const StatsParams& p, cudaStream_t stream) {
  if (stats_problem(p).found) return cudaErrorInvalidValue;
  const int64_t samples = stats::sample_count(p), dim = stats::patch_length(p);
  if (samples > 0) {
    const cudaError_t error = with_dtype(p.dtype, [&](auto type) {
      using T = typename decltype(type)::type;
      return dim <= 32   ? stats::launch_main<T, 2>(p, stream)
             : dim <= 64 ? stats::launch_main<T, 4>(p, stream)
                         : stats::launch_main<T, 8>(p, stream);
    });
    if (error != cudaSuccess) return error;
  }
  const dim3 grid(static_cast<unsigned>(ceil_div(dim * dim, stats::kThreads)),
                  static_cast<unsigned>(p.groups));
  return launch(stats::stats_finish_kernel<stats::kThreads>, grid, dim3(stats::kThreads), 0, stream,
                p);
}

}  // namespace dbp
