"""Generated household games in ALFWorld's format."""
