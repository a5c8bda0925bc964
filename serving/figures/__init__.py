"""What is counted about requests, versions and the server, and what that says of their health."""
