"""The memory that models compute in: what there is, what they take, and what follows from it."""
