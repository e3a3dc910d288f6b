#include "../kernels/pack.cuh"
#include "kernels.h"

cudaError_t dbp::compiled::pack(const PackParams& params, cudaStream_t stream) {
  return launch_pack(params, stream);
}
