#include "../kernels/gram_box.cuh"
#include "kernels.h"

cudaError_t dbp::compiled::gram_box(const GramBoxParams& params, cudaStream_t stream) {
  return launch_gram_box(params, stream);
}
