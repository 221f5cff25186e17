// SPDX-License-Identifier: Apache-2.0
// What the operators hand to the CPU kernels, and the table through which they reach those of the
// tier in use. Raw pointers, to contiguous memory unless strides say otherwise; every shape was
// checked, every tensor allocated by the operator. No torch header here: kernels.cpp is compiled
// once per tier.
#pragma once

#include <cstdint>

#include "../cell_kinds.h"

namespace pyseq::cpu {

// What numbers of type T are added up and carried from step to step in. Kernels of devices know
// types that are too short for it.
template <class T>
struct AccumulateOf {
  using type = T;
};
template <class T>
using Accumulate = typename AccumulateOf<T>::type;

// Weights of 8 or 16 bits, packed for the tier in use: this, and the panels behind it. They are
// rows (gate, unit) of k. See quantized.h.
enum class QuantizedKind : int32_t { kBfloat16, kInt8 };

struct alignas(64) QuantizedWeights {
  static constexpr int64_t kMagic = 0x7165735f31;
  int64_t magic;
  QuantizedKind kind;
  int32_t lanes;  // units of a panel
  int32_t group;  // neighbouring k of one unit that lie side by side
  int32_t gates;
  int64_t units, k_count;
};

// Letters as everywhere: T steps, B batch, H hidden, P state size (H, or the projection's),
// G gates, K states beside h, U weights of a unit itself, S source positions, A key size, M memory
// size, L layers.
//
// States lie in slots of (B, P). Where those of every step are kept there are T + 1, the state
// before the first step, and after each; else two that take turns. `slot_before` and `slot_after`
// in steps.h say which. The first one is filled by the caller.

// With so many rows the scan itself multiplies the input, beside the state: a tile of a step
// is full then, and what the product made ahead would write and the loop read again is much.
// Weights that no cache holds are more, until some tiles share them: made ahead, the product reads
// its half of them once. A single step does it itself, which the product would only put off. Only
// the shape decides, because the order of a sum depends on it.
inline bool reads_input(int64_t steps, int64_t batch, int64_t weight_bytes) {
  constexpr int64_t kRows = 8, kRowsOfFarWeights = 32, kFarWeights = 16 << 20;
  return steps == 1 || batch >= (weight_bytes > kFarWeights ? kRowsOfFarWeights : kRows);
}

// Numbers for each step and row, of which a stride of 0 makes the same for all; or none.
template <class T>
struct Strided {
  const T* data;
  int64_t step, row;

  explicit operator bool() const { return data != nullptr; }
  const T* at(int64_t t, int64_t b) const { return data + t * step + b * row; }
};

// Layer normalisation of a scan: of W_ih x, of W_hh h (each over all gates of a row) and, with
// gain_c, of c where h is made of it. For backward everything is kept, else one step.
template <class T>
struct ScanNorm {
  using A = Accumulate<T>;
  const T* gain_ih;  // (G*H), or null: nothing is normalised
  const T* gain_hh;  // (G*H)
  const T* gain_c;   // (H), LSTM
  const T* bias_c;   // (H), LSTM
  const T* x_sums;   // (T, B, G*H): W_ih x
  A* r_sums;         // (T or 1, B, G*H): W_hh h
  A* c_sums;         // (T or 1, B, H), LSTM: c as the cell gave it
  A* moments;        // (T, B, 3, 2): mean and scale of the rows of these three; for backward only

