"""Household games of our own in ALFWorld's format: the catalogue, the floor plans and the games drawn from them."""
