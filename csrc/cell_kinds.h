// SPDX-License-Identifier: Apache-2.0
// The cells by kind: which there are, the way from a kind, known only at run time, to the type in
// cells.h, and what operators read off that type.
#pragma once

#include <cstdint>

#include "cells.h"

namespace pyseq {

enum class CellKind {
  kRnnTanh,
  kRnnRelu,
  kGru,
  kLstm,
  // Of a scan only.
  kIndRnnTanh,
  kIndRnnRelu,
  kLstmPeephole,
  kGruResetBefore,
  kSlstmSigmoid,
  kSlstmExp
};

// Calls body with the cell's type, for the cells that decoders take and layers normalise; on a
// device too.
#ifdef __CUDACC__
#pragma nv_exec_check_disable
#endif
template <class Body>
PYSEQ_INLINE constexpr auto with_cell(CellKind cell, const Body& body) {
  switch (cell) {
    case CellKind::kRnnTanh:
      return body(RnnTanh{});
    case CellKind::kRnnRelu:
      return body(RnnRelu{});
    case CellKind::kGru:
      return body(Gru{});
    case CellKind::kLstm:
      return body(Lstm{});
    default:
      __builtin_unreachable();
  }
}

// The same for every cell.
template <class Body>
constexpr auto with_any_cell(CellKind cell, const Body& body) {
  switch (cell) {
    case CellKind::kIndRnnTanh:
      return body(IndRnnTanh{});
    case CellKind::kIndRnnRelu:
      return body(IndRnnRelu{});
    case CellKind::kLstmPeephole:
      return body(LstmPeephole{});
    case CellKind::kGruResetBefore:
      return body(GruResetBefore{});
    case CellKind::kSlstmSigmoid:
      return body(SlstmSigmoid{});
    case CellKind::kSlstmExp:
      return body(SlstmExp{});
    default:
      return with_cell(cell, body);
  }
}

struct CellShape {
  CellKind kind;
  int64_t gates;
  int64_t states;        // numbers that a unit hands on beside h
  int64_t unit_weights;  // weights of a unit itself
  bool has_cell;         // there are such states
  bool has_apart;        // the recurrent part of the last gate stays apart
  bool recurrent;        // a matrix multiplies the state
  bool gates_state;      // the last gate's part of it, the state times the first gate
  bool has_heads;        // it is a matrix for each head

  // Whether its gates alone give its states once more.
  bool replays() const {
    return kind == CellKind::kLstm || kind == CellKind::kLstmPeephole || kind == CellKind::kGru;
  }
};

constexpr CellShape cell_shape(CellKind kind) {
  return with_any_cell(kind, [kind](auto cell) {
    using Cell = decltype(cell);
    return CellShape{.kind = kind,
                     .gates = Cell::kGates,
                     .states = Cell::kStates,
                     .unit_weights = Cell::kUnitWeights,
                     .has_cell = Cell::kStates > 0,
                     .has_apart = Cell::kPre > Cell::kGates,
                     .recurrent = Cell::kRecurrent,
                     .gates_state = Cell::kGatesState,
                     .has_heads = Cell::kHeads};
  });
}

}  // namespace pyseq
