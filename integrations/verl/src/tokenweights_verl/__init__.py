"""Token weights inside VeRL's PPO trainer, without a fork and without a patch."""
