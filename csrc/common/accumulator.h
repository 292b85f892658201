// The running statistics of one layer, as every backend stores them: a float64 matrix of
// kRows x C, row-major and contiguous. Python names the same rows in idap_kernels/channel_stats.py.
#pragma once

#include <cstdint>

namespace idap {

enum Row : int {
  kCount = 0,         // elements per channel: samples x positions
  kSamples = 1,       // samples
  kMean = 2,          // mean of y
  kM2 = 3,            // sum of (y - mean)^2
  kAbsSum = 4,        // sum of |y|
  kActSqSum = 5,      // sum of act(y)^2
  kActNormSum = 6,    // sum over samples of sqrt(sum over positions of act(y)^2)
  kAbsMeanSqSum = 7,  // sum over samples of (mean over positions of |y|)^2
  kPositive = 8,      // number of y > 0
  kMin = 9,           // smallest y; NaN if any y is NaN
  kMax = 10,          // largest y; NaN if any y is NaN
  kRows = 11,
};

// Rows of the per-sample or per-token result of pair_stats, float64, kPairRows x rows.
enum PairRow : int { kXX = 0, kYY = 1, kXY = 2, kDD = 3, kPairRows = 4 };

enum class DType : int { kFloat32 = 0, kFloat64 = 1, kFloat16 = 2, kBFloat16 = 3 };

// The first four also serve as the activation of the statistics; the others only as the one that
// bn_act_stats applies.
enum class Activation : int {
  kRelu = 0,
  kIdentity = 1,
  kGelu = 2,
  kSilu = 3,
  kRelu6 = 4,
  kHardswish = 5,
};

}  // namespace idap
