"""What a run would see and whether it can run here, before it starts."""
