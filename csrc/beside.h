// Work beside what a stream does next, on a second stream of the same device. Device-neutral, so
// that bindings without CUDA compile it too; megarlx/ops/beside.py is the same for loops in Python.
#pragma once
#include <c10/core/Event.h>
#include <c10/core/StreamGuard.h>
#include <c10/core/impl/VirtualGuardImpl.h>

#include <array>
#include <map>

namespace megarlx {

// Begun work may allocate nothing, and its tensors must live until it was joined. A graph that is
// being captured takes both streams in: the second waits for the first, and every work is joined.
class Beside {
 public:
  explicit Beside(c10::Device device)
      : main_(c10::impl::VirtualGuardImpl(device.type()).getStream(device)),
        second_(second_of(device)),
        between_(device.type()),
        ended_{c10::Event(device.type()), c10::Event(device.type())} {}

  // Begins where all that was launched so far has ended; two may be under way.
  template <typename Work>
  void begin(int64_t number, const Work& work) {
    order(main_, second_);
    has_begun_ = true;
    const c10::StreamGuard on(second_);
    work();
    ended_[number % 2].record(second_);
  }

  // What is launched from here on comes behind this work.
  void join(int64_t number) { ended_[number % 2].block(main_); }

  // Behind all works, and behind one that failed half-way.
  void join_all() {
    if (has_begun_) order(second_, main_);
  }

 private:
  // One for each device and thread: a new one could not be had while a graph is captured.
  static c10::Stream second_of(c10::Device device) {
    thread_local std::map<c10::DeviceIndex, c10::Stream> seconds;
    const auto found = seconds.find(device.index());
    if (found != seconds.end()) return found->second;
    const c10::impl::VirtualGuardImpl guard(device.type());
    return seconds.emplace(device.index(), guard.getStreamFromGlobalPool(device)).first->second;
  }

  void order(c10::Stream first, c10::Stream then) {
    between_.record(first);
    between_.block(then);
  }

  c10::Stream main_, second_;
  c10::Event between_;
  std::array<c10::Event, 2> ended_;
  bool has_begun_ = false;
};

}  // namespace megarlx
