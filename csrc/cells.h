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

// An array of no elements is one that is not used.
PYSEQ_INLINE constexpr int at_least_one(int count) { return count > 0 ? count : 1; }

// Every cell has
//   kGates             rows of weight per unit, in torch.nn's order;
//   kPre               pre-activation sums per unit: one per gate, and one more where the
//                      recurrent part of a gate must stay apart from the input part;
//   recurrent_slot(g)  the sum that the recurrent product of gate g adds to (the input
//                      product of gate g always adds to sum g);
//   kRecurrent         whether there is a recurrent product at all;
//   kGatesState        whether the last gate's recurrent weights multiply not h_{t-1} but what
//                      `gated` makes of it and of the first gate's sum. `backward` then leaves
//                      d_pre[0] zero and the rest to `backward_gated`, which gets the gradient of
//                      that: the product with those weights lies between the two;
//   kHeads             whether the recurrent product is one for each head, of its own units;
//   kStates            numbers that a unit hands on beside h: none, c, or c and more;
//   kUnitWeights       weights of the unit itself, that multiply nothing but its own states;
//   forward            pre: in the sums, out what backward needs; w: the unit's own weights;
//                      h, c: in t-1, out t;
//   backward           dh, dc: in the gradients of h_t, c_t, out the parts of those of
//                      h_{t-1}, c_{t-1} that do not pass through the recurrent product; d_pre,
//                      d_w: out, the gradients of the sums and of the unit's own weights;
//   replay             where what backward needs of the sums gives the states once more. h, c: in
//                      t-1, out t.

template <bool Relu>
struct RnnCell {
  static constexpr int kGates = 1;
  static constexpr int kPre = 1;
  static constexpr bool kRecurrent = true;
  static constexpr bool kGatesState = false;
  static constexpr bool kHeads = false;
  static constexpr int kStates = 0;
  static constexpr int kUnitWeights = 0;
  static PYSEQ_INLINE constexpr int recurrent_slot(int gate) { return gate; }

  template <class M, class V>
  static PYSEQ_INLINE void forward(V (&pre)[kPre], const V*, V& h, V*) {
    pre[0] = Relu ? M::relu(pre[0]) : M::tanh(pre[0]);
    h = pre[0];
  }

  template <class M, class V>
  static PYSEQ_INLINE void backward(const V (&saved)[kPre], const V*, V, const V*, V& dh, V*,
                                    V (&d_pre)[kPre], V*) {
    d_pre[0] = Relu ? M::where_positive(saved[0], dh) : dh * (1 - saved[0] * saved[0]);
    dh = M::zero();
  }

  template <class M, class V>
  static PYSEQ_INLINE void replay(const V (&saved)[kPre], V& h, V*) {
    h = saved[0];
  }
};

using RnnTanh = RnnCell<false>;
using RnnRelu = RnnCell<true>;

// Units that see no state but their own (Li et al. 2018): h' = relu(x + w h), or tanh.
template <bool Relu>
struct IndRnnCell {
  static constexpr int kGates = 1;
  static constexpr int kPre = 1;
  static constexpr bool kRecurrent = false;
  static constexpr bool kGatesState = false;
  static constexpr bool kHeads = false;
  static constexpr int kStates = 0;
  static constexpr int kUnitWeights = 1;
  static PYSEQ_INLINE constexpr int recurrent_slot(int gate) { return gate; }

  template <class M, class V>
  static PYSEQ_INLINE void forward(V (&pre)[kPre], const V* w, V& h, V*) {
    const V sum = pre[0] + w[0] * h;
    pre[0] = Relu ? M::relu(sum) : M::tanh(sum);
    h = pre[0];
  }

  template <class M, class V>
  static PYSEQ_INLINE void backward(const V (&saved)[kPre], const V* w, V h_prev, const V*, V& dh,
                                    V*, V (&d_pre)[kPre], V* d_w) {
    d_pre[0] = Relu ? M::where_positive(saved[0], dh) : dh * (1 - saved[0] * saved[0]);
    d_w[0] = d_pre[0] * h_prev;
    dh = d_pre[0] * w[0];
  }
};

using IndRnnTanh = IndRnnCell<false>;
using IndRnnRelu = IndRnnCell<true>;

// The reset gate multiplies the recurrent part of the candidate only, after the product
// (cuDNN's form): h' = (1 - z) n + z h with n = tanh(x_n + r * r_n).
struct Gru {
  static constexpr int kGates = 3;
  static constexpr int kPre = 4;
  static constexpr bool kRecurrent = true;
  static constexpr bool kGatesState = false;
  static constexpr bool kHeads = false;
  static constexpr int kStates = 0;
  static constexpr int kUnitWeights = 0;
  static PYSEQ_INLINE constexpr int recurrent_slot(int gate) { return gate == 2 ? 3 : gate; }

  template <class M, class V>
  static PYSEQ_INLINE void forward(V (&pre)[kPre], const V*, V& h, V*) {
    const V r = M::sigmoid(pre[0]);
    const V z = M::sigmoid(pre[1]);
    const V n = M::tanh(pre[2] + r * pre[3]);
    pre[0] = r;
    pre[1] = z;
    pre[2] = n;
    h = mixed(z, n, h);
  }

