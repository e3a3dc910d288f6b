// How correlated are the 3x3 patches of an image? The kernels from C++, without Python or torch:
// with R = 1, C holds the second moments of the patches off the diagonal and V those on it minus 1.
#include <lib/device.h>
#include <lib/kernels.h>

#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <kernels/stats.cuh>
#include <vector>

namespace {

void check(cudaError_t error, const char* what) {
  if (error == cudaSuccess) return;
  std::fprintf(stderr, "%s: %s\n", what, cudaGetErrorString(error));
  std::exit(1);
}

template <class T>
T* on_device(const std::vector<T>& values) {
  T* pointer = nullptr;
  check(cudaMalloc(&pointer, values.size() * sizeof(T)), "cudaMalloc");
  check(cudaMemcpy(pointer, values.data(), values.size() * sizeof(T), cudaMemcpyHostToDevice),
        "copy");
  return pointer;
}

}  // namespace

int main() {
  check(dbp::device_supported(0), "device 0");

  // One grey image of 64x64 pixels, a smooth pattern.
  constexpr int kSize = 64, kKernel = 3, kDim = kKernel * kKernel;
  std::vector<float> image(kSize * kSize), R(kDim * kDim, 0.0f), C(kDim * kDim), V(kDim);
  for (int y = 0; y < kSize; ++y)
    for (int x = 0; x < kSize; ++x) image[y * kSize + x] = std::sin(0.3f * x) + std::cos(0.2f * y);
  for (int i = 0; i < kDim; ++i) R[i * kDim + i] = 1.0f;

  dbp::StatsParams p{};
  p.x = on_device(image);
  p.r = on_device(R);
  p.c = on_device(C);
  p.v = on_device(V);
  p.dtype = dbp::DType::fp32;
  p.image_stride = p.channel_stride = kSize * kSize;
  p.images = p.groups = p.group_channels = 1;
  constexpr int kOutput = kSize - kKernel + 1;
  const int size[] = {1, kSize, kSize}, output[] = {1, kOutput, kOutput};
  const int kernel[] = {1, kKernel, kKernel};
  const int64_t stride[] = {0, kSize, 1};
  for (int d = 0; d < 3; ++d) {
    p.size[d] = size[d];
    p.output[d] = output[d];
    p.kernel[d] = kernel[d];
    p.pixel_stride[d] = stride[d];
    p.stride[d] = p.dilation[d] = 1;
  }
  p.splits = dbp::stats_splits(kOutput * kOutput, p.groups, kDim, 16);
  const size_t bytes = dbp::stats_workspace_bytes(p.groups, kDim, p.splits);
  p.workspace = on_device(std::vector<float>(bytes / sizeof(float)));

  check(dbp::compiled::stats(p, nullptr), "stats");
  check(cudaMemcpy(C.data(), p.c, C.size() * sizeof(float), cudaMemcpyDeviceToHost), "result");
  check(cudaMemcpy(V.data(), p.v, V.size() * sizeof(float), cudaMemcpyDeviceToHost), "result");

  // The same entry by hand: the first tap against the second.
  double expected = 0.0;
  for (int y = 0; y < kOutput; ++y)
    for (int x = 0; x < kOutput; ++x)
      expected += double{image[y * kSize + x]} * image[y * kSize + x + 1] / (kOutput * kOutput);
  std::printf("second moment of the first two taps: %.6f, by hand %.6f\n", C[1], expected);
  std::printf("mean square of the first tap: %.6f\n", V[0] + 1);
  return std::fabs(C[1] - expected) < 1e-4 ? 0 : 1;
}
