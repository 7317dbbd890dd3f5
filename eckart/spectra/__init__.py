"""Numbers read off a spectrum."""
