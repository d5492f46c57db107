// What the device's library says of itself.
#include "../core/api.h"
#include "../core/common.h"
#include "launch.h"

using namespace lowrank;

namespace {
__global__ void probe_kernel() {}
}  // namespace

int lowrank_abi() { return LOWRANK_ABI; }

const char* lowrank_error(int code) { return cudaGetErrorString(static_cast<cudaError_t>(code)); }

void lowrank_set_threads(int) {}

int lowrank_devices(int* count) {
  *count = 0;
  return reported(cudaGetDeviceCount(count));
}

int lowrank_capability(int device, int* capability) {
  int major = 0, minor = 0;
  *capability = 0;
  int error = reported(cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device));
  if (error == 0) {
    error = reported(cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, device));
  }
  if (error == 0) *capability = 10 * major + minor;
  return error;
}

int lowrank_probe() {
  cudaFuncAttributes attributes;
  return reported(cudaFuncGetAttributes(&attributes, reinterpret_cast<const void*>(probe_kernel)));
}
