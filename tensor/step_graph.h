// StepGraph: work that is done many times over with the same shapes and addresses, recorded once
// and replayed, so that a device does not wait for the host between its kernels.
//
// The first run() calls the body as it is: plans are made, kernels loaded. The second records it,
// where the device can (and may call it twice for that), and from then on the recording is
// replayed. So the body must ask for the same work every time, read what changes from tensors that
// live outside it (a batch is copied into them before), read nothing back to the host, and free
// nothing that was allocated before. On devices that do not record, every run() calls the body.
#pragma once

#include <functional>
#include <utility>

#include "tensor/device.h"

namespace omq {

class StepGraph {
 public:
  StepGraph(Device device, std::function<void()> body) : device_(device), body_(std::move(body)) {}
  ~StepGraph() {
    if (recorded_) device_api(device_).forget(recorded_, device_.index);
  }
  StepGraph(const StepGraph&) = delete;
  StepGraph& operator=(const StepGraph&) = delete;

  void run() {
    const DeviceApi& api = device_api(device_);
    if (!recorded_ && warm_) recorded_ = api.record(body_, device_.index);
    if (recorded_)
      api.replay(recorded_, device_.index);
    else
      body_();
    warm_ = true;
  }

 private:
  Device device_;
  std::function<void()> body_;
  bool warm_ = false;
  void* recorded_ = nullptr;
};

}  // namespace omq
