"""Faster forward and backward passes for layers of transformers, TRL and PEFT."""
