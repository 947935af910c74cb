# The two main targets are `make demo` and `make test`. Each sets up what it needs in .venv, once.

PYTHON ?= python3
VENV := .venv
OPENMMLAB := requirements/openmmlab.txt
BIN := $(VENV)/bin
PIP := $(BIN)/pip --disable-pip-version-check
CONFIG := configs/mnist_scenes/faster-rcnn_r18-w32-mdconv-c3-c5_fpn_6e_mnist-scenes.py
WORK_DIR := work_dirs/$(notdir $(CONFIG:.py=))

SHELL := bash
.SHELLFLAGS := -eo pipefail -c
.DELETE_ON_ERROR:
.PHONY: demo test test-openmmlab test-torchvision zoo-check lint setup bench sanitize wheel docs gpu-check clean

demo: $(WORK_DIR)/demo.png
	@cat $(WORK_DIR)/results.txt
	@echo "Detections and sampling points: $(WORK_DIR)/demo.png"

test: $(VENV)/core.stamp
	@echo "== Testing, about 16 minutes on 2 cores =="
	$(BIN)/pytest

# The tests on OpenMMLab's own last releases, in a separate environment.
test-openmmlab:
	$(MAKE) test VENV=.venv-openmmlab OPENMMLAB=requirements/openmmlab-upstream.txt

# The comparisons with torchvision, in a separate environment: torchvision 0.29 needs torch 2.14, which exists only as a
# build for CUDA of some gigabytes. The core is that of `make test`.
TORCHVISION := .venv-torchvision/bin
test-torchvision: $(VENV)/core.stamp
	@echo "== Setting up .venv-torchvision: some gigabytes =="
	$(PYTHON) -m venv .venv-torchvision
	$(TORCHVISION)/pip --disable-pip-version-check install -r requirements/torchvision.txt
	$(TORCHVISION)/python -c 'import torch, torchvision.ops; print("torch", torch.__version__, "torchvision", torchvision.__version__)'
	PYTHONPATH=. $(TORCHVISION)/python -m pytest -k torchvision tests/test_deform_conv2d.py tests/test_deform_roi_pool.py

# Checks that every checkpoint of the zoo reaches the AP in its metafile.
zoo-check: $(VENV)/core.stamp data/mnist_scenes data/neon_trees
	$(BIN)/python tools/zoo_check.py

lint: $(VENV)/core.stamp
	PATH="$(abspath $(BIN)):$$PATH" pre-commit run --all-files

bench: $(VENV)/core.stamp
	@echo "== Measuring every shape and peer: run nothing else meanwhile =="
	$(PIP) install -r requirements/bench.txt
	$(BIN)/python benchmarks/run.py deform_conv2d --cases all
	$(BIN)/python benchmarks/run.py deform_roi_pool --cases all

