"""Who may ask, and how much: keys, rates, and the places for requests in flight."""
