// Stands in for c10's header.
#pragma once
#include <c10/util/Exception.h>
#include <cuda_runtime.h>
