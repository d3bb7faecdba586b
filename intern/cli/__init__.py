"""Hydra around a task: one-line errors, exit codes, sweeps."""
