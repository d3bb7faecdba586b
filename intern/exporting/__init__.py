"""A finished run -> files for other programs, compared with the model that was evaluated before they are called done."""
