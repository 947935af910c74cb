// SPDX-License-Identifier: Apache-2.0
// Non-maximum suppression with the same roundings as mmcv's, so that a box exactly at the threshold is treated alike.
#include "../ops/nms.h"

#include <algorithm>
#include <cmath>
#include <numeric>
#include <tuple>
#include <utility>
#include <vector>

#include "../core/dispatch.h"
#include "../core/library.h"
#include "../core/readable_errors.h"

// The intersection must be rounded before it is subtracted from the union; a fused multiply-add would not round it.
#define MMDCN_ROUND_PRODUCTS [[gnu::optimize("fp-contract=off")]]

namespace mmdcn {
namespace {

template <typename T>
struct Box {
  T x1, y1, x2, y2, area;
};

template <typename T>
Box<T> box_of(const T* corners, T offset) {
  const auto [x1, y1, x2, y2] = std::tuple(corners[0], corners[1], corners[2], corners[3]);
  return {x1, y1, x2, y2, (x2 - x1 + offset) * (y2 - y1 + offset)};
}

// Boxes as one array for each coordinate, for vectorization.
template <typename T>
struct Boxes {
  Boxes(const Tensor& corners, T offset)  // [N, 4]
      : count(corners.size(0)), values(5 * count) {
    for (int64_t i = 0; i < count; ++i) {
      const Box<T> box = box_of(data<const T>(corners) + 4 * i, offset);
      x1()[i] = box.x1, y1()[i] = box.y1, x2()[i] = box.x2, y2()[i] = box.y2, area()[i] = box.area;
    }
  }

  T* x1() { return values.data(); }
  T* y1() { return x1() + count; }
  T* x2() { return y1() + count; }
  T* y2() { return x2() + count; }
  T* area() { return y2() + count; }
  Box<T> operator[](int64_t i) { return {x1()[i], y1()[i], x2()[i], y2()[i], area()[i]}; }

