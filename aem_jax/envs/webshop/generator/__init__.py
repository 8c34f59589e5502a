"""A generated shop in WebShop's format: products, annotations and instructions."""
