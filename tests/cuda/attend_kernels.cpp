// SPDX-License-Identifier: Apache-2.0
// The attention kernels for the tests: sizes and pointers in the order of the structs.
#include <vector>

#include "cuda/attend.cu"
#include "exports.h"

namespace {

using namespace pyseq;

template <class S>
int attend(const int64_t* sizes, void* const* data) {
  const auto at = [&](int i) { return static_cast<S*>(data[i]); };
  cpu::Attend<S> args{};
  args.additive = sizes[0] != 0;
  args.steps = sizes[1];
  args.batch = sizes[2];
  args.heads = sizes[3];
  args.source = sizes[4];
  args.key_size = sizes[5];
  args.memory_size = sizes[6];
  args.window = sizes[7];
  args.query = at(0);
  args.keys = at(1);
  args.memory = at(2);
  args.v = at(3);
  args.lengths = static_cast<const int64_t*>(data[4]);
  args.centers = at(5);
  args.attn = at(6);
  args.context = at(7);
  args.step = static_cast<const int64_t*>(data[8]);
  std::vector<unsigned char> workspace(static_cast<size_t>(cuda::attend_workspace(args)), 0xff);
  void* const work = workspace.empty() ? nullptr : workspace.data();
  if (sizes[8] == 0) return cuda::attend_forward(args, work, nullptr);
  return cuda::attend_backward<S>(
      {args, at(9), at(10), at(11), at(12), at(13), at(14), at(15), at(16)}, work, nullptr);
}

}  // namespace

PYSEQ_EXPORT int attend_float32(const int64_t* sizes, void* const* data) {
  return attend<float>(sizes, data);
}
PYSEQ_EXPORT int attend_float64(const int64_t* sizes, void* const* data) {
  return attend<double>(sizes, data);
}
PYSEQ_EXPORT int attend_float16(const int64_t* sizes, void* const* data) {
  return attend<cuda::Half>(sizes, data);
}
PYSEQ_EXPORT int attend_bfloat16(const int64_t* sizes, void* const* data) {
  return attend<cuda::Bfloat16>(sizes, data);
}
