"""What is not inference: the pages for people, commands and metrics."""
