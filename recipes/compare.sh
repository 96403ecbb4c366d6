#!/usr/bin/env bash
# Train the comparisons of scales in benchmarks/README.md; hours on a CPU. Finished rows are kept.
set -euo pipefail
cd "$(dirname "$0")/.."
bin=${BIN:-.venv/bin} data=${DATA:-../shared/data}

for comparison in scales generation; do
    "$bin/python" "benchmarks/compare_$comparison.py" --data "$data"
    "$bin/python" "benchmarks/compare_$comparison.py" --data "$data" --only_collect
done
