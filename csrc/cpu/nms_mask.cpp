// SPDX-License-Identifier: Apache-2.0
// Non-maximum suppression for exported detectors: the shapes of its results do not depend on the data.
//
// It runs on the CPU for every device: an exported detector suppresses a few thousand boxes an image.
#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <vector>

#include "../core/checks.h"
#include "../core/readable_errors.h"
#include "../core/stable_ops.h"

namespace mmdcn {
namespace {

using torch::headeronly::ScalarType;

// The boxes of an image that may be kept, in the order of their scores.
class SortedBoxes {
 public:
  SortedBoxes(const float* boxes, const float* scores, int64_t count, float score_threshold) {
    for (int64_t index = 0; index < count; ++index) {
      if (scores[index] > score_threshold) order_.push_back(index);
    }
    std::stable_sort(order_.begin(), order_.end(), [&](int64_t a, int64_t b) { return scores[a] > scores[b]; });
    for (const int64_t index : order_) {
      const float* box = boxes + 4 * index;
      left_.push_back(box[0]), top_.push_back(box[1]), right_.push_back(box[2]), bottom_.push_back(box[3]);
      area_.push_back((box[2] - box[0]) * (box[3] - box[1]));
    }
  }

  void keep(float iou_threshold, bool* kept) const {
    std::vector<char> suppressed(order_.size());
    for (size_t i = 0; i < order_.size(); ++i) {
      if (suppressed[i]) continue;
      kept[order_[i]] = true;
      for (size_t j = i + 1; j < order_.size(); ++j) {
        suppressed[j] |= iou(i, j) > iou_threshold;
      }
    }
  }

 private:
  float iou(size_t i, size_t j) const {
    const float width = std::min(right_[i], right_[j]) - std::max(left_[i], left_[j]);
    const float height = std::min(bottom_[i], bottom_[j]) - std::max(top_[i], top_[j]);
    const float intersection = std::max(width, 0.0F) * std::max(height, 0.0F);
    return intersection / (area_[i] + area_[j] - intersection);
  }

  std::vector<int64_t> order_;
  std::vector<float> left_, top_, right_, bottom_, area_;
};

Tensor nms_mask(const Tensor& boxes, const Tensor& scores, double iou_threshold, double score_threshold) {
  check_rank(boxes, "boxes", 3);
  check_rank(scores, "scores", 2);
  const int64_t batch = scores.size(0), count = scores.size(1);
  check_shape(boxes, "boxes", {batch, count, 4});
  const torch::stable::Device cpu(torch::headeronly::DeviceType::CPU);
  const Tensor places = contiguous_as(torch::stable::to(boxes, cpu), ScalarType::Float);
  const Tensor values = contiguous_as(torch::stable::to(scores, cpu), ScalarType::Float);
  Tensor kept = torch::stable::empty({batch, count}, ScalarType::Bool, std::nullopt, cpu);
  torch::stable::zero_(kept);
  torch::stable::parallel_for(0, batch, 1, [&](int64_t begin, int64_t end) {
    for (int64_t image = begin; image < end; ++image) {
      SortedBoxes(data<const float>(places) + 4 * count * image, data<const float>(values) + count * image, count,
                  static_cast<float>(score_threshold))
          .keep(static_cast<float>(iou_threshold), data<bool>(kept) + count * image);
    }
  });
  return torch::stable::to(kept, scores.device());
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(mmdcn, m) {
  m.def(
      "nms_mask("
      "Tensor boxes, "   // [B, N, 4], (x1, y1, x2, y2)
      "Tensor scores, "  // [B, N]; those that do not exceed score_threshold are not kept
      "float iou_threshold, float score_threshold"
      ") -> Tensor");  // [B, N], true for the boxes that are kept
}

STABLE_TORCH_LIBRARY_IMPL(mmdcn, CompositeExplicitAutograd, m) {
  m.impl("nms_mask", TORCH_BOX(&Readable<&nms_mask>::call));
}

}  // namespace mmdcn
