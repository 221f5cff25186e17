// SPDX-License-Identifier: Apache-2.0
// The decoder's backward loop as one launch; cpu/decode_backward.h is the same loop on the CPU. The
// weights are transposed first, so that its products are those of the forward loop. What adds up
// over the steps is left to later launches and products.
#include "attend.h"
#include "decode_step.h"

namespace pyseq::cuda {

// Transposed weights: a row for each number that gets a gradient.
template <class S>
struct BackwardWork {
  S* w_in[kMostDecoderLayers];  // (F or H, G*H) or null
  S* w_hh[kMostDecoderLayers];  // (H, G*H)
  S* combine;                   // (M + H, H)
  S* w_query;                   // (H, A) or null
  S* w_position;                // (H, P) or null
  S* d_top;                     // (B, H): what a dot says of the state that asked
  S* d_centers;                 // (B*N)
  Accumulate<S>* positions;     // see decode_positions
};

template <class S>
struct DeviceBackward {
  cpu::DecodeBackward<S> call;  // `forward` stands in `decode`
  DeviceDecode<S> decode;
  BackwardWork<S> work;
};

namespace {

constexpr int kTransposeThreads = 256;

// ---- Kernels ---------------------------------------------------------------------------

// to (columns, rows) = from (rows, columns), whose rows are `stride` apart.
template <class S>
PYSEQ_KERNEL(kTransposeThreads)
transpose_kernel(const S* from, int64_t stride, int64_t rows, int64_t columns, S* to) {
  const int64_t step = int64_t{grid_size_x()} * thread_count();
  for (int64_t i = int64_t{block_index_x()} * thread_count() + thread_index(); i < rows * columns;
       i += step) {
    to[i] = from[i % rows * stride + i / rows];
  }
}

PYSEQ_DEVICE void meet(GroupBarrier& barrier) {
  barrier.arrive();
  barrier.wait();
}

// The product with rows of transposed weights.
template <class S>
PYSEQ_DEVICE Product<S> rows_product(const S* from, const S* weights, int64_t count) {
  return {from, count, weights, count, count};
}

// Everything of the loop that a block needs to know.
template <class S, class Cell, class Score>
struct BackwardLoop {
  using A = Accumulate<S>;
  static constexpr int G = Cell::kGates;

  const DeviceBackward<S>& args;
  const cpu::Decode<S>& decode;
  const cpu::DecodeBackward<S>& call;
  DecodePlace at;
  GroupBarrier& barrier;

  PYSEQ_DEVICE const S* x_gates(int64_t l, int64_t t) const {
    return args.decode.layers[l].d_x_gates + t * decode.batch * G * decode.hidden;
  }

  // What the cells of step t say of what was fed to them, if there are such and they were.
  PYSEQ_DEVICE Product<S> fed_product(int64_t t) const {
    if (!decode.feeding || t >= decode.steps) return {};
    return rows_product<S>(x_gates(0, t), args.work.w_in[0], G * decode.hidden);
  }

  // sum of two products for this block's part of `units`, each handed to use.
  template <class Use>
  PYSEQ_DEVICE void add_two(const Product<S>& one, const Product<S>& other, int64_t units,
                            const Use& use) const {
    for_units<1, S>(
        at, units,
        [&](int64_t unit, int64_t first, int rows, auto& sum) {
          add_product<OneSlot<0>, 1>(one, unit, units, first, rows, sum);
          add_product<OneSlot<0>, 1>(other, unit, units, first, rows, sum);
        },
        [&](int64_t row, int64_t unit, const A(&sums)[1]) { use(row, unit, sums[0]); });
  }

  PYSEQ_DEVICE void sum_gradient(int64_t t) const {
    const int64_t B = decode.batch, H = decode.hidden;
    add_two(decode.feeds_context ? Product<S>{} : fed_product(t + 1), {}, H,
            [&](int64_t row, int64_t unit, A sum) {
              const int64_t offset = (t * B + row) * H + unit;
              const A out = widen(decode.output[offset]);
              const A d_out = sum + widen(call.d_output[offset]);
              call.d_sum[offset] = narrow<S>(d_out * (1 - out * out));
            });
    meet(barrier);
  }

