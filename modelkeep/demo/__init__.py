"""The demo: real digits, versions trained on the spot, live traffic, and a report of what was decided."""
