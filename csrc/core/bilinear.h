// SPDX-License-Identifier: Apache-2.0
// Note: [Bilinear sampling]
//
// A point (y, x) lies in the cell whose top left pixel is (top, left) = (floor(y), floor(x)), at the fraction
// (fy, fx) of the cell:
//
//          left      left+1
//   top    v[0] ------ v[1]      value      = (1-fy)(1-fx) v[0] + (1-fy) fx v[1] + fy (1-fx) v[2] + fy fx v[3]
//           |    (y,x)   |       d value/dy = (1-fx) (v[2] - v[0]) + fx (v[3] - v[1])
//   top+1  v[2] ------ v[3]      d value/dx = (1-fy) (v[1] - v[0]) + fy (v[3] - v[2])
//
// A corner outside the image is zero. The whole sample is zero unless -1 < y < height and -1 < x < width. The value
// is continuous; its derivative jumps where y or x is an integer. There it is the right-hand derivative (the cell
// begins at floor), except at y = -1 or x = -1, where the sample is outside and its derivative is zero.
//
// An infinite or huge coordinate is outside. A NaN gives NaN fractions, and so a NaN sample, but never an address.
#pragma once

#include <torch/headeronly/macros/Macros.h>

#include <cmath>
#include <cstdint>

namespace mmdcn {

constexpr int64_t kOutside = -1;

// The position of a point in its cell.
template <typename T>
struct Fractions {
  T fy, fx;  // in [0, 1), or NaN

  C10_HOST_DEVICE T weight(int corner) const { return (corner / 2 ? fy : 1 - fy) * (corner % 2 ? fx : 1 - fx); }
  C10_HOST_DEVICE void weights(T scale, T (&weights)[4]) const {
    weights[0] = weight(0) * scale;
    weights[1] = weight(1) * scale;
    weights[2] = weight(2) * scale;
    weights[3] = weight(3) * scale;
  }

  // d sum(corner[i] * weight[i]) / d(y, x) from the corners' values, or from their products with a gradient.
  C10_HOST_DEVICE T derivative_y(const T (&corner)[4]) const {
    return (1 - fx) * (corner[2] - corner[0]) + fx * (corner[3] - corner[1]);
  }
  C10_HOST_DEVICE T derivative_x(const T (&corner)[4]) const {
    return (1 - fy) * (corner[1] - corner[0]) + fy * (corner[3] - corner[2]);
  }
};

// The cell of a point, and which of its rows and columns are inside the image.
template <typename T, typename Index>
struct Cell : Fractions<T> {
  bool inside;  // if false, only the fractions are set
  Index top, left;
  bool has_top, has_bottom, has_left, has_right;
};

template <typename T, typename Index>
C10_HOST_DEVICE Cell<T, Index> cell_of(Index height, Index width, T y, T x) {
  const bool inside = y > -1 && y < static_cast<T>(height) && x > -1 && x < static_cast<T>(width);
  if (!inside) {  // a huge or NaN coordinate must not be converted to an integer
    const T fraction = (std::isnan(y) || std::isnan(x)) ? static_cast<T>(NAN) : static_cast<T>(0);
    return {{fraction, fraction}, false, 0, 0, false, false, false, false};
  }
  const T floor_y = std::floor(y), floor_x = std::floor(x);
  const Index top = static_cast<Index>(floor_y), left = static_cast<Index>(floor_x);
  return {{y - floor_y, x - floor_x}, true, top, left, top >= 0, top + 1 < height, left >= 0, left + 1 < width};
}

// The four corners around a point, in the order of the note.
template <typename T>
struct BilinearCell : Fractions<T> {
  int64_t pixel[4];  // y * width + x of each corner, or kOutside
};

template <typename T>
C10_HOST_DEVICE BilinearCell<T> locate(int64_t height, int64_t width, T y, T x) {
  const Cell<T, int64_t> cell = cell_of(height, width, y, x);
  const int64_t first = cell.top * width + cell.left;
  return {cell,
          {cell.has_top && cell.has_left ? first : kOutside, cell.has_top && cell.has_right ? first + 1 : kOutside,
           cell.has_bottom && cell.has_left ? first + width : kOutside,
           cell.has_bottom && cell.has_right ? first + width + 1 : kOutside}};
}

}  // namespace mmdcn
