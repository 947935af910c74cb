// SPDX-License-Identifier: Apache-2.0
// Detects objects in an image with a package of tools/deployment/export_aoti.py, without Python:
//
//   detect PACKAGE.pt2 IMAGE.ppm
//
// It prints a line for each detection: class, score and box (x1, y1, x2, y2). The image is a binary PPM and is not
// resized.
#include <ATen/ATen.h>
#include <c10/core/InferenceMode.h>
#include <torch/csrc/inductor/aoti_package/model_package_loader.h>

#include <fstream>
#include <iostream>
#include <iterator>
#include <sstream>
#include <stdexcept>
#include <string>
#include <unordered_map>
#include <vector>

namespace {

using Metadata = std::unordered_map<std::string, std::string>;

// [1, 3, H, W], RGB.
at::Tensor read_ppm(const std::string& path) {
  std::ifstream file(path, std::ios::binary);
  std::string magic;
  int64_t width = 0, height = 0, largest = 0;
  file >> magic >> width >> height >> largest;
  file.get();  // the single whitespace before the pixels
  if (!file || magic != "P6" || largest != 255) throw std::runtime_error(path + " is not an 8-bit binary PPM");
  at::Tensor pixels = at::empty({1, height, width, 3}, at::kByte);
  file.read(static_cast<char*>(pixels.data_ptr()), pixels.numel());
  if (!file) throw std::runtime_error(path + " ends before its last pixel");
  return pixels.permute({0, 3, 1, 2}).to(at::kFloat);
}

// Returns the numbers of a metadata entry as a tensor [1, C, 1, 1].
at::Tensor channels(const Metadata& metadata, const std::string& key) {
  std::istringstream text(metadata.at(key));
  const std::vector<float> values{std::istream_iterator<float>(text), {}};
  return at::tensor(values).view({1, -1, 1, 1});
}

// Normalizes and pads images as the detector's data_preprocessor does.
at::Tensor preprocess(at::Tensor images, const Metadata& metadata) {
  if (metadata.at("channels") == "bgr") images = images.flip({1});
  images = (images - channels(metadata, "mean")) / channels(metadata, "std");
  const int64_t divisor = std::stoll(metadata.at("pad_size_divisor"));
  const auto missing = [&](int64_t size) { return (divisor - size % divisor) % divisor; };
  return at::constant_pad_nd(images, {0, missing(images.size(3)), 0, missing(images.size(2))},
                             std::stod(metadata.at("pad_value")))
      .contiguous();
}

std::vector<std::string> lines(const std::string& text) {
  std::istringstream stream(text);
  std::vector<std::string> result;
  for (std::string line; std::getline(stream, line);) result.push_back(line);
  return result;
}

void detect(const std::string& package, const std::string& picture) {
  const c10::InferenceMode without_gradients;
  torch::inductor::AOTIModelPackageLoader detector(package);
  const Metadata metadata = detector.get_metadata();
  const std::vector<std::string> classes = lines(metadata.at("classes"));
  const at::Tensor image = read_ppm(picture);
  const at::Tensor sizes = at::tensor({image.size(2), image.size(3)}, at::kLong).view({1, 2});
  const std::vector<at::Tensor> found = detector.run({preprocess(image, metadata), sizes});
  const auto boxes = found[0].accessor<float, 3>();
  const auto scores = found[1].accessor<float, 2>();
  const auto labels = found[2].accessor<int64_t, 2>();
  std::cout.precision(9);
  for (int64_t i = 0; i < labels.size(1) && labels[0][i] >= 0; ++i) {
    std::cout << classes.at(labels[0][i]) << ' ' << scores[0][i];
    for (int64_t corner = 0; corner < 4; ++corner) std::cout << ' ' << boxes[0][i][corner];
    std::cout << '\n';
  }
}

}  // namespace

int main(int argc, char** argv) {
  if (argc != 3) {
    std::cerr << "usage: detect PACKAGE.pt2 IMAGE.ppm\n";
    return 2;
  }
  try {
    detect(argv[1], argv[2]);
  } catch (const std::exception& error) {
    std::cerr << "error: " << error.what() << '\n';
    return 1;
  }
  return 0;
}