  PYSEQ_DEVICE void context_gradient(int64_t t) const {
    const int64_t B = decode.batch, H = decode.hidden, M = decode.memory_size;
    const Product<S> fed =
        decode.feeds_context ? fed_product(decode.attends_first ? t : t + 1) : Product<S>{};
    const S* const d_fed = t + 1 == decode.steps ? call.d_fed : nullptr;
    add_two(rows_product<S>(call.d_sum + t * B * H, args.work.combine, H), fed, M,
            [&](int64_t row, int64_t unit, A sum) {
              if (d_fed != nullptr) sum += widen(d_fed[row * M + unit]);
              call.d_context[(t * B + row) * M + unit] = narrow<S>(sum);
            });
    meet(barrier);
  }

  // Windows predicted from a row's state end with its gradient.
  PYSEQ_DEVICE void position_gradient(int64_t t, int64_t row) const {
    const int64_t B = decode.batch, N = decode.heads, P = decode.position_size;
    A d_center = 0;
    for (int64_t head = row * N; head < (row + 1) * N; ++head) {
      d_center += widen(args.work.d_centers[head]);
    }
    const A length = A(valid_positions(decode.lengths, row, decode.source));
    const A center = decode.centers[t * B + row];
    const A d_share = length > 0 ? d_center * center * (1 - center / length) : A(0);
    if (thread_index() == 0) call.d_shares[t * B + row] = narrow<S>(d_share);
    const int64_t first = (t * B + row) * P;
    for (int64_t i = thread_index(); i < P; i += thread_count()) {
      const A position = widen(decode.positions[first + i]);
      call.d_positions[first + i] =
          narrow<S>(d_share * widen(decode.position_v[i]) * (1 - position * position));
    }
  }

  PYSEQ_DEVICE void attention_gradient(int64_t t) const {
    const int64_t B = decode.batch, N = decode.heads, S_ = decode.source, A_ = decode.key_size,
                  M = decode.memory_size;
    const S* const asking = args.decode.layers[decode.layer_count - 1].states +
                            (decode.attends_first ? 0 : B * decode.hidden);
    const S* const queries = (decode.w_query == nullptr ? asking : decode.query) + t * B * A_;
    const A* const past = decode.taps == 0 ? nullptr : decode.past + t * B * N * S_;
    S* const d_query = Score::kAdditive ? call.d_query + t * B * A_ : args.work.d_top;
    for_attention_rows(decode, at, [&](int64_t row, int64_t head, int64_t end) {
      const A center =
          decode.w_position == nullptr ? given_center(decode, t, row) : decode.centers[t * B + row];
      for (; head < end; ++head) {
        const int64_t own = row * N + head, query = t * B * N + own;
        attend_row_backward<S, Score>(
            decoder_row(decode, own, center, queries, past, args.work.positions),
            {decode.attn + query * S_, call.d_context + query * (M / N),
             call.d_attn == nullptr ? nullptr : call.d_attn + query * S_,
             call.d_scores + query * S_, d_query + own * (A_ / N),
             decode.w_position == nullptr ? nullptr : args.work.d_centers + own,
             decode.taps == 0 ? nullptr : call.d_past + own * S_, decode.cumulative});
      }
      if (decode.w_position != nullptr) position_gradient(t, row);
    });
    meet(barrier);
  }

  // What the attention of step t says of the state that asked: products, and what needs none.
  struct Asked {
    Product<S> query, position;
    const S* direct;
  };
  PYSEQ_DEVICE Asked asked(int64_t t) const {
    const int64_t B = decode.batch, A_ = decode.key_size, P = decode.position_size;
    Asked all{{}, {}, Score::kAdditive ? call.d_query + t * B * A_ : args.work.d_top};
    if (decode.w_query != nullptr) {
      all.query = rows_product<S>(all.direct, args.work.w_query, A_);
      all.direct = nullptr;
    }
    if (decode.w_position != nullptr) {
      all.position = rows_product<S>(call.d_positions + t * B * P, args.work.w_position, P);
    }
    return all;
  }

