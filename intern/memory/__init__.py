"""How much memory a training step needs, and what is given up so that it fits."""
