// SPDX-License-Identifier: Apache-2.0
// Images of any layout as NHWC rows, and the single buffer that a call allocates.
#pragma once

#include <algorithm>
#include <optional>

#include "../core/stable_ops.h"
#include "copy_images.cuh"
#include "device.cuh"

namespace mmdcn {

inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// Whether the images are dense NHWC, aligned to kVectorBytes.
inline bool is_rows(const Tensor& images) {
  const int64_t channels = images.size(1), height = images.size(2), width = images.size(3);
  const auto is = [&](int64_t dim, int64_t stride) { return images.size(dim) == 1 || images.stride(dim) == stride; };
  return is(1, 1) && is(3, channels) && is(2, width * channels) && is(0, height * width * channels) &&
         reinterpret_cast<uintptr_t>(images.data_ptr()) % kVectorBytes == 0;
}

// Parts of one buffer.
class Workspace {
 public:
  // Reserves a part and returns its place, which `take` turns into a pointer.
  template <typename T>
  int64_t add(int64_t count) {
    const int64_t place = bytes_;
    bytes_ += ceil_div(count * static_cast<int64_t>(sizeof(T)), kAlignment) * kAlignment;
    return place;
  }

  void allocate(const Tensor& like) {
    buffer_ = torch::stable::empty({std::max<int64_t>(bytes_, 1)}, ScalarType::Byte, std::nullopt, like.device());
  }

  template <typename T>
  T* take(int64_t place) const {
    return reinterpret_cast<T*>(data<char>(*buffer_) + place);
  }

 private:
  static constexpr int64_t kAlignment = 256;

  int64_t bytes_ = 0;
  std::optional<Tensor> buffer_;
};

// Images [B, C, H, W] of any layout as NHWC rows, some images at a time: the tensor's own rows, or a copy.
template <typename scalar_t>
class ImageRows {
 public:
  explicit ImageRows(const Tensor& images, bool copied)
      : data_(static_cast<scalar_t*>(images.data_ptr())),
        strides_(ImageStrides::of(images)),
        channels_(images.size(1)),
        height_(images.size(2)),
        width_(images.size(3)),
        device_(images.get_device_index()),
        copied_(copied) {}

  const scalar_t* data() const { return data_; }
  const ImageStrides& strides() const { return strides_; }
  void copy() { copied_ = true; }  // even if the tensor already has NHWC rows
  bool copied() const { return copied_; }
  int64_t image_size() const { return channels_ * height_ * width_; }
  int64_t copied_bytes() const { return copied_ ? image_size() * static_cast<int64_t>(sizeof(scalar_t)) : 0; }

  void add_to(Workspace& workspace, int64_t images) {
    if (copied_) place_ = workspace.add<scalar_t>(images * image_size());
  }

  // The rows of the images, starting at `first`.
  scalar_t* at(const Workspace& workspace, int64_t first) const {
    return copied_ ? workspace.take<scalar_t>(place_) : data_ + first * image_size();
  }

  scalar_t* read(const Workspace& workspace, int64_t first, int64_t count) const {
    if (copied_)
      copy_images(data_ + first * strides_.image, strides_, at(workspace, first), rows(), count, channels_, height_,
                  width_, device_);
    return at(workspace, first);
  }

  template <typename From>
  void write(const From* source, int64_t first, int64_t count) const {
    copy_images(source, rows(), data_ + first * strides_.image, strides_, count, channels_, height_, width_, device_);
  }

 private:
  ImageStrides rows() const { return ImageStrides::rows(channels_, height_, width_); }

  scalar_t* data_;
  ImageStrides strides_;
  int64_t channels_, height_, width_;
  int32_t device_;
  bool copied_;
  int64_t place_ = 0;
};

}  // namespace mmdcn
