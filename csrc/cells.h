// SPDX-License-Identifier: Apache-2.0
// The arithmetic of the recurrent cells, for ONE unit: V is a scalar, a SIMD vector of
// neighbouring units or a CUDA thread's value, M supplies sigmoid and tanh for it.
// A cell sees pre-activations, never weights, and knows nothing of time.
#pragma once

#ifdef __CUDACC__
#define PYSEQ_INLINE __host__ __device__ __forceinline__
#else
#define PYSEQ_INLINE __attribute__((always_inline)) inline
#endif

namespace pyseq {

// Every cell has
//   kGates             rows of weight per unit, in torch.nn's order;
//   kPre               pre-activation sums per unit: one per gate, and one more where the
//                      recurrent part of a gate must stay apart from the input part;
//   recurrent_slot(g)  the sum that the recurrent product of gate g adds to (the input
//                      product of gate g always adds to sum g);
//   kHasCell           whether there is a c beside h;
//   forward            pre: in the sums, out what backward needs; h, c: in t-1, out t;
//   backward           dh, dc: in the gradients of h_t, c_t, out the parts of those of
//                      h_{t-1}, c_{t-1} that do not pass through the weights; d_pre: out,
//                      the gradients of the sums.

template <bool Relu>
struct RnnCell {
  static constexpr int kGates = 1;
  static constexpr int kPre = 1;
  static constexpr bool kHasCell = false;
  static PYSEQ_INLINE constexpr int recurrent_slot(int gate) { return gate; }

  template <class M, class V>
  static PYSEQ_INLINE void forward(V (&pre)[kPre], V& h, V&) {
    pre[0] = Relu ? M::relu(pre[0]) : M::tanh(pre[0]);
    h = pre[0];
  }

  template <class M, class V>
  static PYSEQ_INLINE void backward(const V (&saved)[kPre], V, V, V& dh, V&, V (&d_pre)[kPre]) {
    d_pre[0] = Relu ? M::where_positive(saved[0], dh) : dh * (1 - saved[0] * saved[0]);
    dh = M::zero();
  }
};

using RnnTanh = RnnCell<false>;
using RnnRelu = RnnCell<true>;

// The reset gate multiplies the recurrent part of the candidate only, after the product
// (cuDNN's form): h' = (1 - z) n + z h with n = tanh(x_n + r * r_n).
struct Gru {
  static constexpr int kGates = 3;
  static constexpr int kPre = 4;
  static constexpr bool kHasCell = false;
  static PYSEQ_INLINE constexpr int recurrent_slot(int gate) { return gate == 2 ? 3 : gate; }

  template <class M, class V>
  static PYSEQ_INLINE void forward(V (&pre)[kPre], V& h, V&) {
    const V r = M::sigmoid(pre[0]);
    const V z = M::sigmoid(pre[1]);
    const V n = M::tanh(pre[2] + r * pre[3]);
    pre[0] = r;
    pre[1] = z;
    pre[2] = n;
    h = n + z * (h - n);
  }

  template <class M, class V>
  static PYSEQ_INLINE void backward(const V (&saved)[kPre], V h_prev, V, V& dh, V&,
                                    V (&d_pre)[kPre]) {
    const V r = saved[0], z = saved[1], n = saved[2], r_n = saved[3];
    const V d_candidate = dh * (1 - z) * (1 - n * n);
    d_pre[0] = d_candidate * r_n * r * (1 - r);
    d_pre[1] = dh * (h_prev - n) * z * (1 - z);
    d_pre[2] = d_candidate;
    d_pre[3] = d_candidate * r;
    dh = dh * z;
  }
};

struct Lstm {
  static constexpr int kGates = 4;
  static constexpr int kPre = 4;
  static constexpr bool kHasCell = true;
  static PYSEQ_INLINE constexpr int recurrent_slot(int gate) { return gate; }

  template <class M, class V>
  static PYSEQ_INLINE void forward(V (&pre)[kPre], V& h, V& c) {
    pre[0] = M::sigmoid(pre[0]);
    pre[1] = M::sigmoid(pre[1]);
    pre[2] = M::tanh(pre[2]);
    pre[3] = M::sigmoid(pre[3]);
    c = pre[1] * c + pre[0] * pre[2];
    h = pre[3] * M::tanh(c);
  }

  // c_t is computed again from c_{t-1}: a state buffer in which some steps were reset
  // holds what the next step starts from, not what this step gave.
  template <class M, class V>
  static PYSEQ_INLINE void backward(const V (&saved)[kPre], V, V c_prev, V& dh, V& dc,
                                    V (&d_pre)[kPre]) {
    const V i = saved[0], f = saved[1], g = saved[2], o = saved[3];
    const V tanh_c = M::tanh(f * c_prev + i * g);
    dc = dc + dh * o * (1 - tanh_c * tanh_c);
    d_pre[0] = dc * g * i * (1 - i);
    d_pre[1] = dc * c_prev * f * (1 - f);
    d_pre[2] = dc * i * (1 - g * g);
    d_pre[3] = dh * tanh_c * o * (1 - o);
    dc = dc * f;
    dh = M::zero();
  }
};

}  // namespace pyseq
