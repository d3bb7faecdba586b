"""Finished runs -> scores, intervals, tables and reports."""
