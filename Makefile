# The two main targets are `make demo` and `make test`. Each sets up what it needs in .venv, once, and compiles no mmcv.

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
.PHONY: demo test test-mmcv test-openmmlab test-torchvision zoo-check lint setup bench sanitize wheel docs gpu-check clean

demo: $(WORK_DIR)/demo.png
	@cat $(WORK_DIR)/results.txt
	@echo "Detections and sampling points: $(WORK_DIR)/demo.png"

# One process per core with one thread each: the tests spend most of their time in Python. A file stays in one process.
PYTEST = OMP_NUM_THREADS=1 $(1) -n $$(nproc) --maxprocesses=8 --dist=loadfile

test: $(VENV)/core.stamp
	@echo "== Testing, about 10 minutes on 2 cores =="
	$(call PYTEST,$(BIN)/pytest)

# The comparisons with mmcv's own operators. They are compiled once, in an environment that shares all else with .venv.
test-mmcv: $(VENV)-mmcv/mmcv.stamp
	@echo "== Comparing with mmcv's compiled operators, about 2 minutes on 2 cores =="
	$(call PYTEST,$(VENV)-mmcv/bin/python -m pytest) -m mmcv_ops

# The tests on OpenMMLab's own last releases, in a separate environment.
test-openmmlab:
	$(MAKE) test VENV=.venv-openmmlab OPENMMLAB=requirements/openmmlab-upstream.txt

# The comparisons with torchvision, in a separate environment: torchvision 0.29 needs torch 2.14, which is available
# only as a CUDA build of some gigabytes. The core is that of `make test`.
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

# With mmcv's compiled operators among the peers.
bench: $(VENV)-mmcv/mmcv.stamp
	@echo "== Measuring every shape and peer: run nothing else meanwhile =="
	$(PIP) install -r requirements/bench.txt
	for name in deform_conv2d deform_roi_pool nms; do $(VENV)-mmcv/bin/python benchmarks/run.py $$name --cases all; done

# The operators' tests under AddressSanitizer and UndefinedBehaviorSanitizer, about 4 minutes on 2 cores. The tests that
# limit memory are left out: the sanitizers need more.
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
	$(call PYTEST,$(BIN)/pytest) --dist=worksteal -p no:cacheprovider -k 'not too_little_memory and not workspace' \
	  $(filter-out %_compile.py,$(wildcard tests/test_deform_*.py)) tests/test_nms.py