  explicit operator bool() const { return gain_ih != nullptr; }
};

template <class T>
struct ScanForward {
  using A = Accumulate<T>;
  CellKind cell;
  int64_t steps, batch, input, hidden, state_size;
  bool reverse;
  bool save;   // what backward needs of the gates is left for every step,
  bool slots;  // and so are the states
  int threads;
  const T* x;     // (T, B, I)
  const T* w_ih;  // (G*H, I), or null: the product lies in `gates`, biases added
  const T* bias;  // (G*H) or null; only with w_ih or norm
  const T* w_hh;  // (G*H, P), or null: no matrix multiplies the state
  const T* w_hr;  // (P, H) or null
  // In place of the last two, float32 and without `save` or w_ih only.
  const QuantizedWeights* quantized_hh;
  const QuantizedWeights* quantized_hr;
  const T* apart_bias;     // (H) or null: added to the sum that stays apart (GRU)
  const int64_t* lengths;  // (B) or null
  const bool* resets;      // (T, B) or null
  // (T, B, G*H): out what backward needs, in the input's product if it was made; null if neither.
  // Where it is the states after the steps it may be their memory.
  T* gates;
  T* apart;   // (T, B, H) or null: the same for the sum that stays apart
  T* states;  // (slots, B, P)
  A* cells;   // (slots, B, K*H) or null
  // (T or 1, B, H): with w_hr h before the projection, of a cell that gates its state that.
  T* inner;
  T* y;  // (T, B, P)
  // (T, B, K*H) or null: out, c after every step, zero where it is padding.
  A* c_steps;
  const T* unit_weights;        // (U*H) or null
  int64_t unit_weights_stride;  // from those of a row to those of the next, 0 where all share them
  int64_t heads;                // D = H / heads units each; with several, w_hh is (heads, G*D, D)
  const T* h_mask;              // (B, P) or null: what w_hh sees of h is multiplied with it
  T* masked;                    // with it: (2, B, P), slots that take turns; the first is filled
  Strided<T> zoneout_h;         // rows of P: the share of the old h in the new one
  Strided<T> zoneout_c;         // rows of H: likewise
  Strided<T> reset_h;           // rows of P: what a reset sets h to; none: zero
  Strided<A> reset_c;           // rows of K*H
  ScanNorm<T> norm;             // with it no w_ih; `gates` is (T or 1, B, G*H) and not null
};

// The states of all steps from their gates, of RNN, GRU and LSTM cells: what forward need not keep.
template <class T>
struct Replay {
  CellKind cell;
  int64_t steps, batch, hidden;
  bool reverse;
  int threads;
  const int64_t* lengths;  // (B) or null
  const T* gates;          // (T, B, G*H)
  T* states;               // (T + 1, B, H), the first slot filled
  T* cells;                // (T + 1, B, H) or null: likewise
};

template <class T>
struct ScanBackward {
  using A = Accumulate<T>;
  CellKind cell;
  int64_t steps, batch, input, hidden, state_size;
  bool reverse;
  int threads;
  const T* x;  // (T, B, I), finite where it is padding
  const T* w_ih;
  const T* w_hh;
  const T* w_hr;
  const int64_t* lengths;
  const bool* resets;
  const T* gates;
  const T* apart;
  const T* states;
  const A* cells;
  const T* inner;
  const T* d_y;  // (T, B, P)
  A* d_h;        // (B, P): in of the last state, out of the first
  A* d_c;        // (B, K*H) or null: likewise
  T* d_x;        // (T, B, I) or null
  T* d_w_ih;
  T* d_w_hh;  // or null
  T* d_w_hr;  // or null
  T* d_b_ih;
  T* d_b_hh;           // with w_hh
  const A* d_c_steps;  // (T, B, K*H) or null
  const T* unit_weights;
  int64_t unit_weights_stride;
  A* d_unit_weights;  // (B, U*H) or null: one summand per row, zero at first
  int64_t heads;
  const T* h_mask;  // as in ScanForward
  Strided<T> zoneout_h;
  Strided<T> zoneout_c;
  A* d_reset_h;  // (B, P) or null: added to
  A* d_reset_c;  // (B, K*H) or null: added to
  ScanNorm<T> norm;
  T* d_gain_ih;  // these with `norm`
  T* d_gain_hh;
  T* d_gain_c;
  T* d_bias_c;
};

// Attention of N heads is that of N rows for each row of the batch: B counts them all, sizes are
// those of one head. The rows of one row of the batch follow one another and share its length and
// its window.
//
// A window lets a query see the positions within D of its centre p. With a Gaussian each weight is
// multiplied with exp(-(s - p)^2 / (2 sigma^2)), where sigma is D / 2.

template <class T>
struct Attend {
  bool additive;
  int64_t steps, batch, heads, source, key_size, memory_size;
  int threads;
  const T* query;          // (T, B, A)
  const T* keys;           // (B, S, A)
  const T* memory;         // (B, S, M)
  const T* v;              // (N, A), additive only
  const int64_t* lengths;  // (B/N) or null
  int64_t window;          // D, or 0 for none
  const T* centers;        // (T, B/N) of a window with a Gaussian, or null: step t at p = t
  const int64_t* step;     // (B/N) or null: how many steps there were before step 0
  T* attn;                 // (T, B, S), or null: not wanted, or of windows not kept
  T* context;              // (T, B, M), forward only

