#include "../kernels/gram_shift.cuh"
#include "kernels.h"

cudaError_t dbp::compiled::gram_shift(const GramShiftParams& params, cudaStream_t stream) {
  return launch_gram_shift(params, stream);
}
