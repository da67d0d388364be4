#!/bin/sh
# Everything that needs a GPU, in about ten minutes: tests, the engine's speed, the default run in
# both precisions, and the ladder of rollout modes. Its figures go to docs/gpu.md.
#
#     sh tests/gpu_checks.sh OUT            # a folder for logs, figures and runs
#     sh tests/gpu_checks.sh OUT bench      # one part: tests, bench, run or ladder
set -eu
out=$1
parts=${2:-tests bench run ladder}
python=${PYTHON:-python3}
mkdir -p "$out"
nvidia-smi -L

for part in $parts; do
    case $part in
    tests)
        $python -m pytest -q -n 0 tests/test_gpu.py
        ;;
    bench)
        $python tests/bench_engine.py --device cuda --model random-135m --slots 64,256,1024 \
            --generate 256 --json "$out/engine.json"
        ;;
    run)
        for precision in bf16 fp32; do
            # In bfloat16 trainer and sampler differ by rounding: each token gets its ratio.
            stale=$([ $precision = bf16 ] && echo all-is || echo mask)
            $python train.py --precision $precision --stale $stale --check_logprobs \
                --micro_tokens 65536 --slots 128 --out "$out/run-$precision"
            $python evaluate.py --model "$out/run-$precision" --precision fp32 --samples 4 \
                --slots 256 --json "$out/run-$precision.json"
        done
        ;;
    ladder)
        for flags in "" "--rollout async" "--rollout async --partial" \
            "--rollout async --partial --overlap"; do
            echo "== $flags"
            $python train.py --steps 8 --eval_tasks 0 --micro_tokens 65536 $flags
        done
        ;;
    esac
done
