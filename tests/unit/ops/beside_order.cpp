// csrc/beside.h on a device that is not there: says what its streams and events were told.
#include <c10/core/impl/DeviceGuardImplInterface.h>

#include <cstdint>
#include <iostream>
#include <stdexcept>

#include "beside.h"

namespace {

constexpr auto kType = c10::DeviceType::PrivateUse1;
c10::StreamId current = 0;
std::intptr_t events = 0;

struct Told final : c10::impl::DeviceGuardImplInterface {
  static constexpr c10::DeviceType static_type = kType;
  c10::DeviceType type() const override { return kType; }
  c10::Device exchangeDevice(c10::Device) const override { return getDevice(); }
  c10::Device getDevice() const override { return {kType, 0}; }
  void setDevice(c10::Device) const override {}
  void uncheckedSetDevice(c10::Device) const noexcept override {}
  c10::DeviceIndex deviceCount() const noexcept override { return 1; }
  c10::Stream getStream(c10::Device device) const override {
    return c10::Stream(c10::Stream::UNSAFE, device, current);
  }
  c10::Stream getStreamFromGlobalPool(c10::Device device, bool) const override {
    std::cout << "a stream of the pool\n";
    return c10::Stream(c10::Stream::UNSAFE, device, 1);
  }
  c10::Stream exchangeStream(c10::Stream stream) const override {
    const c10::Stream before(c10::Stream::UNSAFE, stream.device(), current);
    current = stream.id();
    return before;
  }
  void record(void** event, const c10::Stream& stream, c10::DeviceIndex,
              c10::EventFlag) const override {
    if (*event == nullptr) *event = reinterpret_cast<void*>(++events);
    std::cout << stream.id() << " records " << reinterpret_cast<std::intptr_t>(*event) << "\n";
  }
  void block(void* event, const c10::Stream& stream) const override {
    std::cout << stream.id() << " waits for " << reinterpret_cast<std::intptr_t>(event) << "\n";
  }
  void destroyEvent(void*, c10::DeviceIndex) const noexcept override {}
};

C10_REGISTER_GUARD_IMPL(PrivateUse1, Told);

void say(const char* what) { std::cout << what << " on " << current << "\n"; }

}  // namespace

int main() {
  for (int call = 0; call < 2; ++call) {
    events = 0;
    megarlx::Beside beside(c10::Device(kType, 0));
    say("call");
    beside.join_all();  // nothing was begun
    for (int number = 0; number < 3; ++number) {
      if (number > 1) beside.join(number - 2);
      beside.begin(number, [] { say("work"); });
    }
    try {
      beside.begin(3, [] { throw std::runtime_error("work"); });
    } catch (const std::runtime_error&) {
      say("failed");
    }
    beside.join_all();
  }
}
