#!/usr/bin/env bash
# Every check and figure that needs a GPU, in one go:  benchmarks/gpu.sh DATA [OUT]
# DATA holds sst2, edos and imdb (see README.md); figures go to OUT (default gpu-figures) and stdout.
# TMPDIR=/dev/shm where the disk would be the limit: it takes 30 GB.
set -euo pipefail
cd "$(dirname "$0")/.."
data=$1
out=${2:-gpu-figures}
python=${PYTHON:-python3}
mkdir -p "$out"
"$python" -c 'import torch; assert torch.cuda.is_available(), "no CUDA device"; print(torch.cuda.get_device_name())' |
    tee "$out/device.txt"
"$python" -m pytest tests/test_gpu.py -m gpu | tee "$out/tests.txt"
"$python" benchmarks/extract.py --data "$data" --only gpu | tee "$out/extract-8b.jsonl"
"$python" benchmarks/extract.py --data "$data" --only forward,loop,bfloat16 | tee "$out/extract.jsonl"
"$python" benchmarks/select.py --gpu | tee "$out/select.jsonl"
# The paper's experiment on whole data sets. More models, hub ids or folders: MODELS="a b" gpu.sh …
for model in ${MODELS:-bundled:minilm bundled:smollm2 bundled:gemma3}; do
    "$python" benchmarks/reproduce.py --data "$data" --model "$model" --device cuda \
        -o "$out/reproduce" --clean
done