  PYSEQ_DEVICE void unit_gradient(const cpu::DecoderLayer<S>& layer, int64_t t, int64_t row,
                                  int64_t unit, A d_h) const {
    const int64_t B = decode.batch, H = decode.hidden, offset = row * H + unit;
    const int64_t gates = (t * B + row) * G * H + unit;
    A saved[Cell::kPre], d_pre[Cell::kPre];
    PYSEQ_UNROLL
    for (int g = 0; g < G; ++g) saved[g] = widen(layer.gates[gates + g * H]);
    if constexpr (Cell::kPre > G) saved[G] = widen(layer.apart[t * B * H + offset]);
    A c_prev[1] = {}, d_c[1] = {};
    if constexpr (Cell::kStates > 0) {
      c_prev[0] = layer.cells[t * B * H + offset];
      d_c[0] = layer.d_c[offset];
    }
    Cell::template backward<Math<A>>(saved, static_cast<const A*>(nullptr),
                                     widen(layer.states[t * B * H + offset]), c_prev, d_h, d_c,
                                     d_pre, static_cast<A*>(nullptr));
    if constexpr (Cell::kStates > 0) layer.d_c[offset] = d_c[0];
    layer.d_h[offset] = d_h;
    PYSEQ_UNROLL
    for (int g = 0; g < G; ++g) {
      layer.d_x_gates[gates + g * H] = narrow<S>(d_pre[g]);
      if constexpr (Cell::kPre > G) {
        layer.d_r_gates[gates + g * H] = narrow<S>(d_pre[Cell::recurrent_slot(g)]);
      }
    }
  }

  PYSEQ_DEVICE void cell_gradients(int64_t t) const {
    const int64_t B = decode.batch, H = decode.hidden, L = decode.layer_count, T_ = decode.steps;
    for (int64_t l = L - 1; l >= 0; --l) {
      const cpu::DecoderLayer<S>& layer = args.decode.layers[l];
      const bool is_top = l + 1 == L;
      // Sum 0 comes from above and takes the dropout mask, sum 1 from the step after.
      Product<S> above{}, after{};
      Asked by{};
      if (is_top) {
        above =
            rows_product<S>(call.d_sum + t * B * H, args.work.combine + decode.memory_size * H, H);
        // This state asked in this step, or asks in the next one.
        const int64_t step = decode.attends_first ? t + 1 : t;
        if (step < T_) by = asked(step);
      } else {
        above = rows_product<S>(x_gates(l + 1, t), args.work.w_in[l + 1], G * H);
      }
      if (t + 1 < T_) {
        after = rows_product<S>(layer.d_r_gates + (t + 1) * B * G * H, args.work.w_hh[l], G * H);
      }
      const S* const mask = is_top ? nullptr : layer.mask;
      for_units<2, S>(
          at, H,
          [&](int64_t unit, int64_t first, int rows, auto& sum) {
            add_product<OneSlot<0>, 1>(above, unit, H, first, rows, sum);
            add_product<OneSlot<0>, 1>(by.query, unit, H, first, rows, sum);
            add_product<OneSlot<0>, 1>(by.position, unit, H, first, rows, sum);
            add_product<OneSlot<1>, 1>(after, unit, H, first, rows, sum);
          },
          [&](int64_t row, int64_t unit, const A(&sums)[2]) {
            const int64_t offset = row * H + unit;
            A d_h = sums[0];
            if (by.direct != nullptr) d_h += widen(load_shared_by_blocks(by.direct + offset));
            if (mask != nullptr) d_h *= widen(mask[t * B * H + offset]);
            d_h += sums[1] + layer.d_h[offset];
            unit_gradient(layer, t, row, unit, d_h);
          });
      meet(barrier);
    }
  }

