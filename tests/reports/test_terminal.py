"""What `fit`, `predict` and `list` print, on the fabricated sweep of these tests."""
