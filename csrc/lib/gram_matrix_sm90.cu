#include "../kernels/gram_matrix_sm90.cuh"
#include "kernels.h"

cudaError_t dbp::compiled::gram_matrix_sm90(const GramMatrixParams& params, cudaStream_t stream) {
  return launch_gram_matrix_sm90(params, stream);
}
