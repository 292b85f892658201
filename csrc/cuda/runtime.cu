// What the binding asks the CUDA runtime. The runtime is linked statically: on a machine without a
// driver the extension loads, and every call here returns an error instead.
#include <cuda_runtime.h>

#include <cstring>

#include "launchers.h"

namespace idap {
namespace cuda {
namespace {

__global__ void probe() {}

}  // namespace

Status set_device(int device, int* previous) {
  cudaError_t error = cudaGetDevice(previous);
  if (error == cudaSuccess && *previous != device) error = cudaSetDevice(device);
  return static_cast<Status>(error);
}

Status device_count(int* count) {
  const cudaError_t error = cudaGetDeviceCount(count);
  cudaGetLastError();  // an error here must not be found by the next launch
  return static_cast<Status>(error);
}

Status driver_version(int* version) { return static_cast<Status>(cudaDriverGetVersion(version)); }

Status runtime_version(int* version) { return static_cast<Status>(cudaRuntimeGetVersion(version)); }

Status device_info(int device, DeviceInfo* info) {
  cudaError_t error =
      cudaDeviceGetAttribute(&info->major, cudaDevAttrComputeCapabilityMajor, device);
  if (error == cudaSuccess) {
    error = cudaDeviceGetAttribute(&info->minor, cudaDevAttrComputeCapabilityMinor, device);
  }
  cudaDeviceProp properties;
  if (error == cudaSuccess) error = cudaGetDeviceProperties(&properties, device);
  if (error == cudaSuccess) std::strncpy(info->name, properties.name, sizeof(info->name) - 1);
  cudaGetLastError();
  return static_cast<Status>(error);
}

Status kernels_load(int device) {
  int previous = device;
  cudaError_t error = static_cast<cudaError_t>(set_device(device, &previous));
  cudaFuncAttributes attributes;
  if (error == cudaSuccess) error = cudaFuncGetAttributes(&attributes, probe);
  if (previous != device) cudaSetDevice(previous);
  cudaGetLastError();
  return static_cast<Status>(error);
}

const char* error_name(Status status) { return cudaGetErrorName(static_cast<cudaError_t>(status)); }

const char* error_text(Status status) {
  return cudaGetErrorString(static_cast<cudaError_t>(status));
}

}  // namespace cuda
}  // namespace idap
