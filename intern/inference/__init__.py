"""A model and questions -> answers and losses."""
