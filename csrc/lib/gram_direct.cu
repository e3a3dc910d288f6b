#include "../kernels/gram_direct.cuh"
#include "kernels.h"

cudaError_t dbp::compiled::gram_direct(const GramDirectParams& params, cudaStream_t stream) {
  return launch_gram_direct(params, stream);
}
