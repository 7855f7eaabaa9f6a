"""Token weights inside VeRL's PPO trainers, without a fork and without a patch."""

import verl as verl  # first of all, since VeRL in turn imports the plug-in
