#!/usr/bin/env bash
# What to do with a few minutes of a GPU, on a machine that may be bare and without a network but has PyTorch. A step
# takes ten minutes at most. Repeated on the same machine, step 3 goes on where it stopped.
#
#   scripts/gpu.sh fetch  beforehand, with a network: wheels and CIFAR-10 into bundle/, which git ignores; take it along
#   scripts/gpu.sh 1      right: the tests marked cuda
#   scripts/gpu.sh 2      fast: the benchmark, into results/benchmark/
#   scripts/gpu.sh 3      large: the tables gpu and gpu_wide, into results/gpu/
#
# DEVICE=cpu tries a step out without a GPU. ARGS are more arguments for what a step calls, such as these, which
# shorten step 3:
#   DEVICE=cpu ARGS="model=resnet18 epochs=1 batch_size=8 seed=0 dataset.root=FOLDER dataset.name=NAME" scripts/gpu.sh 3
# MINUTES limits a step, but for what it ends with. JOBS says how many runs share the GPU. Where OUT is set, the
# results are copied into it.
set -euo pipefail
cd "$(dirname "$0")/.."
step=${1:?usage: scripts/gpu.sh fetch|1|2|3}
device=${DEVICE:-cuda:0} # by its number, so that several runs may share it
read -ra args <<< "${ARGS:-}"
python=${PYTHON:-$([ -x .venv/bin/python ] && echo .venv/bin/python || echo python3)}
end=$((SECONDS + 60 * ${MINUTES:-8}))
bundle=bundle

# Everything of pyproject.toml's [suite] that images with PyTorch tend to lack, and what the benchmark compares with.
packages=(hydra-core==1.3.8 omegaconf==2.3.1 antlr4-python3-runtime==4.9.3 hydra-joblib-launcher==1.2.0)
packages+=(pydantic==2.14.4 annotated-types typing-extensions typing-inspection pytorch-optimizer==4.1.0)
compiled=(pydantic-core==2.50.5)

limited() { # what is left of the time, and 40 seconds to save
  timeout --signal=INT --kill-after=40 "$((end > SECONDS ? end - SECONDS : 1))" "$@"
}

fetch() {
  mkdir -p $bundle/wheels
  "$python" -m pip wheel --no-deps --wheel-dir $bundle/wheels "${packages[@]}"
  "$python" -m pip download --no-deps --only-binary=:all: --python-version "${FOR_PYTHON:-3.12}" \
    --platform manylinux2014_x86_64 --platform manylinux_2_17_x86_64 --dest $bundle/wheels "${compiled[@]}"
  cp "${ARCHIVE:-../shared/data/cifar10-jpeg.tar.gz}" $bundle/
  du -sh $bundle
}

prepare() { # once on each machine
  export PYTHONPATH=$PWD:$PWD/outputs/.site${PYTHONPATH:+:$PYTHONPATH}
  if [ -d $bundle/wheels ] && ! "$python" -c "import hydra, pydantic, pytorch_optimizer" 2> /dev/null; then
    "$python" -m pip install --quiet --no-index --no-deps --no-compile --target outputs/.site $bundle/wheels/*.whl
  fi
  "$python" -c "import torch; torch.zeros(1, device='$device')" # else all of step 1 would be skipped, and look right
}

copy() { # what came of it, as one small file
  [ -z "${OUT:-}" ] || tar -czf "$OUT/step$step.tar.gz" "$@"
}

case $step in
  fetch) fetch ;;
  1)
    prepare
    mkdir -p outputs
    code=0
    tests=(tests/test_optim_cuda.py tests/training/test_loop_cuda.py)
    limited "$python" -m pytest -m cuda -n 0 -rs "${tests[@]}" 2>&1 | tee outputs/gpu-tests.txt || code=$?
    copy outputs/gpu-tests.txt
    exit $code
    ;;
  2)
    prepare
    code=0
    limited "$python" -m scripts.benchmark --device "$device" "${args[@]}" || code=$?
    copy $(find results/benchmark outputs/benchmark -name '*.md' -o -name '*.csv' 2> /dev/null)
    exit $code
    ;;
  3)
    prepare
    [ -d data/cifar10 ] || [ ! -f $bundle/cifar10-jpeg.tar.gz ] ||
      "$python" scripts/data.py --archive $bundle/cifar10-jpeg.tar.gz
    tables=(--protocol gpu --reuse "${args[@]}")
    code=0
    for table in gpu gpu_wide; do
      jobs=${JOBS:-$([ $table = gpu ] && echo 4 || echo 1)}
      limited "$python" scripts/reproduce.py "${tables[@]}" "device=$device" --table $table --jobs "$jobs" ||
        { code=$? && break; } # the limit, or an error: what there is gets written down all the same
    done
    "$python" scripts/reproduce.py "${tables[@]}" --table gpu,gpu_wide --collect # commands without the device
    copy $(ls -d results/gpu outputs/results/gpu 2> /dev/null)
    exit $code
    ;;
  *)
    echo "no step $step: fetch, 1, 2 or 3" >&2
    exit 2
    ;;
esac
