// Sine, cosine and exponential with the bits of the torch path: computed in fp64 to its last bit or two and rounded to
// fp32. So they are those of any other fp64 implementation, unless fp64's last bits decide that rounding (one value in
// some 2^28). fp32's own functions differ from a CPU's in a few values of a hundred.
#pragma once

#include "types.cuh"

namespace lightning_indexer {

struct Turn {
  float cos, sin;
};

// 1 + c[0] y + c[1] y^2 + ...
template <int kTerms>
__device__ __forceinline__ double series(const double (&c)[kTerms], double y) {
  double sum = c[kTerms - 1];
#pragma unroll
  for (int i = kTerms - 2; i >= 0; --i) sum = fma(sum, y, c[i]);
  return fma(sum, y, 1.0);
}

// Cosine and sine of an angle. (fp32's own would also keep an array on the stack, for large angles.)
//
// The rest after whole quarter turns, in [-pi/4, pi/4], is exact in its first step as long as the angle is 0 or at least
// 2^-29 (and the second step is far below it): an fp32 angle and that constant are multiples of 2^-52. Smaller angles
// make no quarter turn. The series are Taylor's; what is left out is below 2^-54.
__device__ __forceinline__ Turn turn_by(float angle) {
  constexpr double kQuartersPerRadian = 0.63661977236758134;
  constexpr double kQuarter = 1.5707963267948966, kQuarterRest = 6.123233995736766e-17;
  const double quarters = rint(angle * kQuartersPerRadian);
  const double rest = fma(-quarters, kQuarterRest, fma(-quarters, kQuarter, static_cast<double>(angle)));
  const double square = rest * rest;
  const double sines[] = {-1.0 / 6,           1.0 / 120,         -1.0 / 5040,          1.0 / 362880,
                          -1.0 / 39916800,    1.0 / 6227020800,  -1.0 / 1307674368000, 1.0 / 355687428096000};
  const double cosines[] = {-1.0 / 2,       1.0 / 24,        -1.0 / 720,         1.0 / 40320,
                            -1.0 / 3628800, 1.0 / 479001600, -1.0 / 87178291200, 1.0 / 20922789888000};
  const float sine = static_cast<float>(rest * series(sines, square));
  const float cosine = static_cast<float>(series(cosines, square));
  const int64_t quadrant = static_cast<int64_t>(quarters) & 3;
  const bool swapped = quadrant & 1;
  const float cos = swapped ? sine : cosine, sin = swapped ? cosine : sine;
  return {quadrant == 1 || quadrant == 2 ? -cos : cos, quadrant >= 2 ? -sin : sin};
}

// e^x for x <= 0, in fp64 as `turn_by` does it: x without whole powers of two lies in [-ln(2)/2, ln(2)/2] and is exact
// in its first step. Below -110 nothing is left in fp32. NaN stays NaN.
__device__ __forceinline__ float exponential(float x) {
  constexpr float kPowersPerUnit = 1.44269504f, kLowest = -110.0f;
  constexpr double kPower = 0.69314718055994531, kPowerRest = 2.3190468138462996e-17;
  const float clamped = fmaxf(x, kLowest);
  const float powers = rintf(clamped * kPowersPerUnit);
  const double k = powers;
  const double rest = fma(-k, kPowerRest, fma(-k, kPower, static_cast<double>(clamped)));
  const double terms[] = {1.0,          1.0 / 2,       1.0 / 6,        1.0 / 24,        1.0 / 120,
                          1.0 / 720,    1.0 / 5040,    1.0 / 40320,    1.0 / 362880,    1.0 / 3628800,
                          1.0 / 39916800, 1.0 / 479001600, 1.0 / 6227020800};
  const double scale = __hiloint2double((1023 + static_cast<int>(powers)) << 20, 0);
  const float result = static_cast<float>(series(terms, rest) * scale);
  return x == x ? result : x;
}

}  // namespace lightning_indexer
