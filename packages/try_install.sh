#!/usr/bin/env bash
# try_install.sh DIST PYTHON TORCH: install the wheels in DIST as the README says, in a fresh environment without a
# compiler, and use them.
set -euo pipefail
dist=$(realpath "$1") python=$(realpath -s "$(command -v "$2")") torch=$3
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cd "$folder"
"$python" -m venv venv
echo "== $("$python" --version), torch $torch, no compiler =="
mkdir tools
ln -s "$(command -v rm)" tools # for the trap
export PATH="$folder/venv/bin:$folder/tools"
install() { pip --disable-pip-version-check install --quiet --find-links "$dist" "torch==$torch" "$@"; }
site=$(python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')

# train_and_test: mmdet's own tools on five photographs, with a DCNv2 detector
train_and_test() {
  local config=$site/mmdcn/.mim/configs/coco_tiny/coco_tiny.py
  {
    python -W ignore "$site/mmdet/.mim/tools/train.py" "$config" --work-dir work_dir &&
      python -W ignore "$site/mmdet/.mim/tools/test.py" "$config" work_dir/epoch_2.pth --work-dir work_dir
  } > log.txt 2>&1 || {
    echo "$(< log.txt)"
    exit 1
  }
  python -W ignore -c 'import mmdet; print(f"mmdet {mmdet.__version__}: its train.py and test.py ran")'
}

install mmdcn
python - <<'EOF'
import torch
from mmdcn import ops, reference

call = [torch.randn(shape, dtype=torch.float64) for shape in ((1, 4, 5, 6), (1, 18, 5, 6), (3, 4, 3, 3))]
torch.testing.assert_close(ops.deform_conv2d(*call, padding=1), reference.deform_conv2d(*call, padding=1))
print('pip install mmdcn: the operators work on torch', torch.__version__)
EOF

install 'mmdcn[openmmlab,zoo]'
python -W ignore - <<'EOF'
import mmcv.ops
import mmdcn
import numpy as np

model = next(model for model in mmdcn.zoo.models() if model.sha256)
image = np.full((96, 128, 3), 128, np.uint8)
(found,) = mmdcn.DetInferencer(model.name, device='cpu', show_progress=False)(image)['predictions']
assert found.keys() >= {'bboxes', 'scores'}
print(f'pip install mmdcn[openmmlab,zoo]: {model.name} detects, on mmcv {mmcv.__version__}')
EOF

install scikit-image # its photographs
python -W ignore "$site/mmdcn/.mim/tools/dataset_converters/coco_tiny.py" --out-dir data/coco_tiny
train_and_test

pip --disable-pip-version-check uninstall --quiet --yes onedl-mmengine onedl-mmcv onedl-mmdetection
install mmdcn-mmcv mmengine==0.10.7 mmcv-lite==2.1.0 mmdet==3.3.0 'setuptools<82'
train_and_test
