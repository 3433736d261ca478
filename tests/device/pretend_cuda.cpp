// Tells torch that there is CUDA: device guard and hooks, nothing behind them. See pretend.py.
#include <c10/core/impl/DeviceGuardImplInterface.h>
#include <ATen/detail/CUDAHooksInterface.h>
#include <cstdlib>
using c10::Device; using c10::DeviceIndex; using c10::DeviceType; using c10::Stream;
namespace {
thread_local DeviceIndex here = 0;
DeviceIndex many() { const char* n = std::getenv("PRETEND_GPUS"); return n ? std::atoi(n) : 1; }
DeviceIndex change(DeviceIndex d) { auto old = here; if (d >= 0) here = d; return old; }
struct Guard final : c10::impl::DeviceGuardImplInterface {
  DeviceType type() const override { return DeviceType::CUDA; }
  Device exchangeDevice(Device d) const override { return Device(DeviceType::CUDA, change(d.index())); }
  Device getDevice() const override { return Device(DeviceType::CUDA, here); }
  void setDevice(Device d) const override { change(d.index()); }
  void uncheckedSetDevice(Device d) const noexcept override { change(d.index()); }
  Stream getStream(Device d) const override {
    return Stream(Stream::DEFAULT, Device(DeviceType::CUDA, d.has_index() ? d.index() : here));
  }
  Stream getNewStream(Device d, int) const override { return getStream(d); }
  Stream exchangeStream(Stream s) const override { return s; }
  DeviceIndex deviceCount() const noexcept override { return many(); }
  bool queryStream(const Stream&) const override { return true; }
  void synchronizeStream(const Stream&) const override {}
  void record(void** e, const Stream&, const DeviceIndex, const c10::EventFlag) const override {
    *e = reinterpret_cast<void*>(1);
  }
  void block(void*, const Stream&) const override {}
  bool queryEvent(void*) const override { return true; }
  void destroyEvent(void*, const DeviceIndex) const noexcept override {}
};
C10_REGISTER_GUARD_IMPL(CUDA, Guard);
}
namespace at {
struct CUDAHooks : CUDAHooksInterface {
  CUDAHooks(CUDAHooksArgs) {}
  bool isBuilt() const override { return true; }
  bool isAvailable() const override { return true; }
  void init() const override {}
  bool hasCUDA() const override { return true; }
  bool hasPrimaryContext(DeviceIndex) const override { return true; }
  bool isPinnedPtr(const void*) const override { return false; }
  DeviceIndex current_device() const override { return here; }
  DeviceIndex deviceCount() const override { return many(); }
  int getNumGPUs() const override { return many(); }
  void setCurrentDevice(DeviceIndex d) const override { change(d); }
  DeviceIndex getCurrentDevice() const override { return here; }
  DeviceIndex exchangeDevice(DeviceIndex d) const override { return change(d); }
  DeviceIndex maybeExchangeDevice(DeviceIndex d) const override { return change(d); }
};
REGISTER_CUDA_HOOKS(CUDAHooks)
}
