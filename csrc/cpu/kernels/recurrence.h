// What a step of a recurrent cell does after its products, for a block of rows. Letters are those
// of fastdni/reference/recurrence.py.
#pragma once
#include "common/recurrence.h"
#include "cpu/kernels/sweep.h"

namespace fastdni::cpu {

// Of one step of one layer; all matrices have H columns but `gates` and `recurrent`, which hold the
// cell's blocks one after the other.
template <class T>
struct CellStep {
  Matrix<T>
      gates;  // in: W_ih x (an LSTM's, a plain cell's with W_hh h); out: i, f, g, o or r, z, n
  Matrix<T> recurrent;     // GRU: W_hh h; out: its last block is W_hn h + b_hn
  const T* bias;           // (G H,): b_ih + b_hh, of a GRU's n b_ih alone; or null
  const T* bias_n;         // (H,): of a GRU's n b_hh; or null
  Matrix<const T> before;  // LSTM: c of the step before; GRU: h of it
  Matrix<T> c, tanh_c;     // LSTM
  Matrix<T> h;
};

template <Isa isa, class T>
void cell_forward(Cell cell, const CellStep<T>& step, int64_t hidden, Rows rows);

template <class T>
struct CellGradient {
  Matrix<const T> gates;       // i, f, g, o or r, z, n; a plain cell's h
  Matrix<const T> recurrent;   // GRU: W_hn h + b_hn
  Matrix<const T> before;      // LSTM: c of the step before; GRU: h of it
  Matrix<const T> tanh_c;      // LSTM
  Matrix<const T> grad_above;  // what came from above at this step; without data: nothing
  Matrix<T> grad_h;      // in: from the step after; GRU's out: z dh, to which W_hh's share comes
  Matrix<T> grad_c;      // LSTM, in: from the step after; out: for the step before
  Matrix<T> grad_gates;  // out, where W_ih's products are
  Matrix<T> grad_recurrent;  // GRU, out: where W_hh's are
};

template <Isa isa, class T>
void cell_backward(Cell cell, const CellGradient<T>& step, int64_t hidden, Rows rows);

// weight[r][c] = sum over `count` rows b of grad[b][r] x[b][c], for the outputs r, of a weight
// (outputs, inputs) with at most kFewColumns inputs: a panel would be mostly padding. Up to
// kWeightedOverread bytes behind the last element of grad are read.
constexpr int64_t kWeightedOverread = 256;
constexpr int64_t kFewColumns = 8;
template <Isa isa, class T>
void weighted_sums(Matrix<const T> grad, const T* x, int64_t inputs, int64_t count, Rows outputs,
                   T* weight);

}  // namespace fastdni::cpu
