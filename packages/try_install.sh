#!/usr/bin/env bash
# try_install.sh DIST PYTHON TORCH: install the wheels in DIST in README's ways, in a fresh environment without a compiler,
# and use them.
set -euo pipefail
dist=$(realpath "$1") python=$(command -v "$2") torch=$3
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cd "$folder"
"$python" -m venv venv
echo "== $("$python" --version), torch $torch, no compiler =="
export PATH="$folder/venv/bin:$folder/tools"
mkdir tools
ln -s /usr/bin/rm tools
install() { pip --disable-pip-version-check install --quiet --find-links "$dist" "torch==$torch" "$@"; }

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
