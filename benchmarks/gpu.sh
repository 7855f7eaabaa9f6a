#!/usr/bin/env bash
# Everything that a GPU is wanted for, on a machine that has Python, torch, triton and transformers
# and can fetch nothing:
#
#   make gpu-wheels                    where there is a package index, and
#   make gpu-trainer-wheels            where 65 MiB more can be carried, for ten steps of TRL
#   bash benchmarks/gpu.sh             on the machine; again to go on where it stopped
#   make gpu-results                   puts what runs/gpu holds into the tables
#
# A step takes less than nine minutes, keeps what it found part by part, and is skipped once it is
# whole. Names of steps choose among them; --toy runs their smallest forms on a CPU.
set -u
cd "$(dirname "$0")/.."
wheels=${WHEELS:-build/gpu/wheels}
trainer=${TRAINER_WHEELS:-build/gpu/trainer-wheels}
output=${OUTPUT:-runs/gpu}
environment=${ENVIRONMENT:-build/gpu/environment}
toy=
test "${1:-}" = --toy && { toy=--toy; shift; }

if ! test -e "$environment/.ready"; then
  # Beside what the machine has, which stays as it is.
  "${PYTHON:-python3}" -m venv --without-pip --system-site-packages "$environment" || exit 1
  "${PYTHON:-python3}" -c 'import site, sys; print("\n".join(site.getsitepackages()))' \
    > "$(echo "$environment"/lib/python3*/site-packages)/machine.pth"
  touch "$environment/.ready"
fi
# The second folder may come later, or never.
for folder in "$wheels" "$trainer"; do
  done="$environment/.$(basename "$folder")"
  test -e "$folder/carried.txt" -a ! -e "$done" || continue
  # What is carried is all of it; the machine's torch may ask for another triton than it has.
  "${PYTHON:-python3}" -m pip --disable-pip-version-check --python "$environment/bin/python" \
    install --quiet --no-deps --no-index --find-links "$folder" --requirement "$folder/carried.txt" || exit 1
  touch "$done"
done
test -e "$environment/.$(basename "$wheels")" || { echo "$wheels holds no carried wheels"; exit 1; }

export HF_HUB_OFFLINE=1 HF_HUB_DISABLE_TELEMETRY=1 TOKENIZERS_PARALLELISM=false
failed=
for step in ${*:-agreement times tuning capture probe vocabulary gradients trainer}; do
  timeout 530 "$environment/bin/python" benchmarks/gpu/step.py "$step" $toy --output "$output" \
    --seconds "${SECONDS_OF_A_STEP:-400}" || failed="$failed $step"
done
test -z "$failed" || { echo "not whole:$failed"; exit 1; }
