"""How far a fit can be trusted: other intervals, other objectives, other laws, data it has not seen, and its record."""
