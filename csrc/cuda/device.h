// The device a call runs on.
#pragma once

#include "launch.h"
#include "plan.h"

namespace lstm_cuda {

// Properties that plans depend on; asked of the driver once for each device.
Status cuda_device(int index, CudaDevice& device);

struct Beside;

// A stream beside the caller's, for what does not need what the caller's is given next. It follows that
// one up to the constructor, and is followed by it from join() on, or the destructor: until then memory
// that is used beside must not be freed, and after that may be, in the order of the caller's stream.
// Can be captured with the caller's stream. One that was not wanted, or that the device has not got, is
// the caller's stream itself.
class Fork {
 public:
  Fork(int device, Stream from, bool wanted);
  Fork(const Fork&) = delete;
  Fork& operator=(const Fork&) = delete;
  ~Fork() { (void)join(); }

  Stream stream() const;
  Status join();

 private:
  Stream from_;
  const Beside* beside_ = nullptr;  // null: not forked, or joined again
};

// True where work put on the stream is not run but recorded, for a CUDA graph.
bool capturing(Stream stream);

}  // namespace lstm_cuda