# The operators' tests under AddressSanitizer and UndefinedBehaviorSanitizer. The tests that limit memory are left out:
# the sanitizers need more.
SANITIZED := build/sanitize
sanitize: $(VENV)/core.stamp
	rm -rf $(SANITIZED) && mkdir -p $(SANITIZED) && cp -r mmdcn $(SANITIZED) && rm -f $(SANITIZED)/mmdcn/*.so
	torch=$$($(BIN)/python -c 'import pathlib, torch; print(pathlib.Path(torch.__file__).parent)'); \
	$(CXX) -std=c++20 -shared -fPIC -O1 -g -fopenmp-simd -fvisibility=hidden -D_GLIBCXX_ASSERTIONS \
	  -fsanitize=address,undefined -fno-sanitize-recover=undefined -DTORCH_TARGET_VERSION=0x020a000000000000 \
	  -isystem "$$torch/include" csrc/ops/*.cpp csrc/cpu/*.cpp -L"$$torch/lib" -ltorch_cpu \
	  -o $(SANITIZED)/mmdcn/_C.abi3.so
	for set in avx2 avx512; do cp $(SANITIZED)/mmdcn/_C.abi3.so $(SANITIZED)/mmdcn/_C_$$set.abi3.so; done
	LD_PRELOAD="$$($(CXX) -print-file-name=libasan.so) $$($(CXX) -print-file-name=libstdc++.so)" \
	ASAN_OPTIONS=detect_leaks=0 UBSAN_OPTIONS=print_stacktrace=1 PYTHONPATH="$(abspath $(SANITIZED))" \
	$(BIN)/pytest -p no:cacheprovider -k 'not too_little_memory and not workspace' \
	  $(addprefix tests/test_deform_,conv2d.py conv2d_errors.py conv2d_derivatives.py conv2d_fuzz.py roi_pool.py)

# One wheel for every Python and torch, built from the sdist. torch's libraries are not copied into it: at run time they
# are loaded already. The check uses the packages of .venv, but mmdcn from the wheel.
WHEEL_CHECK := build/wheel-check
SITE := -c 'import sysconfig; print(sysconfig.get_path("purelib"))'
wheel: $(VENV)/core.stamp
	@echo "== Building the wheel, about 2 minutes on 2 cores =="
	$(PIP) install -r requirements/wheel.txt
	rm -rf dist $(WHEEL_CHECK)
	$(BIN)/python -m build --no-isolation
	PATH="$(abspath $(BIN)):$$PATH" auditwheel repair --exclude 'libtorch*.so' --exclude 'libc10*.so' -w dist dist/*-linux_*.whl
	rm dist/*-linux_*.whl
	@echo "== Testing it in a separate environment =="
	$(BIN)/python -m venv $(WHEEL_CHECK)
	$(WHEEL_CHECK)/bin/pip install --no-deps -r requirements/mim.txt dist/*.whl
	$(BIN)/python $(SITE) > "$$($(WHEEL_CHECK)/bin/python $(SITE))/venv.pth"
	cp -r tests pyproject.toml $(WHEEL_CHECK)
	cd $(WHEEL_CHECK) && bin/python -m pytest $(addprefix tests/test_,deform_conv2d.py deform_conv2d_errors.py deform_roi_pool.py extension.py packaging.py)
	@$(BIN)/python -m zipfile -l dist/*.whl | grep -v '\.mim/'
	@ls -l dist

# The documentation site. Its API pages come from the docstrings, its tables of promises from the tests.
docs: $(VENV)/core.stamp
	$(PIP) install -r requirements/docs.txt
	$(BIN)/python -m sphinx -b html --fail-on-warning --keep-going -c docs . build/docs
	@echo "Open build/docs/index.html"

# On a machine with a GPU, in 5 minutes: the operators' tests, the memory checkers, the benchmark, a training step, and a
# page with all of it in build/gpu-check-results. It takes the wheel that `make wheel` left in dist, or the folder GPU_CHECK_SITE
# with mmdcn in it. PYTHON needs CUDA builds of torch and torchvision, pytest, pytest-xdist, hypothesis, matplotlib, tabulate
# and tqdm. GPU_CHECK_PEERS is a folder with the wheel of deformops, and may be absent.
GPU_CHECK_PEERS ?= .whl
gpu-check:
	$(PYTHON) benchmarks/gpu_check.py $(if $(GPU_CHECK_SITE),--site $(GPU_CHECK_SITE)) --peers $(GPU_CHECK_PEERS) $(GPU_CHECK_OPTIONS)

setup: $(VENV)/core.stamp

# MMCV_WITH_OPS makes mmcv compile its operators; pip caches the wheel.
$(VENV)/openmmlab.stamp: requirements/build.txt $(OPENMMLAB)
	@echo "== Setting up $(VENV): torch, then mmcv, which compiles for about 7 minutes on 2 cores =="
	$(PYTHON) -m venv $(VENV)
	$(PIP) install -r requirements/build.txt
	MMCV_WITH_OPS=1 $(PIP) install --no-build-isolation -r $(OPENMMLAB)
	touch $@

$(VENV)/core.stamp: $(VENV)/openmmlab.stamp requirements/dev.txt requirements/deepspeed.txt setup.py pyproject.toml $(shell find csrc -type f)
	@echo "== Building mmdcn's core, about 3 minutes with nvcc =="
	$(PIP) install -r requirements/dev.txt
	$(PIP) install --no-deps --upgrade --target $(VENV)/deepspeed -r requirements/deepspeed.txt
	$(PIP) install --no-build-isolation --editable .
	touch $@

data/mnist_scenes: $(VENV)/core.stamp
	@echo "== Composing the MNIST scenes, about 15 seconds =="
	$(BIN)/python tools/dataset_converters/mnist_scenes.py
	touch $@

data/neon_trees: $(VENV)/core.stamp
	@echo "== Cutting the aerial photographs of trees, some seconds =="
	$(BIN)/python tools/dataset_converters/neon_trees.py
	touch $@

$(WORK_DIR)/results.txt: $(CONFIG) | data/mnist_scenes
	@echo "== Training a DCNv2 detector, about 8 minutes on 2 cores; if stopped, it continues from its last checkpoint =="
	$(BIN)/python tools/train.py $(CONFIG) --resume
	@echo "== Testing it =="
	$(BIN)/python tools/test.py $(CONFIG) "$$(cat $(WORK_DIR)/last_checkpoint)" | tee $(WORK_DIR)/test.log
	grep '^|' $(WORK_DIR)/test.log > $@

$(WORK_DIR)/demo.png: $(WORK_DIR)/results.txt
	$(BIN)/python tools/analysis_tools/visualize_offsets.py $$(ls data/mnist_scenes/test/* | head -8) $(CONFIG) "$$(cat $(WORK_DIR)/last_checkpoint)" --views detections --score 0.5 --out-dir $(@D) && mv $(@D)/detections.png $@

clean:
	rm -rf build dist *.egg-info mmdcn/*.so .venv*/core.stamp