  // Where past weights enter an additive score; the queries are then steps in order. On the CPU.
  int64_t taps = 0;              // K of the convolution of past weights, or 0 for none
  const T* w_history = nullptr;  // (N, K, A)
  bool cumulative = false;       // the past is the sum of all steps, not the last one
  // (B, S), that before the first step; forward leaves there that after the last.
  T* past = nullptr;
};

template <class T>
struct AttendBackward {
  Attend<T> forward;   // attn holds what forward gave; null of windows only
  const T* d_context;  // (T, B, M)
  const T* d_attn;     // (T, B, S) or null
  T* d_scores;         // (T, B, S), without a window only
  T* d_query;          // (T, B, A)
  T* d_keys;           // (B, S, A), additive or with a window only
  T* d_v;              // (B, A), additive only: one summand per row
  T* d_memory;         // (B, S, M), with a window only
  T* d_centers;        // (T, B), with centers only
  // With taps only; d_keys and d_v are then summands of a row too.
  T* d_past = nullptr;       // (B, S): in of the last past, out of the first
  T* d_w_history = nullptr;  // (B, K, A): one summand per row
};

constexpr int64_t kMaxLayers = 64;

template <class T>
struct DecoderLayer {
  using A = Accumulate<T>;
  const T* w_in;  // from below, or the fed output: (G*H, H) with rows w_in_stride apart
  int64_t w_in_stride;
  const T* w_hh;        // (G*H, H)
  const T* bias;        // (G*H), layers above the first
  const T* apart_bias;  // (H) or null
  T* gates;             // (T, B, G*H); above the first layer (1, B, G*H) without save
  T* apart;             // (T, B, H) or null
  T* states;            // (slots, B, H): two forward, T + 1 backward
  A* cells;             // (slots, B, H) or null: likewise
  const T* mask;        // (T, B, H) or null: what its output is multiplied with going up
  // In place of w_in and w_hh, float32 and without `save` only.
  const QuantizedWeights* quantized_in;
  const QuantizedWeights* quantized_hh;
  // Backward only.
  T* d_x_gates;  // (T, B, G*H)
  T* d_r_gates;  // (T, B, G*H)
  A* d_h;        // (B, H): in of the last state, out of the first
  A* d_c;        // (B, H) or null

  bool reads_below() const { return w_in != nullptr || quantized_in != nullptr; }
};

template <class T>
struct Decode {
  using A = Accumulate<T>;
  CellKind cell;
  bool additive, feeding;
  bool save;           // what backward needs is left for every step, but for states and contexts
  bool feeds_context;  // what is fed is the context, not the output
  // Attention comes before the cells: its query is the state before the step, and the context is
  // fed in the same step.
  bool attends_first;
  int64_t steps, batch, hidden, layer_count, source, key_size, memory_size;
  int threads;
  const DecoderLayer<T>* layers;
  const T* feed;     // (B, F), where F is M or H
  const T* keys;     // (B, S, A)
  const T* memory;   // (B, S, M)
  const T* combine;  // (H, M + H)
  const T* w_query;  // (A, H) or null: the query is the top state itself
  // In place of the columns of `combine`, and of w_query.
  const QuantizedWeights* quantized_context;
  const QuantizedWeights* quantized_hidden;
  const QuantizedWeights* quantized_query;
  const T* v;  // (A), additive only
  const int64_t* lengths;
  // (B) or null, forward only: the row of keys, memory and lengths that each row attends to; else
  // its own.
  const int32_t* source_rows;
  int64_t attn_step;     // B*S, or 0 when no step's weights are kept
  T* attn;               // (T or 1, B, S)
  T* query;              // with w_query: (T or 1, B, A)
  int64_t context_step;  // B*M, or 0 when no step's context is kept
  T* context;            // (T or 1, B, M); forward only
  T* output;             // (T, B, H)

  // What makes attention go row by row. With N heads the rows of keys, memory, attn and so on are
  // those of `Attend`: B*N of them, with sizes A/N and M/N.
  int64_t heads;              // N, or 0 for one head
  int64_t window;             // D, or 0 for none
  const int64_t* first_step;  // (B) or null for zero: windows are around first_step + t, or else
  int64_t position_size;      // P
  const T* w_position;        // (P, H) or null: around R sigmoid(v . tanh(W h)), where R is the
                              // length of the row, with a Gaussian
  const T* position_v;        // (P)
  int64_t taps;               // K of the convolution of past weights, or 0 for none
  const T* w_history;         // (N, K, A/N)
  bool cumulative;            // the past is the sum of all steps, not the last one
  T* positions;               // (T or 1, B, P), tanh(W h)
  A* centers;                 // (T or 1, B), of windows with w_position
  A* past;                    // (slots, B*N, S), with taps

