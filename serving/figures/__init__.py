"""What is counted about requests and versions, and how the server performs."""
