"""Following the registry, and doing without it: rounds, reports, the last good state, holds, emergencies."""
