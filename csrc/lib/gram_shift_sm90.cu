#include "../kernels/gram_shift_sm90.cuh"
#include "kernels.h"

cudaError_t dbp::compiled::gram_shift_sm90(const GramShiftParams& params, cudaStream_t stream) {
  return launch_gram_shift_sm90(params, stream);
}
