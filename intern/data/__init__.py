"""Rows of a file -> token ids and labels."""