  template <class V>
  static PYSEQ_INLINE V mixed(V z, V n, V h) {
    return n + z * (h - n);
  }

  template <class M, class V>
  static PYSEQ_INLINE void backward(const V (&saved)[kPre], const V*, V h_prev, const V*, V& dh, V*,
                                    V (&d_pre)[kPre], V*) {
    const V r = saved[0], z = saved[1], n = saved[2], r_n = saved[3];
    const V d_candidate = dh * (1 - z) * (1 - n * n);
    d_pre[0] = d_candidate * r_n * r * (1 - r);
    d_pre[1] = dh * (h_prev - n) * z * (1 - z);
    d_pre[2] = d_candidate;
    d_pre[3] = d_candidate * r;
    dh = dh * z;
  }

  template <class M, class V>
  static PYSEQ_INLINE void replay(const V (&saved)[kPre], V& h, V*) {
    h = mixed(saved[1], saved[2], h);
  }
};

// As published (Cho et al. 2014, eq. 8): the reset gate multiplies h before the candidate's weights
// do, n = tanh(x_n + R_n (r * h)).
struct GruResetBefore {
  static constexpr int kGates = 3;
  static constexpr int kPre = 3;
  static constexpr bool kRecurrent = true;
  static constexpr bool kGatesState = true;
  static constexpr bool kHeads = false;
  static constexpr int kStates = 0;
  static constexpr int kUnitWeights = 0;
  static PYSEQ_INLINE constexpr int recurrent_slot(int gate) { return gate; }

  template <class M, class V>
  static PYSEQ_INLINE V gated(V pre_reset, V h) {
    return M::sigmoid(pre_reset) * h;
  }

  template <class M, class V>
  static PYSEQ_INLINE void forward(V (&pre)[kPre], const V*, V& h, V*) {
    pre[0] = M::sigmoid(pre[0]);
    pre[1] = M::sigmoid(pre[1]);
    pre[2] = M::tanh(pre[2]);
    h = pre[2] + pre[1] * (h - pre[2]);
  }

  template <class M, class V>
  static PYSEQ_INLINE void backward(const V (&saved)[kPre], const V*, V h_prev, const V*, V& dh, V*,
                                    V (&d_pre)[kPre], V*) {
    const V z = saved[1], n = saved[2];
    d_pre[0] = M::zero();
    d_pre[1] = dh * (h_prev - n) * z * (1 - z);
    d_pre[2] = dh * (1 - z) * (1 - n * n);
    dh = dh * z;
  }

  // saved: of the first gate. d_gated: in the gradient of what `gated` gave, out of that gate's
  // sum; dh: added to.
  template <class V>
  static PYSEQ_INLINE void backward_gated(V saved, V h_prev, V& dh, V& d_gated) {
    dh += d_gated * saved;
    d_gated = d_gated * h_prev * saved * (1 - saved);
  }
};

// With peepholes (Gers & Schmidhuber 2000) the gates see c as well: i and f that before the
// step, o that after it. The unit's own weights are those of i, f, o.
template <bool Peepholes>
struct LstmCell {
  static constexpr int kGates = 4;
  static constexpr int kPre = 4;
  static constexpr bool kRecurrent = true;
  static constexpr bool kGatesState = false;
  static constexpr bool kHeads = false;
  static constexpr int kStates = 1;
  static constexpr int kUnitWeights = Peepholes ? 3 : 0;
  static constexpr int kOutput = 3;  // the gate between c and h
  static PYSEQ_INLINE constexpr int recurrent_slot(int gate) { return gate; }

  template <class M, class V>
  static PYSEQ_INLINE void forward(V (&pre)[kPre], const V* w, V& h, V* c) {
    if constexpr (Peepholes) {
      pre[0] += w[0] * c[0];
      pre[1] += w[1] * c[0];
    }
    pre[0] = M::sigmoid(pre[0]);
    pre[1] = M::sigmoid(pre[1]);
    pre[2] = M::tanh(pre[2]);
    c[0] = next_c(pre, c[0]);
    if constexpr (Peepholes) pre[3] += w[2] * c[0];
    pre[3] = M::sigmoid(pre[3]);
    h = output<M>(pre[3], c[0]);
  }

  // c from the gates and c before.
  template <class V>
  static PYSEQ_INLINE V next_c(const V (&gates)[kPre], V c_prev) {
    return gates[1] * c_prev + gates[0] * gates[2];
  }
  // h from the output gate and c, or from what stands in for c.
  template <class M, class V>
  static PYSEQ_INLINE V output(V o, V c) {
    return o * M::tanh(c);
  }
  // The gradients of the output gate's sum and of c.
  template <class M, class V>
  static PYSEQ_INLINE void output_backward(V o, V c, V dh, V& d_o, V& d_c) {
    const V tanh_c = M::tanh(c);
    d_o = dh * tanh_c * o * (1 - o);
    d_c = dh * o * (1 - tanh_c * tanh_c);
  }