  // Of what was there before the first step. A context that comes first is fed at once.
  PYSEQ_DEVICE void first_gradients() const {
    const int64_t H = decode.hidden, L = decode.layer_count, F = fed_size(decode);
    add_two(
        decode.attends_first ? Product<S>{} : fed_product(0), {}, F,
        [&](int64_t row, int64_t unit, A sum) { call.d_feed[row * F + unit] = narrow<S>(sum); });
    for (int64_t l = 0; l < L; ++l) {
      const cpu::DecoderLayer<S>& layer = args.decode.layers[l];
      const Product<S> after = rows_product<S>(layer.d_r_gates, args.work.w_hh[l], G * H);
      Asked by{};
      if (decode.attends_first && l + 1 == L) by = asked(0);
      for_units<1, S>(
          at, H,
          [&](int64_t unit, int64_t first, int rows, auto& sum) {
            add_product<OneSlot<0>, 1>(after, unit, H, first, rows, sum);
            add_product<OneSlot<0>, 1>(by.query, unit, H, first, rows, sum);
            add_product<OneSlot<0>, 1>(by.position, unit, H, first, rows, sum);
          },
          [&](int64_t row, int64_t unit, const A(&sums)[1]) {
            const int64_t offset = row * H + unit;
            A d_h = sums[0] + layer.d_h[offset];
            if (by.direct != nullptr) d_h += widen(load_shared_by_blocks(by.direct + offset));
            layer.d_h[offset] = d_h;
          });
    }
  }
};

template <class S, class Cell, class Score>
PYSEQ_KERNEL(kDecodeThreads)
decode_backward_kernel(DeviceBackward<S> args, unsigned* counters) {
  GroupBarrier barrier(counters, block_index_y(), grid_size_x());
  const BackwardLoop<S, Cell, Score> loop{args, args.decode.call, args.call,
                                          DecodePlace::here(args.decode.call.batch), barrier};
  for (int64_t t = args.decode.call.steps - 1; t >= 0; --t) {
    loop.sum_gradient(t);
    if (args.decode.call.attends_first) {
      loop.cell_gradients(t);
      loop.context_gradient(t);
      loop.attention_gradient(t);
    } else {
      loop.context_gradient(t);
      loop.attention_gradient(t);
      loop.cell_gradients(t);
    }
  }
  loop.first_gradients();
}

// Hands out pieces of the workspace; without memory it counts bytes.
class WorkPieces {
 public:
  explicit WorkPieces(void* memory) : memory_(static_cast<unsigned char*>(memory)) {}
  template <class Number>
  Number* take(int64_t count) {
    unsigned char* const piece = memory_ == nullptr ? nullptr : memory_ + used_;
    constexpr int64_t kAlignment = 128;
    const int64_t bytes = count * static_cast<int64_t>(sizeof(Number));
    used_ += (bytes + kAlignment - 1) / kAlignment * kAlignment;
    return reinterpret_cast<Number*>(piece);
  }
  int64_t used() const { return used_; }

