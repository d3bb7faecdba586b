"""All runs, finished or not -> a list, the story of one, and what is removed of them."""
