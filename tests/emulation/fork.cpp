// csrc/cuda/device.cu's Fork on a CUDA runtime that only writes down what it is asked for. Streams are
// numbered from 100 on, events from 200 on, in the order in which they are made.
#include <cuda_runtime.h>

#include <cstdio>
#include <cstdlib>
#include <set>
#include <string>
#include <thread>

#include "cuda/device.h"

using namespace lstm_cuda;

namespace {

std::string asked;  // since the last check
std::string failing;
std::set<size_t> alive;
size_t made[2] = {100, 200};

template <class Handle>
size_t number(Handle handle) {
  return reinterpret_cast<size_t>(handle);
}

cudaError_t answer(const char* name) {
  return failing == name ? cudaErrorMemoryAllocation : cudaSuccess;
}

template <class Handle>
cudaError_t make(const char* name, int kind, Handle* handle) {
  if (failing == name) return answer(name);
  *handle = reinterpret_cast<Handle>(made[kind]++);
  alive.insert(number(*handle));
  return cudaSuccess;
}

void write_down(const char* name, size_t first, size_t second) {
  asked += std::string(name) + "(" + std::to_string(first) + ", " + std::to_string(second) + ") ";
}

void expect(const std::string& found, const std::string& wanted, const char* what) {
  if (found == wanted) return;
  std::printf("%s: wanted '%s', got '%s'\n", what, wanted.c_str(), found.c_str());
  std::exit(1);
}
void expect_asked(const char* wanted, const char* what) {
  expect(std::exchange(asked, ""), wanted, what);
}

Stream stream(size_t n) { return reinterpret_cast<Stream>(n); }

}  // namespace

extern "C" {
cudaError_t cudaStreamCreateWithFlags(cudaStream_t* stream, unsigned flags) {
  if (flags != cudaStreamNonBlocking) asked += "blocking ";
  return make("stream", 0, stream);
}
cudaError_t cudaEventCreateWithFlags(cudaEvent_t* event, unsigned flags) {
  if (flags != cudaEventDisableTiming) asked += "timed ";
  return make(made[1] % 2 ? "second event" : "event", 1, event);
}
cudaError_t cudaStreamDestroy(cudaStream_t stream) {
  alive.erase(number(stream));
  return cudaSuccess;
}
cudaError_t cudaEventDestroy(cudaEvent_t event) {
  alive.erase(number(event));
  return cudaSuccess;
}
cudaError_t cudaEventRecord(cudaEvent_t event, cudaStream_t stream) {
  write_down("record", number(event), number(stream));
  return answer("record");
}
cudaError_t cudaStreamWaitEvent(cudaStream_t stream, cudaEvent_t event, unsigned) {
  write_down("wait", number(stream), number(event));
  return answer("wait");
}
cudaError_t cudaThreadExchangeStreamCaptureMode(cudaStreamCaptureMode* mode) {
  static thread_local cudaStreamCaptureMode current = cudaStreamCaptureModeGlobal;
  std::swap(*mode, current);
  asked += current == cudaStreamCaptureModeRelaxed ? "relaxed " : "global ";
  return cudaSuccess;
}
cudaError_t cudaGetLastError() { return cudaSuccess; }
const char* cudaGetErrorString(cudaError_t) { return "an error"; }
cudaError_t cudaDeviceGetAttribute(int*, cudaDeviceAttr, int) { return cudaSuccess; }
cudaError_t cudaStreamIsCapturing(cudaStream_t, cudaStreamCaptureStatus*) { return cudaSuccess; }
cudaError_t cudaGetDevice(int*) { return cudaSuccess; }
}

int main() {
  {
    Fork none(0, stream(7), false);
    expect(std::to_string(number(none.stream())), "7", "not wanted");
  }
  expect_asked("", "not wanted");
  for (const char* call : {"stream", "event", "second event"}) {
    failing = call;
    const Fork none(0, stream(7), true);
    expect(std::to_string(number(none.stream())), "7", call);
    expect_asked("relaxed global ", call);
    expect(std::to_string(alive.size()), "0", "nothing is left of what could not be made");
    failing.clear();
    made[0] = 100, made[1] = 200;
  }
  for (const char* first : {"relaxed global ", ""}) {  // made once
    Fork fork(0, stream(7), true);
    expect(std::to_string(number(fork.stream())), "100", "forked");
    expect_asked((std::string(first) + "record(200, 7) wait(100, 200) ").c_str(), "forked");
    expect(fork.join().message, "", "joined");
    expect_asked("record(201, 100) wait(7, 201) ", "joined");
    expect(std::to_string(number(fork.stream())), "7", "joined");
  }
  expect_asked("", "joined once");
  {
    const Fork fork(0, stream(7), true);
  }
  expect_asked("record(200, 7) wait(100, 200) record(201, 100) wait(7, 201) ", "left early");

  // A stream has its own on each device, for all threads but where the handle differs from thread to
  // thread.
  std::thread([] {
    Fork same(0, stream(7), true), other(0, stream(8), true), device(1, stream(7), true);
    expect(std::to_string(number(same.stream())), "100", "another thread");
    expect(std::to_string(number(other.stream())), "101", "another stream");
    expect(std::to_string(number(device.stream())), "102", "another device");
    const Fork none(0, cudaStreamPerThread, true);
    expect(std::to_string(number(none.stream())), "2", "a handle of many streams");
  }).join();
  expect(std::to_string(alive.size()), "9", "three streams, two events for each");

  asked.clear();
  for (const char* call : {"record", "wait"}) {
    failing = call;
    Fork none(0, stream(7), true);
    expect(std::to_string(number(none.stream())), "7", "a fork that fails");
    failing.clear();
    Fork fork(0, stream(7), true);
    failing = call;
    expect(fork.join().message, "two streams could not be joined: an error", call);
    failing.clear();
  }
}
