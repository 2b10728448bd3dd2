"""A W&B-protocol server for one machine: sweeps, agents, runs, files and a page to compare them."""
