"""The run directory: its files, their writer and their careful reader."""
