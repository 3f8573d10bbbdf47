"""Building a shard set: the request, the tasks, Ray, and the output folder."""
