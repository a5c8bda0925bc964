"""Answers that are kept: in this process, in Redis, and in a Redis Cluster."""
