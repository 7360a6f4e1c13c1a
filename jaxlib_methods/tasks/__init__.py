"""Tasks that the library makes itself: pure functions of a seed and an index."""
