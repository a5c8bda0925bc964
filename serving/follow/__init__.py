"""Following the registry, and doing without it: rounds, reports, holds, orders, emergencies."""
