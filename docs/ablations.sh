#!/bin/sh
# Repeats rows of the ablation table, three seeds each: trains with one flag changed, and asks the 500
# held-out questions. OUT/ablations.json then holds the results of all rows that were run;
# docs/figures.py draws it, once it lies in docs/results/bench/.
#
#     sh docs/ablations.sh runs/ablations                  # all rows, a whole run each
#     sh docs/ablations.sh runs/ablations gamma-0.9        # one row: 25 minutes on two cores
#     SEEDS="0 1" STEPS=20 SAMPLES=2 sh docs/ablations.sh runs/ablations gamma-0.9 default
set -eu
out=$1
shift
rows=${*:-default gamma-1 gamma-0.9 all-negatives no-baseline no-penalty small-penalty \
    curriculum more-tasks temperature-0.7 partial-mask partial-is partial-keep}

flags_of() {
    partial="--rollout async --partial --workers 1"
    case $1 in
    default) ;;
    gamma-1) echo --gamma 1 ;;
    gamma-0.9) echo --gamma 0.9 ;;
    all-negatives) echo --negatives inf ;;
    no-baseline) echo --baseline none ;;
    no-penalty) echo --format_penalty 0 ;;
    small-penalty) echo --format_penalty 0.1 ;;
    curriculum) echo --curriculum on ;;
    more-tasks) echo --tasks_per_step 32 --samples 4 ;;
    temperature-0.7) echo --temperature 0.7 ;;
    partial-*) echo $partial --stale ${1#partial-} ;;
    *) echo "no row $1" >&2 && exit 1 ;;
    esac
}

for row in $rows; do
    flags=$(flags_of "$row")
    for seed in ${SEEDS:-0 1 2}; do
        run="$out/$row-$seed"
        python train.py $flags --seed "$seed" --steps "${STEPS:-40}" --eval_every 0 --eval_tasks 0 \
            --keep_trajectories 0 --out "$run"
        python evaluate.py --model "$run" --samples "${SAMPLES:-4}" --json "$run/test.json"
    done
done

python - "$out" <<'END'
import json, pathlib, sys

keys = ["pass@1", "pass@1_ci", "n", "samples", "steps_mean_correct", "format_error_rate"]
keys += ["by_family", "by_hops"]
tests, out = {}, pathlib.Path(sys.argv[1])
for file in sorted(out.glob("*/test.json")):
    test = json.loads(file.read_text())
    print(f"{file.parent.name:20s}{100 * test['pass@1']:6.1f}")
    tests[file.parent.name] = {key: test[key] for key in keys}
(out / "ablations.json").write_text(json.dumps(tests, indent=1) + "\n")
END
