import os

# Set before torch and the trainer start: one thread per process, no network, no telemetry.
os.environ |= {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "CI": "1", "TQDM_DISABLE": "1"}
