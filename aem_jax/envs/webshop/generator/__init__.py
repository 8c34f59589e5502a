"""A shop of our own: products, annotations and what people say they want, in WebShop's schema."""
