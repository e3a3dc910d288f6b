#include "../kernels/update.cuh"
#include "kernels.h"

cudaError_t dbp::compiled::update(const UpdateParams& params, cudaStream_t stream) {
  return launch_update(params, stream);
}
