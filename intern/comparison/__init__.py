"""Many finished runs -> one table of their settings and scores, in a terminal, as files and as plots."""