# One wheel for every Python and torch, built from the sdist. It does not contain torch's libraries, because they are
# already loaded at run time. The tests use the packages of .venv, but mmdcn from the wheel. Then the installations of
# the README are tried in a fresh environment for each PYTHON:TORCH of WHEEL_TRIES. All but .venv's download some
# gigabytes.
WHEEL_CHECK := build/wheel-check
SITE := -c 'import sysconfig; print(sysconfig.get_path("purelib"))'
WHEEL_TRIES ?= $(BIN)/python:2.13.0 python3.10:2.10.0 python3.13:2.14.1
WHEEL_LIMIT := 4000000
wheel: $(VENV)/core.stamp
	@echo "== Building the wheels, about 2 minutes on 2 cores =="
	$(PIP) install -r requirements/wheel.txt
	rm -rf dist $(WHEEL_CHECK)
	$(BIN)/python -m build --no-isolation
	PATH="$(abspath $(BIN)):$$PATH" auditwheel repair --strip --exclude 'libtorch*.so' --exclude 'libc10*.so' -w dist dist/*-linux_*.whl
	rm dist/*-linux_*.whl
	for name in mmdcn-zoo mmdcn-mmcv; do $(BIN)/python -m build --no-isolation --wheel --outdir dist packages/$$name; done
	@$(BIN)/python -m zipfile -l dist/mmdcn-*.whl | grep -v '\.mim/'
	@ls -l dist
	@test $$(stat -c %s dist/mmdcn-*.whl) -le $(WHEEL_LIMIT) || { echo "error: mmdcn's wheel has more than $(WHEEL_LIMIT) bytes"; exit 1; }
	@echo "== Testing them in a separate environment =="
	$(BIN)/python -m venv $(WHEEL_CHECK)
	$(WHEEL_CHECK)/bin/pip install --no-deps -r requirements/mim.txt dist/mmdcn-*.whl dist/mmdcn_zoo-*.whl
	$(BIN)/python $(SITE) > "$$($(WHEEL_CHECK)/bin/python $(SITE))/venv.pth"
	cp -r tests pyproject.toml $(WHEEL_CHECK)
	cd $(WHEEL_CHECK) && bin/python -m pytest $(filter-out %_compile.py %_derivatives.py %_fuzz.py,$(wildcard tests/test_deform_*.py)) $(addprefix tests/test_,nms.py extension.py packaging.py)
	for try in $(WHEEL_TRIES); do packages/try_install.sh dist "$${try%%:*}" "$${try##*:}"; done

# The documentation site. Its API pages come from the docstrings, its tables of promises from the tests.
docs: $(VENV)/core.stamp
	$(PIP) install -r requirements/docs.txt
	$(BIN)/python -m sphinx -b html --fail-on-warning --keep-going -c docs . build/docs
	@echo "Open build/docs/index.html"

# On a machine with a GPU, in 5 minutes: the operators' tests, the memory checkers, the benchmark, a training step, and a
# page with all results in build/gpu-check-results. It uses the wheel that `make wheel` has left in dist, or mmdcn from
# the folder GPU_CHECK_SITE. PYTHON needs CUDA builds of torch and torchvision, pytest, pytest-xdist, hypothesis,
# matplotlib, tabulate and tqdm. GPU_CHECK_PEERS is a folder with the wheel of deformops, and may be absent.
GPU_CHECK_PEERS ?= .whl
gpu-check:
	$(PYTHON) benchmarks/gpu_check.py $(if $(GPU_CHECK_SITE),--site $(GPU_CHECK_SITE)) --peers $(GPU_CHECK_PEERS) $(GPU_CHECK_OPTIONS)

setup: $(VENV)/core.stamp

# mmcv compiles its operators if it finds torch, so it is built in isolation. pip's cache may contain a compiled wheel,
# so the cache is not used. packages/mmdcn-mmcv puts mmdcn's operators in their place.
MMCV := $(shell grep '^[a-z-]*mmcv[a-z-]*==' $(OPENMMLAB))
$(VENV)/openmmlab.stamp: requirements/build.txt $(OPENMMLAB)
	@echo "== Setting up $(VENV): torch and OpenMMLab, about 2 minutes once they are downloaded =="
	$(PYTHON) -m venv $(VENV)
	$(PIP) install -r requirements/build.txt
	$(PIP) install --no-cache-dir --no-deps --force-reinstall $(MMCV)
	$(PIP) install --no-build-isolation -r $(OPENMMLAB)
	touch $@

$(VENV)/core.stamp: $(VENV)/openmmlab.stamp requirements/dev.txt requirements/deepspeed.txt setup.py pyproject.toml \
  $(shell find csrc -type f) $(wildcard packages/mmdcn-mmcv/*.toml packages/mmdcn-mmcv/mmcv/*.py)
	@echo "== Building mmdcn's core, about 1 minute, and 3 with nvcc =="
	$(PIP) install -r requirements/dev.txt
	$(PIP) install --no-deps --upgrade --target $(VENV)/deepspeed -r requirements/deepspeed.txt
	$(PIP) install --no-build-isolation --editable .
	$(PIP) install --no-build-isolation --no-deps --force-reinstall packages/mmdcn-mmcv
	touch $@

# pip caches the wheel for later builds. If the cached wheel has no operators, it is removed and built again.
COMPILED := build/compiled-$(firstword $(subst =, ,$(MMCV)))
$(VENV)-mmcv/mmcv.stamp: $(VENV)/openmmlab.stamp | $(VENV)/core.stamp
	@echo "== Compiling mmcv's operators, once: 7 minutes on 2 fast cores, up to 30 on slow ones; all of it in $(COMPILED).log =="
	rm -rf $(VENV)-mmcv $(COMPILED) && mkdir -p $(COMPILED)
	compile() { \
	  MMCV_WITH_OPS=1 $(PIP) wheel -v --no-build-isolation --no-deps -w $(COMPILED) $(subst -lite,,$(MMCV)) 2>&1 | \
	  tee $(COMPILED).log | sed -un 's/.*\[\([0-9]*\)\/\([0-9]*\)\].*/compiled \1 of \2 files/p' || { tail -30 $(COMPILED).log; exit 1; }; }; \
	has_operators() { $(BIN)/python -m zipfile -l $(COMPILED)/*.whl | grep '_ext.*\.so' > /dev/null; }; \
	compile; \
	has_operators || { $(PIP) cache remove '*mmcv*'; rm $(COMPILED)/*.whl; compile; has_operators; }
	$(BIN)/python -m venv $(VENV)-mmcv
	$(VENV)-mmcv/bin/pip --disable-pip-version-check install --no-index --no-deps $(COMPILED)/*.whl
	echo "import site; site.addsitedir('$$($(BIN)/python $(SITE))')" > "$$($(VENV)-mmcv/bin/python $(SITE))/venv.pth"
	$(VENV)-mmcv/bin/python -c 'import mmcv._ext; print("mmcv runs on", mmcv._ext.__file__)'
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
	rm -rf build dist *.egg-info packages/*/build packages/*/*.egg-info mmdcn/*.so .venv*/core.stamp
