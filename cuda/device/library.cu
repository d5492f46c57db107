// What the device's library says of itself.
#include "../core/api.h"
#include "../core/common.h"
#include "launch.h"

int lowrank_abi() { return LOWRANK_ABI; }

const char* lowrank_error(int code) { return cudaGetErrorString(static_cast<cudaError_t>(code)); }

void lowrank_set_threads(int) {}

int lowrank_devices() {
  int count = 0;
  if (cudaGetDeviceCount(&count) != cudaSuccess) {
    cudaGetLastError();  // not the next caller's
    return 0;
  }
  return count;
}
