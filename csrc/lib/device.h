#pragma once

#include <cuda_runtime.h>

namespace dbp {

// Whether this device has code for the library's kernels and a driver new enough for it:
// cudaSuccess or the first error met. Leaves the current device as it was.
cudaError_t device_supported(int device);

}  // namespace dbp
