#include "device.h"

namespace dbp {

// Compiled for the same targets as every other kernel, so that looking it up tells.
__global__ void probe_kernel() {}

cudaError_t device_supported(int device) {
  int before = 0;
  cudaError_t error = cudaGetDevice(&before);
  if (error == cudaSuccess) error = cudaSetDevice(device);
  if (error == cudaSuccess) {
    cudaFuncAttributes attributes;
    error = cudaFuncGetAttributes(&attributes, probe_kernel);
    cudaSetDevice(before);
  }
  cudaGetLastError();  // reported here: it must not show at the next launch
  return error;
}

}  // namespace dbp
