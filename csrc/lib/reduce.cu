#include "../kernels/reduce.cuh"
#include "kernels.h"

cudaError_t dbp::compiled::reduce(const ReduceParams& params, cudaStream_t stream) {
  return launch_reduce(params, stream);
}