 private:
  unsigned char* memory_;
  int64_t used_ = 0;
};

template <class S>
BackwardWork<S> take_work(const cpu::Decode<S>& call, const DecodeTiles& tiles,
                          WorkPieces& pieces) {
  const int64_t H = call.hidden, rows = cell_shape(call.cell).gates * H;
  BackwardWork<S> work{};
  for (int64_t l = 0; l < call.layer_count; ++l) {
    if (call.layers[l].reads_below()) {
      work.w_in[l] = pieces.take<S>(rows * (l == 0 ? call.fed_size() : H));
    }
    work.w_hh[l] = pieces.take<S>(rows * H);
  }
  work.combine = pieces.take<S>((call.memory_size + H) * H);
  if (call.w_query != nullptr) work.w_query = pieces.take<S>(H * call.key_size);
  if (call.w_position != nullptr) work.w_position = pieces.take<S>(H * call.position_size);
  work.d_top = pieces.take<S>(call.batch * H);
  work.d_centers = pieces.take<S>(call.batch * call.head_count());
  work.positions = pieces.take<Accumulate<S>>(decode_positions(call, tiles));
  return work;
}

template <class S>
cudaError_t transpose(const S* from, int64_t stride, int64_t rows, int64_t columns, S* to,
                      cudaStream_t stream) {
  if (from == nullptr || rows * columns == 0) return cudaSuccess;
  constexpr int64_t kMostBlocks = 1024;
  const int64_t blocks = (rows * columns + kTransposeThreads - 1) / kTransposeThreads;
  const Grid grid{static_cast<int>(blocks < kMostBlocks ? blocks : kMostBlocks), 1,
                  kTransposeThreads};
  return launch(transpose_kernel<S>, grid, stream, from, stride, rows, columns, to);
}

template <class S>
cudaError_t transpose_weights(const cpu::Decode<S>& call, const BackwardWork<S>& work,
                              cudaStream_t stream) {
  const int64_t H = call.hidden, M = call.memory_size, rows = cell_shape(call.cell).gates * H;
  cudaError_t error = transpose(call.combine, M + H, H, M + H, work.combine, stream);
  const auto next = [&](const S* from, int64_t stride, int64_t count, int64_t columns, S* to) {
    if (error == cudaSuccess) error = transpose(from, stride, count, columns, to, stream);
  };
  next(call.w_query, H, call.key_size, H, work.w_query);
  next(call.w_position, H, call.position_size, H, work.w_position);
  for (int64_t l = 0; l < call.layer_count; ++l) {
    const cpu::DecoderLayer<S>& layer = call.layers[l];
    next(layer.w_in, layer.w_in_stride, rows, l == 0 ? call.fed_size() : H, work.w_in[l]);
    next(layer.w_hh, H, rows, H, work.w_hh[l]);
  }
  return error;
}

// The gradients that add up over the steps, of what the loop left of each.
template <class S>
cudaError_t source_gradients(const cpu::DecodeBackward<S>& args, cudaStream_t stream) {
  const cpu::Decode<S>& call = args.forward;
  const int64_t N = call.head_count();
  const S* const asking = call.layers[call.layer_count - 1].states +
                          (call.attends_first ? 0 : call.batch * call.hidden);
  KeyGradients<S> gradients{};
  gradients.forward.additive = call.additive;
  gradients.forward.steps = call.steps;
  gradients.forward.batch = call.batch * N;
  gradients.forward.heads = N;
  gradients.forward.source = call.source;
  gradients.forward.key_size = call.key_size / N;
  gradients.forward.memory_size = call.memory_size / N;
  gradients.forward.query = call.w_query == nullptr ? asking : call.query;
  gradients.forward.keys = call.keys;
  gradients.forward.memory = call.memory;
  gradients.forward.v = call.v;
  gradients.forward.attn = call.attn;
  gradients.d_scores = args.d_scores;
  gradients.d_context = args.d_context;
  gradients.taps = call.taps;
  gradients.w_history = call.w_history;
  gradients.past = call.past;
  gradients.d_keys = args.d_keys;
  gradients.d_v = args.d_v;
  gradients.d_memory = args.d_memory;
  gradients.d_w_history = args.d_w_history;
  return key_gradients(gradients, stream);
}

}  // namespace

// ---- Launchers -------------------------------------------------------------------------

template <class S>
DecodeNeeds decode_backward_needs(const cpu::Decode<S>& args, const DecodeTiles& tiles) {
  WorkPieces count(nullptr);
  take_work(args, tiles, count);
  return {barrier_bytes(tiles.groups), count.used()};
}

template <class S>
cudaError_t decode_backward_resident(const cpu::Decode<S>& args, int* blocks) {
  return with_cell_and_score(args.cell, args.additive, [&](auto cell, auto score) {
    return resident_blocks(decode_backward_kernel<S, decltype(cell), decltype(score)>,
                           kDecodeThreads, decode_shared(args), blocks);
  });
}

template <class S>
cudaError_t decode_backward(const cpu::DecodeBackward<S>& args, const DecodeTiles& tiles,
                            unsigned* counters, void* workspace, cudaStream_t stream) {
  const cpu::Decode<S>& call = args.forward;
  if (call.batch == 0) return cudaSuccess;
  WorkPieces pieces(workspace);
  DeviceBackward<S> all{args, with_layers(call), take_work(call, tiles, pieces)};
  all.call.forward.layers = nullptr;
  if (const cudaError_t error = transpose_weights(call, all.work, stream); error != cudaSuccess) {
    return error;
  }
  const Grid grid{tiles.tiles, tiles.groups, tiles.threads, decode_shared(call), true};
  const cudaError_t error =
      with_cell_and_score(call.cell, call.additive, [&](auto cell, auto score) {
        return launch(decode_backward_kernel<S, decltype(cell), decltype(score)>, grid, stream, all,
                      counters);
      });
  return error == cudaSuccess ? source_gradients(args, stream) : error;
}

#define PYSEQ_INSTANTIATE(S)                                                                 \
  template DecodeNeeds decode_backward_needs<S>(const cpu::Decode<S>&, const DecodeTiles&);  \
  template cudaError_t decode_backward_resident<S>(const cpu::Decode<S>&, int*);             \
  template cudaError_t decode_backward<S>(const cpu::DecodeBackward<S>&, const DecodeTiles&, \
                                          unsigned*, void*, cudaStream_t);
PYSEQ_INSTANTIATE(float)
PYSEQ_INSTANTIATE(double)
PYSEQ_INSTANTIATE(Half)
PYSEQ_INSTANTIATE(Bfloat16)
#undef PYSEQ_INSTANTIATE

}  // namespace pyseq::cuda
