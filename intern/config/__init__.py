"""A composed configuration -> checked Python values, with the nearest right key for a wrong one."""
