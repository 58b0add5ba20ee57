// The CPU kernels compiled for one instruction set; setup.py gives this file its flags.
#include "cpu/all_kernels.h"