  int64_t count;
  std::vector<T> values;
};

template <typename T>
struct Threshold {
  T value;
  bool at_it_too;  // whether an overlap equal to the threshold suppresses
};

// Suppresses the later boxes that overlap the kept box i and are not yet suppressed.
template <typename T>
MMDCN_ROUND_PRODUCTS void suppress(Boxes<T>& boxes, int32_t i, T offset, Threshold<T> threshold,
                                   int32_t* __restrict keepers) {
  const T *x1 = boxes.x1(), *y1 = boxes.y1(), *x2 = boxes.x2(), *y2 = boxes.y2(), *area = boxes.area();
  const auto [own_x1, own_y1, own_x2, own_y2, own_area] = boxes[i];
  const int32_t count = static_cast<int32_t>(boxes.count);
#pragma omp simd
  for (int32_t j = i + 1; j < count; ++j) {
    const T width = std::min(own_x2, x2[j]) - std::max(own_x1, x1[j]) + offset;
    const T height = std::min(own_y2, y2[j]) - std::max(own_y1, y1[j]) + offset;
    const T intersection = std::max(T{0}, width) * std::max(T{0}, height);
    const T ratio = intersection / (own_area + area[j] - intersection);
    const bool over = (ratio > threshold.value) | ((ratio == threshold.value) & threshold.at_it_too);
    keepers[j] = over & (keepers[j] == j) ? i : keepers[j];
  }
}

// For each box, in the order of scores, the index of the box that suppresses it; a kept box has its own index.
std::vector<int32_t> keepers_of(const Tensor& sorted, double iou_threshold, bool at_it_too, int64_t offset) {
  std::vector<int32_t> keepers(sorted.size(0));
  std::iota(keepers.begin(), keepers.end(), 0);
  const ScalarType type = compute_type(sorted.scalar_type());
  const Tensor corners = contiguous_as(sorted, type);
  dispatch_compute(type, [&](auto zero) {
    using T = decltype(zero);
    const T margin = static_cast<T>(offset);
    Boxes<T> boxes(corners, margin);
    for (size_t i = 0; i < keepers.size(); ++i) {
      const int32_t own = static_cast<int32_t>(i);
      if (keepers[i] != own) continue;
      suppress(boxes, own, margin, Threshold<T>{static_cast<T>(iou_threshold), at_it_too}, keepers.data());
    }
  });
  return keepers;
}

Tensor empty_indices(int64_t count) { return torch::stable::empty({count}, ScalarType::Long); }

Tensor nms(const Tensor& boxes, const Tensor& scores, double iou_threshold, int64_t offset) {
  check_nms(boxes, scores, offset);
  const Tensor order = by_score(scores);
  const std::vector<int32_t> keepers = keepers_of(index_select(boxes, order), iou_threshold, false, offset);
  std::vector<int64_t> kept;
  for (size_t i = 0; i < keepers.size(); ++i) {
    if (keepers[i] == static_cast<int32_t>(i)) kept.push_back(data<const int64_t>(order)[i]);
  }
  const Tensor result = empty_indices(kept.size());
  std::copy(kept.begin(), kept.end(), data<int64_t>(result));
  return result;
}

Tensor nms_match(const Tensor& boxes, const Tensor& scores, double iou_threshold) {
  check_nms(boxes, scores, 0);
  const Tensor order = by_score(scores);
  const std::vector<int32_t> keepers = keepers_of(index_select(boxes, order), iou_threshold, true, 0);
  const int64_t* numbers = data<const int64_t>(order);
  const Tensor result = empty_indices(boxes.size(0));
  for (size_t i = 0; i < keepers.size(); ++i) {
    data<int64_t>(result)[numbers[i]] = numbers[keepers[i]];
  }
  return result;
}

// Runs on the CPU for every device: an exported detector has only a few thousand boxes per image.
Tensor nms_mask(const Tensor& boxes, const Tensor& scores, double iou_threshold, double score_threshold) {
  check_rank(scores, "scores", 2);
  const int64_t batch = scores.size(0), count = scores.size(1);
  check_shape(boxes, "boxes", {batch, count, 4});
  const torch::stable::Device cpu(torch::headeronly::DeviceType::CPU);
  const Tensor corners = torch::stable::to(boxes, cpu);
  const Tensor values = contiguous_as(torch::stable::to(scores, cpu), ScalarType::Float);
  Tensor kept = torch::stable::empty({batch, count}, ScalarType::Bool);
  torch::stable::zero_(kept);
  for (int64_t image = 0; image < batch; ++image) {
    const Tensor order = by_score(torch::stable::select(values, 0, image));
    const int64_t* numbers = data<const int64_t>(order);
    const float* of_image = data<const float>(values) + image * count;
    const auto exceeds = [&](int64_t number) { return of_image[number] > score_threshold; };
    const int64_t candidates = std::partition_point(numbers, numbers + count, exceeds) - numbers;
    const Tensor sorted = index_select(torch::stable::select(corners, 0, image), slice(order, 0, 0, candidates));
    const std::vector<int32_t> keepers = keepers_of(sorted, iou_threshold, false, 0);
    for (size_t i = 0; i < keepers.size(); ++i) {
      data<bool>(kept)[image * count + numbers[i]] = keepers[i] == static_cast<int32_t>(i);
    }
  }
  return torch::stable::to(kept, scores.device());
}

enum class Decay : int64_t { kNaive, kLinear, kGaussian };

// The factor by which a better box lowers a box's score.
template <typename T>
T decay(Decay method, T ratio, T threshold, T sigma) {
  if (method == Decay::kGaussian) return std::exp(-(ratio * ratio) / sigma);
  if (!(ratio >= threshold)) return 1;
  return method == Decay::kNaive ? 0 : 1 - ratio;
}

template <typename T>
struct Candidate {
  Box<T> box;
  T score;
  int64_t number;
};

template <typename T>
MMDCN_ROUND_PRODUCTS T overlap(const Box<T>& a, const Box<T>& b, T offset) {
  const T width = std::min(a.x2, b.x2) - std::max(a.x1, b.x1) + offset;
  const T height = std::min(a.y2, b.y2) - std::max(a.y1, b.y1) + offset;
  const T intersection = std::max(T{0}, width) * std::max(T{0}, height);
  return intersection / (a.area + b.area - intersection);
}

// Leaves the kept candidates, in the order of selection. A removed one is replaced by the last, which decides ties.
template <typename T>
void soften(std::vector<Candidate<T>>& candidates, Decay method, T threshold, T sigma, T min_score, T offset) {
  const auto by_score = [](const Candidate<T>& a, const Candidate<T>& b) { return a.score < b.score; };
  for (size_t i = 0; i < candidates.size(); ++i) {
    std::swap(candidates[i], *std::max_element(candidates.begin() + i, candidates.end(), by_score));
    for (size_t j = i + 1; j < candidates.size();) {
      Candidate<T>& other = candidates[j];
      other.score *= decay(method, overlap(candidates[i].box, other.box, offset), threshold, sigma);
      if (other.score < min_score) {
        other = candidates.back();
        candidates.pop_back();
      } else {
        ++j;
      }
    }
  }
}

std::tuple<Tensor, Tensor> soft_nms(const Tensor& boxes, const Tensor& scores, double iou_threshold, double sigma,
                                    double min_score, int64_t method, int64_t offset) {
  check_nms(boxes, scores, offset);
  MMDCN_CHECK(method >= 0 && method <= 2, "method must be 0, 1 or 2, got ", method);
  const ScalarType type = compute_type(boxes.scalar_type());
  const Tensor corners = contiguous_as(boxes, type), given = contiguous_as(scores, type);
  Tensor dets, indices;
  dispatch_compute(type, [&](auto zero) {
    using T = decltype(zero);
    std::vector<Candidate<T>> candidates;
    for (int64_t i = 0; i < boxes.size(0); ++i) {
      const Box<T> box = box_of(data<const T>(corners) + 4 * i, static_cast<T>(offset));
      candidates.push_back({box, data<const T>(given)[i], i});
    }
    soften(candidates, static_cast<Decay>(method), static_cast<T>(iou_threshold), static_cast<T>(sigma),
           static_cast<T>(min_score), static_cast<T>(offset));
    dets = torch::stable::empty({static_cast<int64_t>(candidates.size()), 5}, type);
    indices = empty_indices(candidates.size());
    T* row = data<T>(dets);
    int64_t* number = data<int64_t>(indices);
    for (const Candidate<T>& kept : candidates) {
      const T values[]{kept.box.x1, kept.box.y1, kept.box.x2, kept.box.y2, kept.score};
      row = std::copy(std::begin(values), std::end(values), row);
      *number++ = kept.number;
    }
  });
  return {torch::stable::to(dets, boxes.scalar_type()), indices};
}

}  // namespace

MMDCN_CPU_KERNELS(m) {
  m.impl("nms", TORCH_BOX(&Readable<&nms>::call));
  m.impl("soft_nms", TORCH_BOX(&Readable<&soft_nms>::call));
  m.impl("nms_match", TORCH_BOX(&Readable<&nms_match>::call));
}

STABLE_TORCH_LIBRARY_IMPL(mmdcn, CompositeExplicitAutograd, m) {
  m.impl("nms_mask", TORCH_BOX(&Readable<&nms_mask>::call));
}

}  // namespace mmdcn
