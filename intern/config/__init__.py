"""A composed configuration -> checked Python values, with the nearest right key for a wrong one."""

from intern.config import resolvers as resolvers  # registers what conf/ computes from other keys
