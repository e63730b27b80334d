#!/usr/bin/env bash
# The first hour of a new user, from a fresh clone to an exported network: seconds of each command, and lines typed.
#
#     benchmarks/first_hour.sh IMAGES [key=value ...]
#
# IMAGES has train/CLASS/IMAGE and validation/CLASS/IMAGE. Fields of the recipe may follow, such as epochs=3, or
# model.pretrained=false where timm's weights cannot be downloaded.
set -euo pipefail
images=$(realpath "$1")
shift
repository=$(cd "$(dirname "$0")/.." && pwd)
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cd "$folder"
typed=0

step() {
    local start=$SECONDS
    echo "+ $1"
    bash -euo pipefail -c "$1" >"$folder/output" 2>&1 || { tail -n 20 "$folder/output"; exit 1; }
    typed=$((typed + 1))
    echo "  $((SECONDS - start)) s"
}

first=$SECONDS
step "git clone -q $repository clone"
cd clone
step "python3.11 -m venv .venv"
export PATH=$PWD/.venv/bin:$PATH
step "pip install -q '.[train]'"
step "timm-selfdistill init $images --output mine.yaml"
step "timm-selfdistill train mine.yaml output_dir=runs/mine $*"
step "cat runs/mine/report.md"
step "timm-selfdistill calibrate runs/mine --max-accuracy-drop 1"
one=$(find "$images" -name '*.jpg' -o -name '*.png' -o -name '*.JPEG' -o -name '*.jpeg' | sort | tail -n 1)
step "timm-selfdistill predict runs/mine $one"
step "timm-selfdistill export runs/mine --exit 1 --format torch-export"
echo "$typed lines typed, $((SECONDS - first)) seconds"