  // The input where the loop multiplies it itself; else null, and the product is in the first
  // layer's gates.
  const T* x = nullptr;    // (T, B, I)
  const T* w_x = nullptr;  // (G*H, I) with rows w_x_stride apart
  int64_t input = 0, w_x_stride = 0;

  int64_t head_count() const { return heads == 0 ? 1 : heads; }
  int64_t fed_size() const { return feeds_context ? memory_size : hidden; }
  bool by_rows() const { return heads > 1 || window > 0 || taps > 0; }
  bool attends() const { return combine != nullptr || quantized_context != nullptr; }
  bool projects_query() const { return w_query != nullptr || quantized_query != nullptr; }
};

template <class T>
struct DecodeBackward {
  using A = Accumulate<T>;
  Decode<T> forward;
  const T* d_output;  // (T, B, H)
  const T* d_attn;    // (T, B, S) or null
  T* d_sum;           // (T, B, H), of what the combination's tanh takes
  T* d_context;       // (T, B, M)
  T* d_scores;        // (T, B, S), unless there are d_keys
  T* d_query;         // (T, B, A), additive only
  T* d_keys;          // (B, S, A), additive or with a window only, zero at first
  T* d_v;             // (B, A), additive only, zero at first
  T* d_feed;          // (B, F)
  const T* d_fed;     // (B, M) or null: of the last context, where that is fed
  T* d_memory;        // (B, S, M), with a window only, zero at first
  T* d_positions;     // (T, B, P), with w_position: of W h
  T* d_shares;        // (T, B), with w_position: of what the sigmoid takes
  A* d_past;          // (B*N, S), with taps: in of the last weights, out of the first
  T* d_w_history;     // (B*N, K, A/N), with taps: zero at first, one summand per row
};

// One step of a search: hypotheses, each of which goes on from one of the step before. Each
// step is a block from malloc, so that memory grows with the search, not with its limit.
template <class T>
struct GenerateStep {
  GenerateStep* before;
  int32_t* tokens;   // (count), emitted in this step
  int32_t* parents;  // (count), which of the hypotheses of the step before they continue
  T* attn;           // (count of the step before, N, S) or null
};

// A hypothesis of a row, without <stop>.
template <class T>
struct GenerateResult {
  T score;                      // log P
  int64_t length;               // tokens
  const GenerateStep<T>* last;  // that of the last token
  int32_t slot;                 // which of its hypotheses
};

// What a decoder reads that is shown the truth only now and then; T steps. The dropout between
// its layers stands in the layers.
template <class T>
struct ScheduledInputs {
  int64_t steps;
  const int64_t* tokens;     // (T, rows), the truth
  const bool* coins;         // (T, rows), whether it is read
  const T* draws;            // (T, rows), uniform in [0, 1), or null: the likeliest token
  const T* embedding_masks;  // (T, rows, E) or null
  const T* output_masks;     // (T, rows, H) or null
  int64_t* fed;              // (T, rows): holds the truth; out what is read
};

// How a search draws tokens in place of comparing hypotheses.
struct Sampling {
  double temperature;  // what logits are divided by
  int64_t top_k;       // 0: all
  double top_p;
  uint64_t seed;
};

enum class GenerateStatus { kDone, kNotFinite, kOutOfMemory };

// V tokens, E features of a token's embedding.
template <class T>
struct Generate {
  // Weights, sizes, keys and memory; its batch is the most hypotheses that there can be,
  // rows * beam_size. Without attention `combine` is null.
  Decode<T> decoder;
  int64_t rows, vocab, embedding_size, max_length, beam_size;
  int64_t min_length, n_best;  // draws are n_best, and as many hypotheses
  int64_t block_ngrams;        // 0: none
  int64_t prefix_length;       // P
  double length_penalty, coverage_penalty;
  bool need_weights;
  const Sampling* sampling;  // or null
  const int64_t* prefix;     // (rows, P) or null: what to begin with, 0 beyond the end of a row's
  const T* h_0;              // (L, rows, H)
  const T* c_0;              // (L, rows, H) or null
  const T* feed;             // (rows, F)
  const T* past;             // (rows*N, S) or null for zero: with taps, the weights before
  const T* embedding;        // (V, E)
  const T* w_x;              // (G*H, E) with rows w_x_stride apart
  int64_t w_x_stride;
  const QuantizedWeights* quantized_x;  // in its place
  const T* w_output;                    // (V, H)
  const T* output_bias;                 // (V) or null
  GenerateResult<T>* results;           // (rows, n_best), the best one first
  // Out, null before: a list of all steps, for the caller to free. The step before the first
  // one of a result is not null but another result's: its length says where it begins.
  GenerateStep<T>** trace;
  // Instead of searching, what scheduled sampling reads; then beam_size is 1, max_length T.
  const ScheduledInputs<T>* scheduled = nullptr;
};

// c (m, n) = a (m, k) b (k, n) + bias, or c += a b. a and b may have any strides.
template <class T>
struct Gemm {
  int64_t m, n, k;
  int threads;
  const T* a;
  int64_t a_row, a_column;  // from row to row, from column to column
  const T* b;
  int64_t b_row, b_column;
  const T* bias;  // (n) or null; not with accumulate
  T* c;
  int64_t c_row;
  bool accumulate;
  T* a_sums = nullptr;  // (m) or null: the sums of a's rows, added up likewise
  // Another product of the same a and as many threads, made on the way, or null. It has no bias,
  // and accumulates if this one does.
  const Gemm* beside = nullptr;
};

// Rows of logits that are made at a time, at most.
constexpr int64_t kMaxLossRows = 512;

// The mean over N rows, at least one, of the cross entropy of softmax(hidden weight^T + bias),
// and its gradients.
template <class T>
struct LinearCrossEntropy {
  int64_t rows, vocab, hidden_size;
  int64_t chunk;  // rows of logits at a time
  int threads;
  double label_smoothing;
  const T* hidden;        // (N, H)
  const T* weight;        // (V, H)
  const T* bias;          // (V) or null
  const int64_t* target;  // (N), each in [0, V)
  T* logits;              // (V, chunk), to work in
  T* loss;                // one number
  T* d_hidden;            // (N, H) or null
  T* d_weight;            // (V, H) or null
  T* d_bias;              // (V) or null
};

template <class T>
struct Kernels {
  void (*gemm)(const Gemm<T>&);
  void (*scan_forward)(const ScanForward<T>&);
  void (*replay)(const Replay<T>&);
  void (*scan_backward)(const ScanBackward<T>&);
  void (*attend_forward)(const Attend<T>&);
  void (*attend_backward)(const AttendBackward<T>&);
  void (*decode_forward)(const Decode<T>&);
  void (*decode_backward)(const DecodeBackward<T>&);
  void (*linear_cross_entropy)(const LinearCrossEntropy<T>&);
  GenerateStatus (*generate)(const Generate<T>&);
  void (*sigmoid)(const T* from, T* to, int64_t count);
  void (*tanh)(const T* from, T* to, int64_t count);
  double (*multiply_add_rate)(int threads, int64_t rounds);
  double (*read_rate)(int threads, int64_t bytes, int64_t passes);
};

// rows (m, k) times the weights, of 1, 3 or 4 gates, plus bias.
struct QuantizedLinear {
  int64_t m;
  int threads;
  const float* rows;  // (m, k)
  const QuantizedWeights* weights;
  const float* bias;  // (G*units) or null
  float* out;         // (m, G*units)
};

struct QuantizedKernels {
  // The shape that weights are packed in, and how many bytes that takes.
  QuantizedWeights (*shape)(QuantizedKind kind, int64_t units, int64_t gates, int64_t k_count);
  int64_t (*bytes)(const QuantizedWeights& shape);
  void (*pack)(const QuantizedWeights& shape, const float* weight, void* packed);
  void (*unpack)(const QuantizedWeights& weights, void* values, float* scales);
  void (*linear)(const QuantizedLinear&);
};

struct Tier {
  const char* name;
  Kernels<float> float32;
  Kernels<double> float64;
  QuantizedKernels quantized;
};

// The best tier that the machine has, and ATEN_CPU_CAPABILITY allows; chosen once.
const Tier& tier();

// Whether the machine has AVX-512's dot products of 8 bits and may use them. To ask for the
// capability "avx512" is to ask for that and no more.
bool has_int8_dots();

// The names of the tiers compiled in, best first, separated by commas.
const char* compiled_tiers();

template <class T>
const Kernels<T>& kernels();

}  // namespace pyseq::cpu
