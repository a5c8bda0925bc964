"""What is not inference: pages for people, operations, descriptions of models, and /metrics."""