  // c_t is computed again from c_{t-1}: a state buffer in which some steps were reset
  // holds what the next step starts from, not what this step gave.
  template <class M, class V>
  static PYSEQ_INLINE void backward(const V (&saved)[kPre], const V* w, V, const V* c_prev, V& dh,
                                    V* dc, V (&d_pre)[kPre], V* d_w) {
    const V i = saved[0], f = saved[1], g = saved[2], o = saved[3];
    const V c = next_c(saved, c_prev[0]);
    V d;
    output_backward<M>(o, c, dh, d_pre[3], d);
    d += dc[0];
    if constexpr (Peepholes) d += d_pre[3] * w[2];
    d_pre[0] = d * g * i * (1 - i);
    d_pre[1] = d * c_prev[0] * f * (1 - f);
    d_pre[2] = d * i * (1 - g * g);
    dc[0] = d * f;
    if constexpr (Peepholes) {
      dc[0] += d_pre[0] * w[0] + d_pre[1] * w[1];
      d_w[0] = d_pre[0] * c_prev[0];
      d_w[1] = d_pre[1] * c_prev[0];
      d_w[2] = d_pre[3] * c;
    }
    dh = M::zero();
  }

  template <class M, class V>
  static PYSEQ_INLINE void replay(const V (&saved)[kPre], V& h, V* c) {
    c[0] = next_c(saved, c[0]);
    h = output<M>(saved[3], c[0]);
  }
};

using Lstm = LstmCell<false>;
using LstmPeephole = LstmCell<true>;

// An LSTM whose input gate, and at will forget gate, is an exponential, with a normaliser n and a
// scale m in which both are kept finite (Beck et al. 2024): c and n stand for e^m c and e^m n. A
// state with n = 0 is empty, whatever its scale says: the first step sets one.
template <bool ExponentialForget>
struct SlstmCell {
  static constexpr int kGates = 4;
  static constexpr int kPre = 4;
  static constexpr bool kRecurrent = true;
  static constexpr bool kGatesState = false;
  static constexpr bool kHeads = true;
  static constexpr int kStates = 3;  // c, n, m
  static constexpr int kUnitWeights = 0;
  static PYSEQ_INLINE constexpr int recurrent_slot(int gate) { return gate; }

  // What a step makes of its gates i, f (before any activation) and of the scale before.
  template <class V>
  struct Scaled {
    V from_state, from_input;  // logarithms of what the state and the input are multiplied with
    V scale;
    V f, i;  // the same relative to the new scale
  };

  template <class M, class V>
  static PYSEQ_INLINE Scaled<V> scaled(V pre_i, V pre_f, V n_prev, V m_prev) {
    Scaled<V> s;
    s.from_input = pre_i;
    s.from_state = (ExponentialForget ? pre_f : M::log_sigmoid(pre_f)) + m_prev;
    s.from_state = M::where_zero(n_prev, M::minus_infinity(), s.from_state);
    s.scale = M::where_less(s.from_state, s.from_input, s.from_input, s.from_state);
    s.f = M::exp_nonpositive(s.from_state - s.scale);
    s.i = M::exp_nonpositive(s.from_input - s.scale);
    return s;
  }

  template <class M, class V>
  static PYSEQ_INLINE void forward(V (&pre)[kPre], const V*, V& h, V* c) {
    const Scaled<V> s = scaled<M>(pre[0], pre[1], c[1], c[2]);
    pre[2] = M::tanh(pre[2]);
    pre[3] = M::sigmoid(pre[3]);
    c[0] = s.f * c[0] + s.i * pre[2];
    c[1] = s.f * c[1] + s.i;
    c[2] = s.scale;
    h = pre[3] * c[0] / c[1];
  }

  template <class M, class V>
  static PYSEQ_INLINE void backward(const V (&saved)[kPre], const V*, V, const V* prev, V& dh, V* d,
                                    V (&d_pre)[kPre], V*) {
    const V z = saved[2], o = saved[3];
    const Scaled<V> s = scaled<M>(saved[0], saved[1], prev[1], prev[2]);
    const V n = s.f * prev[1] + s.i;
    const V ratio = (s.f * prev[0] + s.i * z) / n;
    const V d_ratio = dh * o / n;
    const V d_c = d[0] + d_ratio;
    const V d_n = d[1] - d_ratio * ratio;
    // One of the two is the scale itself, and its own factor one.
    const V d_f = (d_c * prev[0] + d_n * prev[1]) * s.f;
    const V d_i = (d_c * z + d_n) * s.i;
    const V d_state = M::where_less(s.from_state, s.from_input, d_f, d[2] - d_i);
    d_pre[0] = M::where_less(s.from_state, s.from_input, d[2] - d_f, d_i);
    d_pre[1] = ExponentialForget ? d_state : d_state * M::sigmoid(-saved[1]);
    d_pre[2] = d_c * s.i * (1 - z * z);
    d_pre[3] = dh * ratio * o * (1 - o);
    d[0] = d_c * s.f;
    d[1] = d_n * s.f;
    d[2] = d_state;
    dh = M::zero();
  }
};

using SlstmSigmoid = SlstmCell<false>;
using SlstmExp = SlstmCell<true>;

}  // namespace pyseq
