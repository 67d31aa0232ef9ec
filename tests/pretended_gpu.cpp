// What torch asks of CUDA beside its kernels, answered as a machine with one idle GPU would: for `pretended_gpu.py`.
#include <ATen/detail/CUDAHooksInterface.h>
#include <Python.h>
#include <c10/core/impl/DeviceGuardImplInterface.h>

namespace {
const c10::Device gpu(c10::DeviceType::CUDA, 0);

struct Guard final : c10::impl::DeviceGuardImplInterface {
  c10::DeviceType type() const override { return gpu.type(); }
  c10::Device exchangeDevice(c10::Device) const override { return gpu; }
  c10::Device getDevice() const override { return gpu; }
  void setDevice(c10::Device) const override {}
  void uncheckedSetDevice(c10::Device) const noexcept override {}
  c10::Stream getStream(c10::Device device) const override { return c10::Stream(c10::Stream::DEFAULT, device); }
  c10::Stream exchangeStream(c10::Stream stream) const override { return stream; }
  c10::DeviceIndex deviceCount() const noexcept override { return 1; }
};

Guard guard;
const bool is_registered = [] {
  c10::impl::device_guard_impl_registry[static_cast<int>(gpu.type())].store(&guard);
  return true;
}();
}  // namespace

namespace at {
struct CUDAHooks : CUDAHooksInterface {  // by this name torch looks for it
  explicit CUDAHooks(CUDAHooksArgs) {}
  bool isBuilt() const override { return true; }
  bool isAvailable() const override { return true; }
  bool hasCUDA() const override { return true; }
  bool hasPrimaryContext(DeviceIndex) const override { return true; }
  DeviceIndex getCurrentDevice() const override { return 0; }
  DeviceIndex deviceCount() const override { return 1; }
  void init() const override {}
};
REGISTER_CUDA_HOOKS(CUDAHooks)
}  // namespace at

static PyModuleDef module = {PyModuleDef_HEAD_INIT, "pretended_hooks", nullptr, -1, nullptr};
PyMODINIT_FUNC PyInit_pretended_hooks() { return PyModule_Create(&module); }
