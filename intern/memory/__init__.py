"""How much memory a training step takes, and what is given up so that it fits."""
