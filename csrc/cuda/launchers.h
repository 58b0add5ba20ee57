// The launchers: what a binding calls. They launch on the stream, wait for nothing, and check
// nothing that a binding has checked.
#pragma once
#include <cuda_runtime_api.h>

#include "math/token_loss.h"

namespace megarlx::cuda {

// token_loss
void launch_token_loss(const TokenLossArgs& args, bool sums_are_given, cudaStream_t stream);
void launch_token_loss_partials(const TokenLossArgs& args, cudaStream_t stream);

}  // namespace megarlx::cuda
